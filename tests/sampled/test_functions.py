# SPDX-License-Identifier: Apache-2.0
"""``fk.sampled_product``: what it means, its gradients, its choice of a way, tracing, and bad arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import frodkernels as fk
from frodkernels.ops import sampled_way
from tests.support import KINDS, coo, make_case

F64 = torch.float64


@pytest.fixture(params=["native", "reference"])
def backend(request):
    with fk.backend(request.param):
        yield request.param


def make(kind, m, n, seed=0):
    rows, cols = coo(kind, m, n, seed)
    return rows, cols, fk.SparsePattern(rows, cols, (m, n))


@settings(max_examples=60)
@given(st.data())
def test_the_definition(data):
    m, n, T = (data.draw(st.integers(0 if k == 2 else 1, 40)) for k in range(3))
    rows, cols, pattern = make(data.draw(st.sampled_from(KINDS)), m, n)
    a, b = torch.randn(T, m, dtype=F64), torch.randn(T, n, dtype=F64)
    for name in ("native", "reference"):
        with fk.backend(name):
            torch.testing.assert_close(fk.sampled_product(a, b, pattern), (a.t() @ b)[rows, cols])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(backend, kind):
    _, _, pattern = make(kind, 5, 7)
    a, b = (torch.randn(4, k, dtype=F64, requires_grad=True) for k in (5, 7))
    assert torch.autograd.gradcheck(lambda a, b: fk.sampled_product(a, b, pattern), (a, b))
    for a_only, b_only in ((a, b.detach()), (a.detach(), b)):
        assert torch.autograd.gradcheck(lambda a, b: fk.sampled_product(a, b, pattern), (a_only, b_only))


def test_leading_dimensions_and_dtypes(backend):
    rows, cols, pattern = make("random", 6, 9)
    a, b = torch.randn(2, 3, 6), torch.randn(2, 3, 9)
    got = fk.sampled_product(a, b, pattern)
    torch.testing.assert_close(got, (a.flatten(0, 1).t() @ b.flatten(0, 1))[rows, cols])
    assert fk.sampled_product(a.bfloat16(), b, pattern).dtype == torch.float32  # the wider of the two
    assert fk.sampled_product(a.bfloat16(), b.bfloat16(), pattern).dtype == torch.bfloat16
    x = a.bfloat16().requires_grad_()
    fk.sampled_product(x, b, pattern).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.shape == x.shape


def test_second_derivatives_are_refused():
    _, _, pattern = make("random", 5, 7)
    a, b = (torch.randn(4, k, dtype=F64, requires_grad=True) for k in (5, 7))
    out = fk.sampled_product(a, b, pattern)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), a, create_graph=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_without_recompiling(dynamic):
    _, _, pattern = make("random", 12, 17)
    torch._dynamo.reset()

    def loss(a, b):
        return fk.sampled_product(a, b, pattern).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (3, 8, 8) if dynamic else (8, 8):
        a, b = (torch.randn(T, k, dtype=F64, requires_grad=True) for k in (12, 17))
        with torch._dynamo.config.patch(error_on_recompile=dynamic):
            got = torch.autograd.grad(compiled(a, b), (a, b))
        for one, other in zip(got, torch.autograd.grad(loss(a, b), (a, b)), strict=True):
            torch.testing.assert_close(one, other)


# ---- the choice of a way ---------------------------------------------------------------------------------------------


def ways(monkeypatch):
    """What the native op is asked for from here on."""
    seen, real = [], fk.ops.sampled._backends.implementation

    def spy(op, device):
        name, run = real(op, device)
        if op != "sampled_product":
            return name, run
        return name, lambda *args: (seen.append(args[6]), run(*args))[1]

    monkeypatch.setattr(fk.ops.sampled._backends, "implementation", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense_patterns_go_by_blocks_and_sparse_ones_by_entries(monkeypatch, dtype):
    seen = ways(monkeypatch)
    a, b = torch.randn(80, 40).to(dtype), torch.randn(80, 50).to(dtype)
    for kind in ("one", "random", "dense"):
        rows, cols, pattern = make(kind, 40, 50)
        fk.sampled_product(a, b, pattern)
    assert seen == [False, False, True]
    fk.sampled_product(a[:8], b[:8], pattern)  # few tokens
    assert seen[-1] is False


def test_frods_gradients_go_by_blocks_too(monkeypatch):
    """A pattern dense enough: the pass that makes dz leaves the entries to the blocks, with the same result."""
    case = make_case(40, 40, 90, "dense", F64, F64)
    want = fk.ops.sparse_core.sparse_core_backward(*case.backward, [True] * 3)
    exact = case.exact_backward()
    seen = ways(monkeypatch)
    got = fk.ops.sparse_core.sparse_core_backward(*case.backward, [True] * 3)
    assert seen == [True]
    for one, other, right in zip(got, want, exact, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, right)
    x = torch.randn(90, 40, dtype=F64)
    U, V = torch.randn(70, 40, dtype=F64), torch.randn(40, 40, dtype=F64)  # the rows of U are materialize's tokens
    values = case.values.clone().requires_grad_()
    for path in ("activation", "fold", "materialize"):
        y = fk.frod_linear(x, U, V, case.lam, values, case.pattern, path=path)
        (grad,) = torch.autograd.grad(y.square().sum(), values)
        dense = torch.zeros(40, 40, dtype=F64).index_put((case.rows, case.cols), values) + torch.diag(case.lam)
        (plain,) = torch.autograd.grad((x @ V @ dense.t() @ U.t()).square().sum(), values)
        torch.testing.assert_close(grad, plain)
    assert len(seen) == 3 + 1 and all(seen)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_has_a_break_even(isa):
    assert all(0 < density < 1 for density in sampled_way.BREAK_EVEN[isa].values())
    assert set(sampled_way.BREAK_EVEN[isa]) == {torch.float32, F64, torch.bfloat16, torch.float16}


# ---- misuse ----------------------------------------------------------------------------------------------------------


def bad_calls():
    _, _, pattern = make("random", 6, 8)
    a, b = torch.randn(3, 6), torch.randn(3, 8)
    yield "a", (a.tolist(), b, pattern)
    yield "a", (a.int(), b, pattern)
    yield "a", (a[:, :-1], b, pattern)
    yield "a", (torch.tensor(1.0), b, pattern)
    yield "a", (a.to_sparse(), b, pattern)
    yield "b", (a, b[:, :-1], pattern)
    yield "b", (a, b.to("meta"), pattern)
    yield "b", (a, None, pattern)
    yield "a and b", (a, b[:2], pattern)
    yield "a and b", (a[None], b, pattern)
    yield "pattern", (a, b, pattern.coo())


@pytest.mark.parametrize("name, arguments", list(bad_calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments_are_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} "):
        fk.sampled_product(*arguments)
