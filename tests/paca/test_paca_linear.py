# SPDX-License-Identifier: Apache-2.0
"""``fk.paca_linear``: the map, its gradients, precision, what it keeps, tracing, bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import frodkernels as fk
from frodkernels.functional.paca import adapted
from tests.support import LAYOUTS, assert_no_worse_than_torch

F64 = torch.float64


def make(m, n, k, dtype=F64, columns_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight, bias, columns = (torch.randn(*s, generator=g, dtype=F64).to(dtype) for s in ((m, n), (m,), (m, k)))
    return weight, bias, torch.randperm(n, generator=g)[:k], columns.to(columns_dtype or dtype)


def plain(x, weight, columns, column_weight, bias=None):
    """The definition: a weight of its own with the columns replaced."""
    return F.linear(x, weight.index_copy(1, columns.long(), column_weight.to(weight.dtype)), bias)


@settings(max_examples=40)
@given(st.data())
def test_the_definition(data):
    m, n, T = (data.draw(st.integers(1, 30)) for _ in range(3))
    weight, bias, columns, column_weight = make(m, n, data.draw(st.integers(0, n)), seed=data.draw(st.integers(0, 9)))
    x = torch.randn(T, n, dtype=F64)
    want = plain(x, weight, columns, column_weight, bias)
    torch.testing.assert_close(fk.paca_linear(x, weight, columns, column_weight, bias), want)
    placed = weight.index_copy(1, columns, column_weight)
    torch.testing.assert_close(adapted(x, placed, columns, column_weight, bias, placed=True), want)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_gradients(k, placed):
    weight, bias, columns, column_weight = make(5, 7, k)
    x = torch.randn(4, 7, dtype=F64)
    everything = [t.requires_grad_() for t in (x, column_weight, bias)]

    def f(x, column_weight, bias):
        W = weight.index_copy(1, columns, column_weight.detach()) if placed else weight
        return adapted(x, W, columns, column_weight, bias, placed=placed)

    got = torch.autograd.grad(f(*everything).square().sum(), everything)
    want = torch.autograd.grad(plain(x, weight, columns, column_weight, bias).square().sum(), everything)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    if not placed:
        assert torch.autograd.gradcheck(f, everything)
    for i in range(3):  # each alone
        only = [t.detach() if j != i else t for j, t in enumerate(everything)]
        (alone,) = torch.autograd.grad(f(*only).square().sum(), only[i])
        torch.testing.assert_close(alone, want[i])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    weight, bias, columns, column_weight = make(30, 20, 4, torch.float32)
    x = LAYOUTS[layout](torch.randn(20, 33)).t().requires_grad_()
    g = LAYOUTS[layout](torch.randn(30, 33)).t()
    column_weight.requires_grad_()
    got, want = (f(x, weight, columns, column_weight, bias) for f in (fk.paca_linear, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(y, (x, column_weight), g) for y in (got, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dtype, columns_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("placed", [False, True])
def test_no_less_precise_than_a_changed_weight(dtype, columns_dtype, placed):
    weight, bias, columns, column_weight = make(150, 200, 16, dtype, columns_dtype)
    x, g = torch.randn(300, 200).to(dtype).requires_grad_(), torch.randn(300, 150).to(dtype)
    column_weight.requires_grad_()
    W = weight.index_copy(1, columns, column_weight.detach().to(dtype)) if placed else weight
    got = adapted(x, W, columns, column_weight, bias, placed=placed)
    want = plain(x, weight, columns, column_weight, bias)
    wide = [t.detach().double().requires_grad_() for t in (x, column_weight)]
    exact = plain(wide[0], weight.double(), columns, wide[1], bias.double())
    assert_no_worse_than_torch(got.detach(), exact.detach(), want.detach())
    grads = [torch.autograd.grad(y, inputs, g) for y, inputs in ((got, (x, column_weight)), (want, (x, column_weight)))]
    for one, other, right in zip(*grads, torch.autograd.grad(exact, wide, g.double()), strict=True):
        assert_no_worse_than_torch(one, right, other)


@pytest.mark.parametrize("k", [1, 8])
def test_columns_far_larger_than_the_others(k):
    """The gradient of x is then made of k columns alone, and must be summed as well as the whole product is."""
    weight, bias, columns, column_weight = make(2048, 64, k, torch.float32)
    column_weight *= 1000
    x, g = torch.randn(128, 64, requires_grad=True), torch.randn(128, 2048)
    (got,) = torch.autograd.grad(fk.paca_linear(x, weight, columns, column_weight, bias), x, g)
    (want,) = torch.autograd.grad(plain(x, weight, columns, column_weight, bias), x, g)
    exact = g.double() @ weight.double().index_copy(1, columns, column_weight.double())
    assert_no_worse_than_torch(got, exact, want)


@pytest.mark.parametrize("dtype, narrow", [(torch.float32, torch.bfloat16), (F64, torch.float32)], ids=str)
def test_weights_narrower_than_the_input(dtype, narrow):
    weight, bias, columns, column_weight = make(40, 60, 12, narrow)
    x = torch.randn(30, 60, dtype=dtype)
    got = fk.paca_linear(x, weight, columns, column_weight, bias)
    torch.testing.assert_close(got, plain(x, weight.to(dtype), columns, column_weight, bias.to(dtype)))


def test_what_is_kept_for_the_backward():
    """k numbers a token, and tensors that live anyway."""
    weight, bias, columns, column_weight = make(60, 50, 6, torch.float32)
    x = torch.randn(40, 50, requires_grad=True)
    live = {t.untyped_storage().data_ptr() for t in (weight, bias, columns, column_weight)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fk.paca_linear(x, weight, columns, column_weight.requires_grad_(), bias)
    new = [t for t in kept if t.untyped_storage().data_ptr() not in live]
    assert [t.shape for t in new] == [(40, 6)] and new[0].untyped_storage().nbytes() == 40 * 6 * 4


def test_autocast_and_integer_types():
    weight, bias, columns, column_weight = make(30, 20, 4, torch.float32)
    x = torch.randn(9, 20, requires_grad=True)
    for integers in (torch.int32, torch.uint8, torch.int64):
        with torch.autocast("cpu", torch.bfloat16):
            y = fk.paca_linear(x, weight, columns.to(integers), column_weight, bias)
        assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_without_recompiling(dynamic):
    weight, bias, columns, column_weight = make(12, 17, 3)
    torch._dynamo.reset()

    def loss(x, c):
        return fk.paca_linear(x, weight, columns, c, bias).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    column_weight.requires_grad_()
    for T in (5, 8, 9) if dynamic else (8, 8):
        x = torch.randn(T, 17, dtype=F64, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=dynamic):
            got = torch.autograd.grad(compiled(x, column_weight), (x, column_weight))
        for one, other in zip(got, torch.autograd.grad(loss(x, column_weight), (x, column_weight)), strict=True):
            torch.testing.assert_close(one, other)


def bad_calls():
    weight, bias, columns, column_weight = make(6, 8, 3, torch.float32)
    x = torch.randn(4, 8)
    good = dict(x=x, weight=weight, columns=columns, column_weight=column_weight, bias=bias)
    yield "x", dict(good, x=x.int())
    yield "weight", dict(good, x=x[:, :-1])
    yield "weight", dict(good, weight=weight[0])
    yield "weight", dict(good, weight=weight.to("meta"))
    yield "columns", dict(good, columns=[0, 1, 2])
    yield "columns", dict(good, columns=columns.float())
    yield "columns", dict(good, columns=columns[None])
    yield "columns", dict(good, columns=torch.tensor([True, False, True]))
    yield r"columns\[1\] = 8 is out of range", dict(good, columns=torch.tensor([0, 8, 2]))
    yield r"columns\[2\] = -1 is out of range", dict(good, columns=torch.tensor([0, 1, -1]))
    yield r"columns\[\d\] = 5 is there twice", dict(good, columns=torch.tensor([5, 1, 5]))
    yield "column_weight", dict(good, column_weight=column_weight.t())
    yield "column_weight", dict(good, column_weight=column_weight.int())
    yield "bias", dict(good, bias=bias[:-1])


@pytest.mark.parametrize("message, arguments", list(bad_calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments_are_named(message, arguments):
    with pytest.raises(ValueError, match=f"^{message}"):
        fk.paca_linear(**arguments)


def test_a_weight_that_requires_grad_is_refused():
    weight, bias, columns, column_weight = make(6, 8, 3, torch.float32)
    with pytest.raises(NotImplementedError, match="^weight requires grad"):
        fk.paca_linear(torch.randn(4, 8), weight.requires_grad_(), columns, column_weight, bias)
