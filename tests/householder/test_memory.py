# SPDX-License-Identifier: Apache-2.0
"""What HRA's layers keep and allocate: x and thin matrices, nothing square, and no more at the peak than PEFT."""

import gc
import weakref

import pytest
import torch
from torch import nn

import frodkernels as fk
from tests.frod.test_memory import FORBIDDEN, Recorder
from tests.householder.cases import SIDES, make_chain, make_conv, make_layer

M, N, R, T = 56, 48, 4, 64

BOTH = dict(dtype=torch.bfloat16, param_dtype=torch.float32)
F32 = dict(dtype=torch.float32, param_dtype=torch.float32)


def kept_bytes(case, **options):
    """What the forward keeps for the backward: everything but weight, u and bias; every storage once."""
    held = {t.untyped_storage().data_ptr() for name, t in case.tensors().items() if name != "x"}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        case(**options)
    return sum(kept.values())


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("dtypes", [F32, BOTH], ids=["float32", "bfloat16"])
def test_bytes_saved_for_backward(dtypes, orthogonalize):
    """x and 3 T r numbers of the accumulator: the coefficients, and what does not grow with T."""
    size = torch.finfo(dtypes["dtype"]).bits // 8
    bound = T * N * size + 3 * T * R * 4
    chain, layer = make_chain(N, R, T, **dtypes), make_layer(M, N, R, T, **dtypes)
    chain.leaves(), layer.leaves("x", "u", "bias")
    assert kept_bytes(chain, orthogonalize=orthogonalize) <= bound
    for side in SIDES:
        assert T * N * size < kept_bytes(layer, side=side, orthogonalize=orthogonalize) <= bound, side


@pytest.mark.parametrize("dtypes", [F32, BOTH], ids=["float32", "bfloat16"])
def test_bytes_a_convolution_saves(dtypes):
    """The output has 64 pixels."""
    size = torch.finfo(dtypes["dtype"]).bits // 8
    case = make_conv(M, 6, (3, 3), R, (2, 34, 34), **dtypes, stride=4)
    case.leaves("x", "u", "bias")
    pixels = case().numel() // M
    assert kept_bytes(case) <= case.x.numel() * size + 3 * pixels * R * 4


def test_the_naive_form_keeps_more():
    """The measure above can fail: reflections one by one keep x once a reflection."""
    chain = make_chain(N, R, T, **F32)
    chain.leaves()
    chain_of_reflections = type(chain).exact
    held = T * N * 4 + 3 * T * R * 4

    class Naive(type(chain)):
        def __call__(self):
            return chain_of_reflections(self)

    assert kept_bytes(Naive(chain.x, chain.u)) > held


def test_frozen_directions_keep_no_input():
    chain, layer = make_chain(N, R, T, **F32), make_layer(M, N, R, T, **F32)
    chain.leaves("x"), layer.leaves("x")
    assert kept_bytes(chain) < T * N
    assert kept_bytes(layer, side="input") < T * N


def test_under_autocast_the_cast_input_is_kept_and_not_both():
    layer = make_layer(M, N, R, T, **F32)
    layer.leaves("u", "bias")
    for side in SIDES:
        with torch.autocast("cpu", torch.bfloat16):
            assert kept_bytes(layer, side=side) <= T * N * 2 + 3 * T * R * 4 + M * N * 2  # and the cast weight


def test_the_graph_of_a_frozen_chain_holds_no_reference_to_x():
    chain = make_chain(N, R, T, **F32)
    x = chain.x.clone().requires_grad_()
    inside = x * 1
    gone = weakref.ref(inside)
    y = fk.householder(inside, chain.u)
    del inside
    assert gone() is None
    y.sum().backward()


def record(case, **options):
    """Forward and backward of a case whose x and u train."""
    case.leaves("x", "u")
    case(**options)  # whatever is done once has been done
    with Recorder() as recorder:
        case(**options).sum().backward()
    return recorder


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_nothing_square_is_allocated(side, orthogonalize):
    """H is [n, n] and W H [m, n]; a call has neither."""
    few = 12  # tokens
    recorder = record(make_layer(M, N, R, few, **F32), side=side, orthogonalize=orthogonalize)
    assert max(recorder.sizes) <= max(M, N) * few


@pytest.mark.parametrize("side", SIDES)
def test_no_sort_and_no_host_sync(side):
    """All that is converted is the r x r system, which is in float64 for float32 directions."""
    recorder = record(make_layer(M, N, R, T, **F32), side=side)
    found = [op for op in recorder.ops if op in FORBIDDEN]
    assert found == (["_to_copy"] if side == "output" else [])


@pytest.mark.parametrize("side, gemms", [("input", 2), ("output", 2)])
def test_the_layers_own_products_are_two(side, gemms):
    """x' W^T or x W^T, and its gradient; W is not multiplied by anything square."""
    case = make_layer(M, N, R, T, **F32)
    case.leaves("x", "u")
    big = []

    class Watch(Recorder):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "addmm"):
                a, b = args[-2:]
                big.append(a.shape[0] * a.shape[1] * b.shape[1] >= T * M * N)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Watch():
        case(side=side).sum().backward()
    assert sum(big) == gemms


def test_repeated_steps_leak_nothing():
    layer = make_layer(M, N, R, T, **F32)
    leaves = layer.leaves()

    def step():
        for side in SIDES:
            torch.autograd.grad(layer(side=side).sum(), leaves)

    step()
    gc.collect()
    before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for _ in range(5):
        step()
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= before


# ---- the peak of a model ---------------------------------------------------------------------------------------------


def peak(run):
    """The most bytes that torch's CPU allocator holds at once during ``run``, above what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_the_peak_is_measured():
    def run():
        a = torch.ones(1000)
        b = a + 1  # two at once
        del a
        return b * 2

    run()
    assert 8000 <= peak(run) <= 8512


class Naive(nn.Module):
    """A layer that reflects x as the definition does: the rewrite that doubled memory."""

    def __init__(self, linear, u):
        super().__init__()
        self.base, self.u = linear, nn.Parameter(u)

    def forward(self, x):
        from frodkernels.reference.householder import reflect

        return self.base(reflect(x, self.u, transpose=True))


def test_peak_on_twelve_layers_is_not_above_pefts():
    """The shape of OPT-125M's attention: 12 layers of 768, 768 tokens, rank 8; training directions alone."""
    pytest.importorskip("peft")
    from peft import HRAConfig
    from peft.tuners.hra.layer import HRALinear

    n, r, depth = 768, 8, 12
    linears = [nn.Linear(n, n).requires_grad_(False) for _ in range(depth)]
    directions = [torch.randn(n, r) for _ in range(depth)]
    theirs = []
    for linear, u in zip(linears, directions, strict=True):
        layer = HRALinear(linear, "default", HRAConfig(r=r), r=r)
        layer.hra_u["default"] = nn.Parameter(u)
        theirs.append(layer)
    pairs = list(zip(linears, directions, strict=True))
    models = {
        "peft": nn.Sequential(*theirs),
        **{side: nn.Sequential(*(fk.nn.HRALinear(base, u, side=side) for base, u in pairs)) for side in SIDES},
        "naive": nn.Sequential(*(Naive(base, u) for base, u in pairs)),
    }
    x = torch.randn(n, n)
    peaks = {}
    for name, model in models.items():
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert len(parameters) == depth
        peaks[name] = peak(lambda: torch.autograd.grad(model(x).sum(), parameters))  # noqa: B023
    layer_input = 4 * n * n
    for side in SIDES:
        assert peaks[side] <= peaks["peft"]
        # every layer keeps its input, which is what the next one needs; thin matrices and a few temporaries come on top
        assert peaks[side] <= depth * (layer_input + 3 * 4 * n * r) + 4 * layer_input
    assert peaks["naive"] > peaks["output"] * 3
