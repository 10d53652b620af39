# SPDX-License-Identifier: Apache-2.0
"""A cached weight is never stale, never outgrows its budget and never gets into a graph."""

import copy
import pickle

import pytest
import torch

import frodkernels as fk
from frodkernels.nn.eval_cache import CacheBudget, EvalCache, _Identity, may_cache

M, N = 6, 5


class Layer:
    """The tensors of one layer and a cache over them."""

    def __init__(self, dtype=torch.float32, budget=None):
        torch.manual_seed(0)
        self.pattern = fk.SparsePattern(torch.tensor([0, 2, 4]), torch.tensor([1, 3, 0]), (N, N))
        self.U, self.V = torch.randn(M, N).to(dtype), torch.randn(N, N).to(dtype)
        self.lam = torch.nn.Parameter(torch.randn(N))
        self.values = torch.nn.Parameter(torch.randn(3))
        self.cache = EvalCache(budget)
        self.builds = 0

    def build(self):
        self.builds += 1
        return self.weight()

    def weight(self):
        with torch.no_grad():
            return fk.frod_weight(self.U, self.V, self.lam, self.values, self.pattern)

    def get(self, **kwargs):
        return self.cache.get((self.lam, self.values), (self.U, self.V), (self.pattern,), self.build, **kwargs)

    def check(self, builds):
        got = self.get()
        assert torch.equal(got, self.weight())
        assert self.builds == builds


def test_kept_while_nothing_changes():
    layer = Layer()
    for _ in range(4):
        layer.check(1)


def step(layer):
    optimiser = torch.optim.SGD([layer.lam, layer.values], lr=0.5)
    layer.lam.grad, layer.values.grad = torch.ones(N), torch.ones(3)
    optimiser.step()


def in_place(layer):
    with torch.no_grad():
        layer.values[1] += 1


def through_data(layer):
    layer.values.data.copy_(torch.arange(3.0))


def through_numpy(layer):
    layer.lam.detach().numpy()[2] = 7.0


def new_parameter(layer):
    layer.lam = torch.nn.Parameter(layer.lam.detach() * 2)


def other_dtype(layer):
    layer.values = torch.nn.Parameter(layer.values.detach().double() * 1.5)


def to_nan(layer):
    layer.lam.data[0] = float("nan")


def sign_of_zero(layer):
    layer.values.data[0] = -0.0


def basis(layer):
    layer.V.mul_(2)


def other_basis(layer):
    layer.V = layer.V.clone().mul_(3)


def factor(layer):
    layer.U.add_(1)


def other_pattern(layer):
    layer.pattern = fk.SparsePattern(torch.tensor([1, 2, 4]), torch.tensor([2, 3, 0]), (N, N))


CHANGES = [
    step, in_place, through_data, through_numpy, new_parameter, other_dtype, basis, other_basis, factor, other_pattern
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_rebuilt_after(change):
    layer = Layer()
    layer.check(1)
    change(layer)
    layer.check(2)
    layer.check(2)


def test_nan_parameters():
    layer = Layer()
    to_nan(layer)
    first = layer.get()
    assert layer.get() is first and layer.builds == 1  # compared as bits, NaN equals itself


def test_compared_as_bits():
    layer = Layer()
    layer.values.data[0] = 0.0
    layer.get()
    sign_of_zero(layer)
    layer.get()
    assert layer.builds == 2


def test_the_first_call_has_the_bits_of_every_later_one():
    layer = Layer()
    assert torch.equal(layer.get(), layer.get())


def test_dtype():
    layer = Layer()
    assert layer.get(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert layer.get().dtype == torch.float32
    assert layer.builds == 2


def test_drop():
    layer = Layer()
    layer.get()
    assert layer.cache.nbytes == 4 * M * N
    layer.cache.drop()
    assert layer.cache.nbytes == 0
    layer.check(2)


def test_built_in_inference_mode_and_used_outside():
    layer = Layer()
    with torch.inference_mode():
        layer.get()
        weight = layer.get()
    assert not weight.is_inference() and not weight.requires_grad
    x = torch.randn(2, N, requires_grad=True)
    torch.nn.functional.linear(x, weight).sum().backward()


def test_parameters_made_in_inference_mode():
    layer = Layer()
    with torch.inference_mode():
        layer.lam, layer.V = layer.lam.detach().clone(), layer.V.clone()
    layer.check(1)
    with torch.inference_mode():
        layer.lam.add_(1)
    layer.check(2)


def test_built_without_autocast():
    layer = Layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer.get()
    assert torch.equal(got, layer.weight())


def test_budget():
    size = 4 * M * N
    budget = CacheBudget(2 * size)
    first, second, third = (Layer(budget=budget) for _ in range(3))
    assert first.get() is not None and second.get() is not None
    assert third.get() is None and budget.used == 2 * size
    first.cache.drop()
    assert third.get() is not None
    del second
    assert budget.used == size
    assert "bytes" in repr(budget)


def test_budget_of_nothing():
    layer = Layer(budget=CacheBudget(0))
    assert layer.get() is None and layer.get() is None and layer.builds == 0


def test_a_failed_build_leaves_no_trace():
    layer = Layer()

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        layer.cache.get((layer.lam, layer.values), (layer.U, layer.V), (layer.pattern,), fail)
    layer.check(1)


@pytest.mark.parametrize("bad", [-1, 1.5, True, "1"])
def test_bad_budget(bad):
    with pytest.raises(ValueError, match="limit"):
        CacheBudget(bad)


def test_copies_are_empty():
    layer = Layer()
    layer.get()
    assert copy.deepcopy(layer.cache).nbytes == 0
    assert pickle.loads(pickle.dumps(layer.cache)).nbytes == 0


def test_who_may_use_it():
    x, lam, values = torch.randn(2, N), torch.nn.Parameter(torch.randn(N)), torch.nn.Parameter(torch.randn(3))
    assert not may_cache(x, lam, values)
    with torch.no_grad():
        assert may_cache(x, lam, values)
    with torch.inference_mode():
        assert may_cache(x, lam, values)
    lam.requires_grad_(False), values.requires_grad_(False)
    assert may_cache(x, lam, values)
    assert not may_cache(x.clone().requires_grad_(), lam, values)
    assert not may_cache(x.to("meta"), lam, values)


def test_not_inside_transforms():
    lam, values = torch.randn(N), torch.randn(3)
    seen = []

    def f(x):
        seen.append(may_cache(x, lam, values))
        return x.sum()

    with torch.no_grad():
        torch.func.vmap(f)(torch.randn(2, N))
        torch.func.jvp(f, (torch.randn(N),), (torch.ones(N),))
    torch.func.grad(f)(torch.randn(N))
    with torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(torch.randn(N), torch.ones(N)))
    assert seen == [False] * 4


def test_not_while_compiling_or_tracing():
    lam, values = torch.randn(N), torch.randn(3)
    seen = []

    def f(x):
        seen.append(may_cache(x, lam, values))
        return x + 1

    torch.jit.trace(f, torch.randn(N), check_trace=False)
    assert seen == [False]

    @torch.compile(backend="eager", fullgraph=True)
    def g(x):
        return x + 1 if may_cache(x, lam, values) else x - 1

    x = torch.randn(N)
    assert torch.equal(g(x), x - 1)


def test_not_for_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert not may_cache(torch.randn(2, N), torch.randn(N), torch.randn(3))


def test_what_cuda_relies_on():
    """Identity sees what goes through autograd; ``.data`` is the documented hazard that drop() is for."""
    tensor = torch.nn.Parameter(torch.randn(4))
    mark = _Identity.of(tensor)
    assert mark.holds(tensor)
    tensor.data.copy_(torch.zeros(4))
    assert mark.holds(tensor)
    with torch.no_grad():
        tensor.add_(1)
    assert not mark.holds(tensor)
    mark = _Identity.of(tensor)
    tensor.data = torch.ones(4)
    assert not mark.holds(tensor)
    assert not _Identity.of(tensor).holds(torch.nn.Parameter(tensor.detach()))
