# SPDX-License-Identifier: Apache-2.0
"""hra_linear from both sides of the weight: values, gradients, layouts, what is computed and what is not."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import frodkernels as fk
from frodkernels.functional import hra as functional
from tests.householder.cases import (
    F64,
    SIDES,
    assert_as_good_as_plain,
    assert_exact,
    close,
    gradient_like,
    make_layer,
)
from tests.support import DTYPE_IDS, DTYPES, LAYOUTS

TRAINABLE = ("x", "u", "weight", "bias")
sides = pytest.mark.parametrize("side", SIDES)
either = pytest.mark.parametrize("orthogonalize", [False, True])


@sides
@either
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_values_and_gradients(dtype, param_dtype, orthogonalize, side):
    for m, n, r, T in ((64, 96, 8, 130), (96, 40, 13, 65)):
        layer = make_layer(m, n, r, T, dtype=dtype, param_dtype=param_dtype)
        assert_as_good_as_plain(layer, side=side, orthogonalize=orthogonalize)


@sides
@either
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(backend, orthogonalize, side):
    for bias in (True, False):
        layer = make_layer(4, 5, 3, 2, 3, bias=bias)
        leaves = layer.leaves()

        def f(x, u, weight, bias=None):
            return fk.hra_linear(x, weight, u, bias, orthogonalize=orthogonalize, side=side)

        with fk.backend(backend):
            assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("side", ["auto", *SIDES])
@either
@pytest.mark.parametrize("m, n, r, T", [(5, 7, 1, 4), (7, 5, 5, 33), (33, 33, 17, 9), (1, 1, 1, 1), (70, 64, 64, 50)])
def test_sizes(m, n, r, T, side, orthogonalize):
    assert_exact(make_layer(m, n, r, T), side=side, orthogonalize=orthogonalize)


@sides
@pytest.mark.parametrize("r", [2, 7, 33, 65, 127, 128])
def test_every_rank(r, side):
    """More reflections than features too."""
    for m, n in ((9, 20), (40, max(r // 3, 1))):
        assert_exact(make_layer(m, n, r, 11), side=side)


@pytest.mark.parametrize("side", ["auto", *SIDES])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(lead, side):
    layer = make_layer(9, 12, 4, *lead)
    leaves = layer.leaves()
    y, exact = layer(side=side), layer.exact()
    assert y.shape == (*lead, 9)
    close(y, exact)
    y.sum().backward()  # the gradient is one number expanded with stride 0
    close([leaf.grad for leaf in leaves], list(torch.autograd.grad(exact.sum(), leaves)))


@sides
@pytest.mark.parametrize("m, n", [(0, 5), (5, 0), (0, 0)])
def test_no_features(m, n, side):
    layer = make_layer(m, n, 3, 4)
    leaves = layer.leaves()
    y = layer(side=side)
    close(y, layer.exact())
    y.sum().backward()
    close([leaf.grad for leaf in leaves], list(torch.autograd.grad(layer.exact().sum(), leaves)))


@sides
@pytest.mark.parametrize("r", [2, 5, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_and_of_its_gradient(layout, r, side):
    layer = make_layer(14, 12, r, 33)
    layer.x = LAYOUTS[layout](layer.x.t()).t()
    g = LAYOUTS[layout](torch.randn(14, 33, dtype=F64)).t()
    leaves = layer.leaves()
    y, exact = layer(side=side), layer.exact()
    close(y, exact)
    close(torch.autograd.grad(y, leaves, g), torch.autograd.grad(exact, leaves, g))


@sides
def test_layouts_of_the_parameters(side):
    layer = make_layer(14, 12, 5, 9)
    for layout in LAYOUTS.values():
        layer.weight, layer.u = layout(layer.weight), layout(layer.u)
        assert_exact(layer, side=side)
    layer.bias = layer.bias[:1].expand(14)
    assert_exact(layer, side=side)


def test_sides_agree():
    for orthogonalize in (False, True):
        layer = make_layer(24, 40, 11, 33)
        layer.leaves()
        outputs = [layer(side=side, orthogonalize=orthogonalize) for side in (*SIDES, "auto")]
        close(outputs[0], outputs[1])
        close(outputs[0], outputs[2])


@pytest.mark.parametrize("side", ["auto", *SIDES])
def test_is_the_layer_of_the_rotated_weight(side):
    layer = make_layer(24, 40, 11, 33)
    W = fk.householder(layer.weight, layer.u)
    close(layer(side=side), F.linear(layer.x, W, layer.bias))


@pytest.mark.parametrize("side", ["auto", *SIDES])
def test_directions_in_equal_pairs_leave_the_layer_as_it_is(side):
    layer = make_layer(24, 40, 4, 33)
    layer.u = layer.u.repeat_interleave(2, dim=1)
    close(layer(side=side), F.linear(layer.x, layer.weight, layer.bias))
    assert_exact(layer, side=side)


@sides
@either
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_a_zero_column_makes_everything_nan(dtype, param_dtype, orthogonalize, side):
    layer = make_layer(9, 12, 5, 7, dtype=dtype, param_dtype=param_dtype)
    layer.u[:, 2] = 0
    x, u = layer.leaves("x", "u")
    y = layer(side=side, orthogonalize=orthogonalize)
    assert layer.exact(orthogonalize).isnan().all() and y.isnan().all()
    y.float().sum().backward()
    assert x.grad.isnan().all() and u.grad[:, 2].isnan().all()


@sides
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_spoils_no_other(bad, side):
    layer = make_layer(9, 12, 5, 40, dtype=torch.float32)
    clean = layer(side=side)
    layer.x[17, 3] = bad
    y, others = layer(side=side), torch.arange(40) != 17
    assert not y[17].isfinite().any() and torch.equal(y[others], clean[others])


@sides
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_lengths_of_directions_do_not_matter(scale, side):
    layer = make_layer(24, 40, 6, 30, dtype=torch.float32)
    want = layer(side=side)
    layer.u = layer.u * scale
    torch.testing.assert_close(layer(side=side), want, rtol=1e-4, atol=1e-4)


# ---- what is computed ------------------------------------------------------------------------------------------------


@sides
@either
@pytest.mark.parametrize(
    "wanted", list(itertools.product([False, True], repeat=4)), ids=lambda w: "".join("01"[b] for b in w)
)
def test_gradients_only_where_asked(wanted, side, orthogonalize):
    layer = make_layer(7, 9, 4, 5)
    names = [name for name, want in zip(TRAINABLE, wanted, strict=True) if want]
    leaves = layer.leaves(*names) if names else []
    y = layer(side=side, orthogonalize=orthogonalize)
    assert y.requires_grad == bool(names)
    if not names:
        return
    y.square().sum().backward()
    exact = torch.autograd.grad(layer.exact(orthogonalize).square().sum(), leaves)
    close([leaf.grad for leaf in leaves], list(exact))
    assert all(getattr(layer, name).grad is None for name in TRAINABLE if name not in names)


@pytest.mark.parametrize("names", [("x",), ("u",), ("weight",), ("bias",), ("x", "u"), ("u", "bias")], ids=str)
def test_what_is_not_needed_is_not_computed(names, monkeypatch):
    asked, sums = [], []
    ops = functional.ops
    backward, gradient = ops.householder_backward, ops.householder_gradient
    monkeypatch.setattr(ops, "householder_backward", lambda *a: asked.append(list(a[6])) or backward(*a))
    monkeypatch.setattr(ops, "householder_gradient", lambda *a: sums.append(tuple(a[0].shape)) or gradient(*a))
    layer = make_layer(7, 9, 4, 5)
    layer.leaves(*names)
    layer(side="output").sum().backward()
    x, u, weight = ("x" in names), ("u" in names), ("weight" in names)
    assert asked == ([[x, u or weight]] if x or u or weight else [])
    assert sums.count((7, 9)) == u  # W^T dB


@sides
def test_no_graph_without_gradients(side):
    layer = make_layer(7, 9, 4, 5)
    layer.leaves()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = layer(side=side)
        assert y.grad_fn is None and not y.requires_grad
        torch.testing.assert_close(y.clone(), layer(side=side).detach())


@sides
def test_arguments_are_left_alone(side):
    layer = make_layer(7, 9, 4, 5)
    before = {name: t.clone() for name, t in layer.tensors().items()}
    layer.leaves()
    layer(side=side).sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in layer.tensors().items())


@sides
def test_nothing_is_cached_between_calls(side):
    """EMA code writes p.data behind autograd's back; a function must see it."""
    layer = make_layer(7, 9, 4, 5)
    layer.leaves()
    layer(side=side)
    for name in ("u", "weight", "bias"):
        tensor = getattr(layer, name)
        tensor.data.copy_(torch.randn(tensor.shape))
        close(layer(side=side), layer.exact())


@sides
@pytest.mark.parametrize("wanted", ["x", "u"])
def test_differentiating_twice_is_refused(wanted, side):
    layer = make_layer(7, 9, 4, 5)
    (leaf,) = layer.leaves(wanted)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(layer(side=side).square().sum(), leaf, create_graph=True)


@sides
def test_dtypes_of_weight_and_bias_follow_x(side):
    """A float32 layer beside a 16-bit x is cast, as a linear layer under autocast casts its weight."""
    layer = make_layer(24, 40, 6, 30, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16, F64):
        u, weight, bias = layer.leaves("u", "weight", "bias")
        x = layer.x.to(dtype)
        y = fk.hra_linear(x, weight, u, bias, side=side)
        assert y.dtype == dtype
        got = torch.autograd.grad(y.sum(), (u, weight, bias))
        assert [t.dtype for t in got] == [torch.float32] * 3
        same = fk.hra_linear(x, weight.to(dtype), u, bias.to(dtype), side=side)
        assert torch.equal(y, same)
        assert torch.equal(got[0], torch.autograd.grad(same.sum(), u)[0])


class FloatGradient(torch.autograd.Function):
    """The identity, whose gradient is float32 whatever flowed forward, as FSDP2 may send it."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g.float()


@sides
def test_a_wider_gradient_is_taken(side):
    layer = make_layer(24, 40, 6, 30, dtype=torch.bfloat16, param_dtype=torch.float32)
    leaves = layer.leaves()
    y = layer(side=side)
    want = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    got = torch.autograd.grad(FloatGradient.apply(y).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(dtype, side):
    layer = make_layer(80, 130, 17, 300, dtype=dtype, param_dtype=torch.float32)
    leaves = layer.leaves()
    g = gradient_like(layer())
    runs = [(y := layer(side=side), *torch.autograd.grad(y, leaves, g)) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@sides
def test_float16_training_sums_over_tokens_wide(side):
    """x^T Q over thousands of tokens overflows float16; u's gradient must not."""
    layer = make_layer(32, 32, 4, 4096, dtype=torch.float16, param_dtype=torch.float32)
    (u,) = layer.leaves("u")
    with torch.no_grad():
        layer.x.fill_(1)
    y = layer(side=side)
    (du,) = torch.autograd.grad(y, u, torch.full(y.shape, 20.0).half())
    assert du.isfinite().all() and du.norm() > 1


def nodes(y):
    """The names of all functions in the graph of y."""
    names, rest = set(), [y.grad_fn]
    while rest:
        node = rest.pop()
        if node is not None:
            names.add(node.name())
            rest += [following for following, _ in node.next_functions]
    return names


def test_each_side_is_its_own_function():
    layer = make_layer(7, 9, 4, 5)
    layer.leaves("u")
    assert nodes(layer(side="input")) & {"HRAInputBackward", "HRAOutputBackward"} == {"HRAInputBackward"}
    assert nodes(layer(side="output")) & {"HRAInputBackward", "HRAOutputBackward"} == {"HRAOutputBackward"}
