# SPDX-License-Identifier: Apache-2.0
"""``fk.sparse_delta_linear``: the map, its gradients, precision, what it keeps, tracing, bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import frodkernels as fk
from frodkernels.functional.sparse_delta import sparse_delta
from tests.support import KINDS, LAYOUTS, assert_no_worse_than_torch, coo

F64 = torch.float64


@pytest.fixture(params=["native", "reference"])
def backend(request):
    with fk.backend(request.param):
        yield request.param


def make(kind, m, n, dtype=F64, values_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows, cols = coo(kind, m, n, seed)
    pattern = fk.SparsePattern(rows, cols, (m, n))
    weight, bias = torch.randn(m, n, generator=g, dtype=F64).to(dtype), torch.randn(m, generator=g, dtype=F64).to(dtype)
    values = torch.randn(pattern.nnz, generator=g, dtype=F64).to(values_dtype or dtype)
    return weight, bias, values, pattern


def plain(x, weight, values, pattern, bias=None, scale=1.0):
    """The definition: the weight with S added to it, as a matrix of its own."""
    changed = weight.index_put(pattern.coo(), scale * values.to(weight.dtype), accumulate=True)
    return F.linear(x, changed, bias)


@settings(max_examples=60)
@given(st.data())
def test_the_definition(data):
    m, n, T = (data.draw(st.integers(1, 40)) for _ in range(3))
    weight, bias, values, pattern = make(data.draw(st.sampled_from(KINDS)), m, n, seed=data.draw(st.integers(0, 9)))
    scale, x = data.draw(st.floats(-3, 3)), torch.randn(T, n, dtype=F64)
    for name in ("native", "reference"):
        with fk.backend(name):
            got = fk.sparse_delta_linear(x, weight, values, pattern, bias, scale=scale)
            torch.testing.assert_close(got, plain(x, weight, values, pattern, bias, scale))
            torch.testing.assert_close(sparse_delta(x, values, pattern, scale=scale) + F.linear(x, weight, bias), got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_gradients(backend, kind, scale):
    weight, bias, values, pattern = make(kind, 5, 7)
    x = torch.randn(4, 7, dtype=F64)
    everything = [t.requires_grad_() for t in (x, weight, values, bias)]

    def f(x, weight, values, bias):
        return fk.sparse_delta_linear(x, weight, values, pattern, bias, scale=scale)

    assert torch.autograd.gradcheck(f, everything)
    assert torch.autograd.gradcheck(lambda x, v: sparse_delta(x, v, pattern, scale=scale), (x, values))
    out = f(*everything).square().sum()
    want = torch.autograd.grad(out, everything)
    for k in range(4):  # each alone
        only = [t.detach() if i != k else t for i, t in enumerate(everything)]
        (got,) = torch.autograd.grad(f(*only).square().sum(), only[k])
        torch.testing.assert_close(got, want[k])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(backend, layout):
    weight, bias, values, pattern = make("random", 30, 20, torch.float32)
    x = LAYOUTS[layout](torch.randn(20, 33)).t().requires_grad_()
    got = fk.sparse_delta_linear(x, weight, values, pattern, bias)
    g = LAYOUTS[layout](torch.randn(30, 33)).t()
    want = plain(x, weight, values, pattern, bias)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for one, other in zip(torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_gradients_that_are_expanded(backend):
    """What ``loss.sum()`` sends back: strides of zero."""
    weight, bias, values, pattern = make("random", 30, 20)
    x = torch.randn(2, 3, 20, dtype=F64, requires_grad=True)
    values.requires_grad_()
    got = torch.autograd.grad(fk.sparse_delta_linear(x, weight, values, pattern, bias).sum(), (x, values))
    want = torch.autograd.grad(plain(x, weight, values, pattern, bias).sum(), (x, values))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


MIXED = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, F64),
]


@pytest.mark.parametrize("dtype, values_dtype", MIXED, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_no_less_precise_than_a_changed_weight(backend, dtype, values_dtype, scale):
    weight, bias, values, pattern = make("random", 150, 200, dtype, values_dtype)
    x, g = torch.randn(300, 200).to(dtype).requires_grad_(), torch.randn(300, 150).to(dtype)
    values.requires_grad_()
    got = fk.sparse_delta_linear(x, weight, values, pattern, bias, scale=scale)
    want = plain(x, weight, values, pattern, bias, scale)
    wide = [t.detach().double().requires_grad_() for t in (x, values)]
    exact = plain(wide[0], weight.double(), wide[1], pattern, bias.double(), scale)
    assert_no_worse_than_torch(got.detach(), exact.detach(), want.detach())
    grads = [torch.autograd.grad(y, inputs, g.to(y.dtype)) for y, inputs in ((got, (x, values)), (want, (x, values)))]
    for one, other, right in zip(*grads, torch.autograd.grad(exact, wide, g.double()), strict=True):
        assert_no_worse_than_torch(one, right, other)


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_narrower_than_the_input(backend, values_dtype):
    weight, bias, values, pattern = make("random", 15, 20, F64, values_dtype)
    x = torch.randn(30, 20, dtype=F64)
    got = fk.sparse_delta_linear(x, weight, values.requires_grad_(), pattern, bias, scale=0.3)
    torch.testing.assert_close(got, plain(x, weight, values, pattern, bias, 0.3))
    (grad,) = torch.autograd.grad(got.sum(), values)
    assert grad.dtype == values_dtype


def test_autocast():
    weight, bias, values, pattern = make("random", 30, 20, torch.float32)
    x = torch.randn(9, 20, requires_grad=True)
    values.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fk.sparse_delta_linear(x, weight, values, pattern, bias)
    assert y.dtype == torch.bfloat16
    dx, dvalues = torch.autograd.grad(y.sum(), (x, values))
    assert dx.dtype == torch.float32 and dvalues.dtype == torch.float32
    torch.testing.assert_close(y.float(), plain(x, weight, values, pattern, bias), rtol=0.05, atol=0.1)


def test_what_is_kept_for_the_backward():
    """x and tensors that live anyway: no copy of W, nothing dense."""
    weight, bias, values, pattern = make("random", 60, 50, torch.float32)
    x = torch.randn(40, 50, requires_grad=True)
    live = {t.untyped_storage().data_ptr() for t in (x, weight, bias, values, *pattern.csr, *pattern.csc)}
    values.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fk.sparse_delta_linear(x, weight, values, pattern, bias)
    assert kept and all(t.untyped_storage().data_ptr() in live for t in kept)


def test_the_weight_is_not_touched(backend):
    weight, bias, values, pattern = make("random", 60, 50, torch.float32)
    before, version = weight.clone(), weight._version
    x = torch.randn(40, 50, requires_grad=True)
    fk.sparse_delta_linear(x, weight, values.requires_grad_(), pattern, bias).sum().backward()
    assert torch.equal(weight, before) and weight._version == version


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_without_recompiling(dynamic):
    weight, bias, values, pattern = make("random", 12, 17)
    torch._dynamo.reset()

    def loss(x, v):
        return fk.sparse_delta_linear(x, weight, v, pattern, bias, scale=0.5).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    values.requires_grad_()
    for T in (3, 8, 9) if dynamic else (8, 8):
        x = torch.randn(T, 17, dtype=F64, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=dynamic):
            got = torch.autograd.grad(compiled(x, values), (x, values))
        for one, other in zip(got, torch.autograd.grad(loss(x, values), (x, values)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("function", ["sparse_delta", "sparse_delta_linear"])
def test_results_may_be_changed_in_place(function):
    weight, bias, values, pattern = make("random", 12, 17)
    x = torch.randn(6, 17, dtype=F64, requires_grad=True)

    def result():
        return (
            sparse_delta(x, values, pattern)
            if function == "sparse_delta"
            else fk.sparse_delta_linear(x, weight, values, pattern)
        )

    (want,) = torch.autograd.grad((3 * result()).relu().sum(), x)
    y = result()
    y *= 3
    y[..., :0] = 0
    (got,) = torch.autograd.grad(y.relu_().sum(), x)
    torch.testing.assert_close(got, want)


def test_checkpointing_gives_the_same_gradients():
    weight, bias, values, pattern = make("random", 12, 17)
    x = torch.randn(6, 17, dtype=F64, requires_grad=True)
    values.requires_grad_()

    def f(x):
        return fk.sparse_delta_linear(x, weight, values, pattern, bias).tanh()

    want = torch.autograd.grad(f(x).sum(), (x, values))
    again = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(again.sum(), (x, values)), want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("T", [0, 1])
def test_few_tokens_and_no_entries(backend, T):
    for kind in ("empty", "random"):
        weight, bias, values, pattern = make(kind, 6, 8)
        x = torch.randn(T, 8, dtype=F64, requires_grad=True)
        y = fk.sparse_delta_linear(x, weight, values.requires_grad_(), pattern, bias)
        torch.testing.assert_close(y, plain(x, weight, values, pattern, bias))
        dx, dvalues = torch.autograd.grad(y.sum(), (x, values))
        assert dx.shape == x.shape and dvalues.shape == values.shape


def bad_calls():
    weight, bias, values, pattern = make("random", 6, 8, torch.float32)
    x = torch.randn(3, 8)
    good = dict(x=x, weight=weight, values=values, pattern=pattern, bias=bias, scale=1.0)
    yield "x", dict(good, x=x[:, :-1])
    yield "x", dict(good, x=x.int())
    yield "x", dict(good, x=torch.tensor(1.0))
    yield "weight", dict(good, weight=weight.t())
    yield "weight", dict(good, weight=weight.to("meta"))
    yield "values", dict(good, values=values[:-1])
    yield "values", dict(good, values=values[None])
    yield "values", dict(good, values=values.to("meta"))
    yield "pattern", dict(good, pattern=None)
    yield "bias", dict(good, bias=bias[:-1])
    yield "bias", dict(good, bias=bias.to("meta"))
    yield "scale", dict(good, scale=None)
    yield "scale", dict(good, scale=False)


@pytest.mark.parametrize("name, arguments", list(bad_calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} "):
        fk.sparse_delta_linear(**arguments)
