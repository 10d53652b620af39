# SPDX-License-Identifier: Apache-2.0
"""frod_linear in its three association orders: values, gradients, layouts, what is computed and what is not."""

import itertools

import pytest
import torch

import frodkernels as fk
from frodkernels.reference import frod as reference
from tests.frod.cases import PATHS, make_layer
from tests.support import DTYPE_IDS, DTYPES, KINDS, LAYOUTS, assert_no_worse_than_torch

SHAPES = [(24, 40, 33), (40, 24, 50), (33, 33, 17)]  # m, n, T
TRAINABLE = ("x", "lam", "values", "bias")


def plain(layer):
    """Plain torch in the layer's own dtypes."""
    return reference.frod_linear(layer.x, layer.U, layer.V, layer.lam, layer.values, layer.pattern, layer.bias)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_values_and_gradients(path, dtype, param_dtype):
    for m, n, T in SHAPES:
        layer = make_layer(m, n, T, dtype=dtype, param_dtype=param_dtype)
        g = torch.randn(T, m, dtype=torch.float64).to(dtype)
        leaves = layer.leaves()
        y, same = layer(path=path), plain(layer)
        got = y, *torch.autograd.grad(y, leaves, g)
        torchs = same, *torch.autograd.grad(same, leaves, g)
        wide = layer.doubled()
        wide_leaves = wide.leaves()
        exact = wide.exact()
        right = exact.detach(), *torch.autograd.grad(exact, wide_leaves, g.double())
        assert [t.dtype for t in got] == [dtype, dtype, param_dtype, param_dtype, dtype]
        for ours, correct, others in zip(got, right, torchs, strict=True):
            if dtype == param_dtype == torch.float64:  # the yardstick's own precision
                close(ours, correct)
            else:
                assert_no_worse_than_torch(ours, correct, others)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradcheck(path, backend):
    for bias in (True, False):
        layer = make_layer(5, 6, 2, 3, dtype=torch.float64, bias=bias)
        leaves = layer.leaves()

        def f(x, lam, values, bias=None, layer=layer):
            return fk.frod_linear(x, layer.U, layer.V, lam, values, layer.pattern, bias, path=path)

        with fk.backend(backend):
            assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pattern(kind, path):
    layer = make_layer(9, 12, 7, dtype=torch.float64, kind=kind)
    leaves = layer.leaves()
    y, exact = layer(path=path), layer.exact()
    close(y, exact)
    for got, want in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(exact.sum(), leaves), strict=True):
        close(got, want)


@pytest.mark.parametrize("path", ["auto", *PATHS])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(lead, path):
    layer = make_layer(9, 12, *lead, dtype=torch.float64)
    leaves = layer.leaves()
    y, exact = layer(path=path), layer.exact()
    assert y.shape == (*lead, 9)
    close(y, exact)
    y.sum().backward()  # the gradient is one number expanded with stride 0
    for leaf, want in zip(leaves, torch.autograd.grad(exact.sum(), leaves), strict=True):
        close(leaf.grad, want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m, n", [(0, 0), (5, 0), (0, 5), (1, 1)])
def test_no_features(m, n, path):
    layer = make_layer(m, n, 3, dtype=torch.float64)
    leaves = layer.leaves()
    y = layer(path=path)
    close(y, layer.exact())
    y.sum().backward()
    for leaf, want in zip(leaves, torch.autograd.grad(layer.exact().sum(), leaves), strict=True):
        close(leaf.grad, want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_and_of_its_gradient(layout, path):
    layer = make_layer(14, 12, 33, dtype=torch.float64)
    layer.x = LAYOUTS[layout](layer.x.t()).t()
    g = LAYOUTS[layout](torch.randn(14, 33, dtype=torch.float64)).t()
    leaves = layer.leaves()
    y, exact = layer(path=path), layer.exact()
    close(y, exact)
    for got, want in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(exact, leaves, g), strict=True):
        close(got, want)


@pytest.mark.parametrize("path", PATHS)
def test_layouts_of_the_factors(path):
    layer = make_layer(14, 12, 9, dtype=torch.float64)
    want = layer(path=path)
    for name in ("U", "V"):
        factor = getattr(layer, name)
        for change in LAYOUTS.values():
            if change(factor).equal(factor):
                setattr(layer, name, change(factor))
                close(layer(path=path), want)
    layer.lam, layer.values = (
        torch.stack([t, t.new_full(t.shape, torch.nan)], 1)[:, 0] for t in (layer.lam, layer.values)
    )
    layer.bias = layer.bias[:1].expand(14)
    close(layer(path=path), layer.exact())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "wanted", list(itertools.product([False, True], repeat=4)), ids=lambda w: "".join("01"[b] for b in w)
)
def test_gradients_only_where_asked(wanted, path):
    layer = make_layer(7, 9, 5, dtype=torch.float64)
    names = [name for name, want in zip(TRAINABLE, wanted, strict=True) if want]
    leaves = layer.leaves(*names) if names else []
    y = layer(path=path)
    assert y.requires_grad == bool(names)
    if not names:
        return
    y.square().sum().backward()
    exact = torch.autograd.grad(layer.exact().square().sum(), leaves)
    for leaf, want in zip(leaves, exact, strict=True):
        close(leaf.grad, want)
    assert all(getattr(layer, name).grad is None for name in TRAINABLE if name not in names)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_needed_is_not_computed(path, monkeypatch):
    """A frozen input costs no gradient: the op is told, and for the bias alone it is not called at all."""
    asked = []
    real = fk.ops.sparse_core.sparse_core_backward
    monkeypatch.setattr(fk.ops.sparse_core, "sparse_core_backward", lambda *a: asked.append(list(a[7])) or real(*a))
    for names in (("lam",), ("values",), ("x",), ("lam", "values"), ("bias",)):
        asked.clear()
        layer = make_layer(7, 9, 5)
        layer.leaves(*names)
        layer(path=path).sum().backward()
        dz = path == "activation" and "x" in names
        need = [dz, "lam" in names, "values" in names]
        assert asked == ([need] if any(need) else [])


@pytest.mark.parametrize("path", PATHS)
def test_no_graph_without_gradients(path):
    layer = make_layer(7, 9, 5)
    layer.leaves()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = layer(path=path)
        assert y.grad_fn is None and not y.requires_grad
        torch.testing.assert_close(y.clone(), layer(path=path).detach())


def test_paths_agree():
    for m, n, T in SHAPES:
        layer = make_layer(m, n, T, dtype=torch.float64)
        outputs = [layer(path=path) for path in (*PATHS, "auto")]
        for y in outputs[1:]:
            close(y, outputs[0])


@pytest.mark.parametrize("path", PATHS)
def test_bitwise_repeatable(path):
    for dtype in (torch.float32, torch.bfloat16):
        layer = make_layer(40, 56, 130, dtype=dtype, param_dtype=torch.float32)
        leaves = layer.leaves()
        runs = [(y := layer(path=path), *torch.autograd.grad(y.float().square().sum(), leaves)) for _ in range(3)]
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_cached_between_calls(path):
    """EMA code writes p.data behind autograd's back; a function must see it."""
    layer = make_layer(7, 9, 5, dtype=torch.float64)
    layer(path=path)
    for name in ("lam", "values", "U", "V", "bias"):
        getattr(layer, name).data.mul_(1.5)
        close(layer(path=path), layer.exact())


@pytest.mark.parametrize("path", PATHS)
def test_arguments_are_left_alone(path):
    layer = make_layer(7, 9, 5)
    leaves = [t.clone() for t in (layer.x, layer.U, layer.V, layer.lam, layer.values, layer.bias)]
    layer.leaves()
    layer(path=path).sum().backward()
    now = (layer.x, layer.U, layer.V, layer.lam, layer.values, layer.bias)
    assert all(torch.equal(a, b) for a, b in zip(leaves, now, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_differentiating_twice_is_refused(path):
    layer = make_layer(7, 9, 5)
    layer.leaves()
    with pytest.raises(RuntimeError, match="differentiable once"):  # not a silent None from grad(inputs=...) later
        torch.autograd.grad(layer(path=path).square().sum(), layer.x, create_graph=True)


def test_dtypes_of_factors_and_bias_follow_x():
    """A float32 basis beside a 16-bit x is cast, as a linear layer under autocast casts its weight."""
    layer = make_layer(7, 9, 5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.leaves("lam", "values", "bias")
        y = layer(layer.x.to(dtype))
        assert y.dtype == dtype
        y.sum().backward()
        assert [t.grad.dtype for t in (layer.lam, layer.values, layer.bias)] == [torch.float32] * 3


class FloatGradient(torch.autograd.Function):
    """The identity, whose gradient is float32 whatever flowed forward, as FSDP2 may send it."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g.float()


@pytest.mark.parametrize("path", PATHS)
def test_a_wider_gradient_is_taken(path):
    layer = make_layer(7, 9, 5, dtype=torch.bfloat16, param_dtype=torch.float32)
    leaves = layer.leaves()
    y = layer(path=path)
    want = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    got = torch.autograd.grad(FloatGradient.apply(y).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
