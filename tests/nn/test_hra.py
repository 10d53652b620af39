# SPDX-License-Identifier: Apache-2.0
"""fk.nn.HRALinear and fk.nn.HRAConv2d: construction, start, merge, saving."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import frodkernels as fk
from frodkernels.reference.householder import reflect
from tests.householder.cases import F64, close
from tests.nn.hra_layers import M, N, R, both, conv, directions, linear

CONVS = {
    "plain": {},
    "oblong": {"kernel_size": (2, 5)},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (0, 2)},
    "same": {"padding": "same"},
    "dilation": {"dilation": (2, 1)},
    "everything": {"kernel_size": (2, 3), "stride": (1, 2), "padding": (2, 1), "dilation": (1, 2), "bias": False},
    "reflected": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicated": {"padding": (2, 1), "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "circular same": {"padding": "same", "padding_mode": "circular"},
}
convs = pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
either = pytest.mark.parametrize("orthogonalize", [False, True])


def rotated(layer):
    """The base layer with the adapted weight, by the definition."""
    other = copy.deepcopy(layer.base)
    weight = reflect(layer.base.weight.flatten(1), layer.u, orthogonalize=layer.orthogonalize).detach()
    other.weight.data = weight.view_as(layer.base.weight)
    return other


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["auto", "input", "output"])
@either
def test_linear_is_its_definition(side, orthogonalize):
    layer, x = linear(side=side, orthogonalize=orthogonalize)
    close(layer(x), rotated(layer)(x))


@either
@convs
def test_convolution_is_its_definition(options, orthogonalize):
    layer, x = conv(orthogonalize=orthogonalize, **options)
    want = rotated(layer)
    close(layer(x), want(x))
    close(layer(x[0]), want(x[0]))
    leaves = [x.requires_grad_(), layer.u]
    got = torch.autograd.grad(layer(x).square().sum(), leaves)
    weight = reflect(layer.base.weight.flatten(1), layer.u, orthogonalize=orthogonalize).view_as(layer.base.weight)
    y = torch.func.functional_call(layer.base, {"weight": weight}, (x,))
    close(got, torch.autograd.grad(y.square().sum(), leaves))


@pytest.mark.parametrize("r", [2, 8, 24, 64])
def test_even_ranks_start_as_the_layer_itself(r):
    base, kernel = nn.Linear(N, M, dtype=F64), nn.Conv2d(3, 5, 3, dtype=F64)
    x, image = torch.randn(5, N, dtype=F64), torch.randn(2, 3, 6, 6, dtype=F64)
    layer = fk.nn.HRALinear.from_linear(base, r)
    assert layer.u.shape == (N, r) and layer.u.dtype == F64 and torch.equal(layer.u[:, ::2], layer.u[:, 1::2])
    close(layer(x), base(x))
    close(fk.nn.HRAConv2d.from_conv2d(kernel, r)(image), kernel(image))
    layer(x).square().sum().backward()
    assert layer.u.grad.norm() > 1e-3  # and can leave the start


@pytest.mark.parametrize("r, orthogonalize", [(1, False), (7, False), (6, True)])
def test_other_starts_are_random_and_independent(r, orthogonalize):
    layer = fk.nn.HRALinear.from_linear(nn.Linear(N, M), r, orthogonalize=orthogonalize)
    assert layer.u.shape == (N, r) and torch.linalg.matrix_rank(layer.u) == r
    assert layer(torch.randn(2, N)).isfinite().all()


def test_a_generator_makes_the_start_repeatable():
    base, kernel = nn.Linear(N, M), nn.Conv2d(3, 5, 3)
    for make, layer in ((fk.nn.HRALinear.from_linear, base), (fk.nn.HRAConv2d.from_conv2d, kernel)):
        draws = (make(layer, generator=torch.Generator().manual_seed(seed)).u for seed in (1, 1, 2))
        first, again, other = draws
        assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_directions_are_float32_or_wider(dtype):
    for layer in (
        fk.nn.HRALinear.from_linear(nn.Linear(N, M, dtype=dtype), 4),
        fk.nn.HRAConv2d.from_conv2d(nn.Conv2d(3, 5, 3, dtype=dtype), 4),
    ):
        assert layer.u.dtype == (F64 if dtype == F64 else torch.float32)


def test_only_the_directions_train():
    for layer, x in both():
        assert layer.base.weight.requires_grad is False
        layer(x).square().sum().backward()
        assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"u"}
        assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"u"}


def test_the_base_layer_is_kept_and_u_is_copied():
    base, u = nn.Linear(N, M, dtype=F64), directions()
    layer = fk.nn.HRALinear.from_linear(base, u=u)
    assert layer.base is base
    u.zero_()
    assert layer.u.abs().sum() > 0


def test_bad_arguments_are_named():
    base, kernel = nn.Linear(N, M), nn.Conv2d(3, 5, 3)
    zero = directions(dtype=torch.float32)
    zero[:, 3] = 0
    make, make_conv = fk.nn.HRALinear.from_linear, fk.nn.HRAConv2d.from_conv2d
    for call, message in (
        (lambda: make(nn.ReLU()), "linear must be a linear layer with in_features, got ReLU"),
        (lambda: fk.nn.HRALinear(nn.ReLU(), zero), "base must be a linear layer with in_features, got ReLU"),
        (lambda: fk.nn.HRALinear(None, zero, in_features=N), "base must be a linear layer"),
        (lambda: make(base, 0), "r and the layer's inputs must be at least 1, got r=0 and 24"),
        (lambda: make(nn.Linear(0, 4)), "r and the layer's inputs must be at least 1, got r=8 and 0"),
        (lambda: make(base, u=torch.ones(N - 1, 2)), r"u must be \[24, r\] with r >= 1, got \[23, 2\]"),
        (lambda: make(base, u=[1.0]), "u must be a tensor, got list"),
        (lambda: make(base, u=zero), r"u has columns that are zero or not finite, which are no reflections: \[3\]"),
        (lambda: make(base, u=zero + torch.inf), r"u has columns that are zero or not finite.*\[0, 1, 2, 3, 4, 5\]"),
        (lambda: make(base, u=zero.where(zero != 0, torch.nan)), "u has columns that are zero or not finite"),
        (lambda: make(base, N + 1, orthogonalize=True), "u has 25 columns of 24 entries: orthogonalize needs r <= n"),
        (lambda: make(base, side="left"), "side must be 'auto', 'input' or 'output', got 'left'"),
        (lambda: make_conv(base), "conv must be a torch.nn.Conv2d, got Linear"),
        (lambda: make_conv(nn.Conv1d(3, 5, 3)), "conv must be a torch.nn.Conv2d, got Conv1d"),
        (lambda: fk.nn.HRAConv2d(base, zero), "base must be a torch.nn.Conv2d, got Linear"),
        (lambda: make_conv(kernel, u=zero), r"u must be \[27, r\] with r >= 1, got \[24, 6\]"),
        (lambda: make_conv(kernel, u=torch.zeros(27, 2)), "u has columns that are zero or not finite"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    for call in (lambda c: make_conv(c), lambda c: fk.nn.HRAConv2d(c, torch.ones(18, 2))):
        with pytest.raises(NotImplementedError, match="HRA has no convolutions with groups > 1, got groups=2"):
            call(nn.Conv2d(4, 6, 3, groups=2))
    assert base.weight.requires_grad  # a refusal freezes nothing


# ---- merge -----------------------------------------------------------------------------------------------------------


@either
def test_merge_is_the_forward(orthogonalize):
    for layer, x in both(orthogonalize=orthogonalize):
        before = layer.base.weight.clone()
        merged = layer.merge()
        assert type(merged) is type(layer.base) and merged is not layer.base
        close(merged(x), layer(x))
        close(merged.weight, rotated(layer).weight)
        assert torch.equal(layer.base.weight, before)


@convs
def test_merged_convolutions_keep_their_geometry(options):
    layer, x = conv(**options)
    merged = layer.merge()
    close(merged(x), layer(x))
    assert repr(merged) == repr(layer.base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_keeps_the_dtype(dtype):
    for layer, _ in both(dtype=dtype):
        weight = layer.merge().weight
        assert weight.dtype == dtype
        exact = reflect(layer.base.weight.double().flatten(1), layer.u.double()).view_as(weight)
        error = (weight.double() - exact).abs()  # one rounding
        assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_merge_without_bias():
    layer = fk.nn.HRALinear.from_linear(nn.Linear(N, M, bias=False, dtype=F64), u=directions())
    assert layer.merge().bias is None
    close(layer.merge()(x := torch.randn(4, N, dtype=F64)), layer(x))


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_copies_and_files():
    for layer, x in both(orthogonalize=True):
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh = copy.deepcopy(layer)
        with torch.no_grad():
            for p in fresh.parameters():
                p.normal_()
        fresh.load_state_dict(torch.load(file))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
            assert torch.equal(other(x), layer(x))
            assert other.u is not layer.u and other.u.requires_grad and not other.base.weight.requires_grad
            with torch.no_grad():
                other.u.normal_()
            assert not torch.equal(other(x), layer(x))
        assert set(layer.state_dict()) == {"u", "base.weight", "base.bias"}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_directions_that_are_none_are_refused_when_loaded(bad, assign):
    for layer, _ in both():
        state = {name: torch.randn_like(t) for name, t in layer.state_dict().items()}
        state["u"][:, 2] = bad
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        with pytest.raises(ValueError, match=r"^u has columns that are zero or not finite.*\[2\]"):
            layer.load_state_dict(state, assign=assign)
        assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_the_layer_of_a_bad_file_is_named():
    model = nn.Sequential(nn.Linear(N, N, dtype=F64), linear()[0])
    state = model.state_dict()
    state["1.u"] = torch.zeros(N, R, dtype=F64)
    with pytest.raises(ValueError, match=r"^1\.u has columns that are zero or not finite"):
        model.load_state_dict(state)


def test_other_shapes_are_refused_as_torch_refuses_them():
    layer, _ = linear()
    state = layer.state_dict()
    state["u"] = directions(N, R + 1)
    with pytest.raises(RuntimeError, match="size mismatch for u"):
        layer.load_state_dict(state)


def test_meta_layers_are_filled_by_loading():
    layer, x = linear()
    with torch.device("meta"):
        empty = fk.nn.HRALinear.__new__(fk.nn.HRALinear)
    empty.__dict__ = copy.deepcopy(layer).to("meta").__dict__
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))


def test_moving_and_converting():
    for layer, x in both():
        want = layer(x)
        layer.float()
        assert layer.u.dtype == torch.float32
        torch.testing.assert_close(layer(x.float()), want.float(), rtol=1e-4, atol=1e-4)
        layer.bfloat16()
        y = layer(x.bfloat16())
        assert y.dtype == torch.bfloat16 and (y.double() - want).norm() < 0.05 * want.norm()


def test_extra_repr():
    assert "r=6, orthogonalize=False, side='input'" in repr(linear(side="input")[0])
    assert "r=4, orthogonalize=True" in repr(conv(orthogonalize=True)[0])
    assert "(base): Conv2d(3, 5" in repr(conv()[0])
