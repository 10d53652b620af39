# SPDX-License-Identifier: Apache-2.0
"""SHiRA's module: what it computes, its cached weight, merging in place, switching, and its state."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import frodkernels as fk
from frodkernels.nn.eval_cache import CacheBudget
from frodkernels.nn.sparse_delta import SparseDeltaLinear

M, N = 12, 20


def make(bias=True, r=2, dtype=torch.float32, scale=1.0, **kwargs):
    linear = torch.nn.Linear(N, M, bias=bias, dtype=dtype)
    layer = SparseDeltaLinear.from_linear(linear, r, scale=scale, **kwargs)
    with torch.no_grad():
        layer.values.normal_()
    return layer


def changed(layer):
    """W + scale S."""
    weight = layer.base.weight.detach().double()
    return weight.index_put(layer.pattern.coo(), layer.scale * layer.values.detach().double(), accumulate=True)


def plain(layer, x):
    bias = None if layer.base.bias is None else layer.base.bias.double()
    return F.linear(x.double(), changed(layer), bias).to(x.dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_it_starts_as_the_layer_it_adapts_and_trains_only_the_values(bias):
    linear = torch.nn.Linear(N, M, bias=bias)
    layer = SparseDeltaLinear.from_linear(linear, 2)
    x = torch.randn(3, 5, N)
    assert torch.equal(layer(x), linear(x)) and layer.base is linear
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["values"]
    assert layer.pattern.nnz == 2 * (M + N) and layer.values.dtype == torch.float32
    layer(x).square().sum().backward()
    assert layer.values.grad is not None and layer.values.grad.any() and linear.weight.grad is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_the_map(training, scale):
    layer = make(scale=scale).train(training)
    x = torch.randn(4, N)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(layer(x), plain(layer, x))


def test_the_cached_weight_follows_every_change():
    layer = make().eval()
    x = torch.randn(4, N)
    with torch.no_grad():
        layer(x)
        assert layer._cache.nbytes == 4 * M * N
        layer.values.data.copy_(torch.randn(layer.pattern.nnz))  # behind the version counter
        torch.testing.assert_close(layer(x), plain(layer, x))
        layer.base.weight.add_(1)
        torch.testing.assert_close(layer(x), plain(layer, x))
        layer.scale = 3.0
        torch.testing.assert_close(layer(x), plain(layer, x))
        layer.train()
        assert layer._cache.nbytes == 0


def test_no_budget_no_cache():
    linear = torch.nn.Linear(N, M)
    pattern = fk.SparsePattern(torch.tensor([0, 3]), torch.tensor([5, 7]), (M, N))
    layer = SparseDeltaLinear(linear, torch.randn(2), pattern, cache_budget=CacheBudget(0)).eval()
    x = torch.randn(4, N)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(layer, x))
    assert layer._cache.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merging_in_place_and_back(dtype):
    layer = make(dtype=dtype, scale=0.7)
    weight, x = layer.base.weight.detach().clone(), torch.randn(4, N).to(dtype)
    want = changed(layer).to(dtype)
    address = layer.base.weight.data_ptr()
    assert layer.merge_() is layer and layer.merged and layer.base.weight.data_ptr() == address
    torch.testing.assert_close(layer.base.weight.detach(), want)
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer.merge_().base.weight, layer.base.weight)  # a second time does nothing
    assert torch.equal(layer.merge().weight, layer.base.weight)
    layer.unmerge_().unmerge_()
    assert torch.equal(layer.base.weight, weight) and not layer.merged


def test_two_adapters_of_one_layer_switch():
    linear = torch.nn.Linear(N, M, dtype=torch.bfloat16)
    weight = linear.weight.detach().clone()
    first, second = (SparseDeltaLinear.from_linear(linear, 2) for _ in range(2))
    for layer in (first, second):
        torch.nn.init.normal_(layer.values)
    first.merge_()
    alone = linear.weight.detach().clone()
    for _ in range(3):
        first.unmerge_()
        second.merge_()
        second.unmerge_()
        first.merge_()
        assert torch.equal(linear.weight, alone)
    first.unmerge_()
    assert torch.equal(linear.weight, weight)


def test_merge_makes_a_plain_layer_and_changes_nothing():
    layer = make()
    before, x = layer.base.weight.detach().clone(), torch.randn(4, N)
    merged = layer.merge()
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged(x), plain(layer, x))
    assert torch.equal(layer.base.weight, before) and merged.weight.data_ptr() != layer.base.weight.data_ptr()


class Scaled(torch.nn.Module):
    """A layer whose weight cannot be read: it stands for a quantised one."""

    in_features, out_features = N, M

    def __init__(self):
        super().__init__()
        self.codes = torch.nn.Parameter(torch.randint(-5, 5, (M, N)).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) * 0.1).t()


def test_a_base_layer_that_must_be_called():
    base = Scaled()
    layer = SparseDeltaLinear.from_linear(base, 2)
    torch.nn.init.normal_(layer.values)
    x = torch.randn(4, N, requires_grad=True)
    weight = (base.codes * 0.1).index_put(layer.pattern.coo(), layer.values, accumulate=True)
    got, want = layer(x), x @ weight.t()
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.square().sum(), (x, layer.values), retain_graph=True) for y in (got, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for merge in (layer.merge, layer.merge_):
        with pytest.raises(ValueError, match=r"^base must be a torch\.nn\.Linear"):
            merge()
    assert not layer.merged


def test_hooks_of_the_base_layer_run():
    layer, seen = make(), []
    layer.base.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    x = torch.randn(4, N)
    torch.testing.assert_close(layer(x), plain(layer, x))
    assert seen == [(4, M)]


def test_state_dict_carries_the_pattern():
    layer, other = make(), make()
    x = torch.randn(4, N)
    assert not torch.equal(torch.stack(layer.pattern.coo()), torch.stack(other.pattern.coo()))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other(x), layer(x))
    short = SparseDeltaLinear.from_linear(torch.nn.Linear(N, M), 1)
    with pytest.raises((ValueError, RuntimeError)):
        short.load_state_dict(layer.state_dict())
    values = short.values.detach().clone()
    assert torch.equal(short.values, values)


def test_a_merged_layer_saves_the_weight_from_before():
    layer, other = make(scale=0.5), make(scale=0.5)
    x, before = torch.randn(4, N), layer.base.weight.detach().clone()
    want = layer(x)
    state = layer.merge_().state_dict()
    assert layer.merged and torch.equal(state["base.weight"], before)
    other.merge_().load_state_dict(state)
    assert not other.merged and torch.equal(other.base.weight, before)
    torch.testing.assert_close(other(x), want)
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), want)


def test_a_refused_pattern_leaves_everything():
    layer = make()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    before = {k: v.clone() for k, v in state.items()}
    state["values"] += 1
    state["_extra_state"][0, 0] = M
    with pytest.raises(ValueError, match="out of range"):
        layer.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


class Tripled(torch.nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def test_weights_that_are_not_what_is_multiplied_are_not_merged():
    parametrised = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(N, M))
    for base in (parametrised, Tripled(N, M)):
        layer = SparseDeltaLinear.from_linear(base, 2)
        torch.nn.init.normal_(layer.values)
        for merge in (layer.merge_, layer.merge):
            with pytest.raises(ValueError, match="^base must be"):
                merge()
        assert not layer.merged


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_stand_on_their_own(clone, merged):
    layer = make().eval()
    before = layer.base.weight.detach().clone()
    if merged:
        layer.merge_()
    other, x = clone(layer), torch.randn(4, N)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
    other.unmerge_()
    assert torch.equal(other.base.weight, before) and layer.merged == merged


def test_casts_and_moves():
    layer = make().merge_().double()
    assert layer.values.dtype == torch.float64 and layer.merged
    weight = layer.unmerge_().base.weight
    assert weight.dtype == torch.float64
    x = torch.randn(4, N, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(layer, x))


@pytest.mark.parametrize(
    "arguments, name",
    [
        (dict(r=0), "r"),
        (dict(r=-1), "r"),
        (dict(r=1.5), "r"),
        (dict(r=8), "r"),  # more entries than the matrix has
        (dict(pattern=[1, 2]), "pattern"),
        (dict(pattern=fk.SparsePattern(torch.tensor([0]), torch.tensor([0]), (N, M))), "x|pattern"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^({name}) "):
        SparseDeltaLinear.from_linear(torch.nn.Linear(N, M), **arguments)
    with pytest.raises(ValueError, match=r"^linear "):
        SparseDeltaLinear.from_linear(torch.nn.ReLU())


@pytest.mark.parametrize("train", [True, False])
def test_a_misshapen_x_is_named(train):
    layer = make().train(train)
    with torch.no_grad(), pytest.raises(ValueError, match=rf"^x must be \[\.\.\., {N}\]"):
        layer(torch.randn(3, N + 1))


def test_repr():
    assert "nnz=64, density=0.267, scale=1.0, merged=False" in repr(make())
