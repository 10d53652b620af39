# SPDX-License-Identifier: Apache-2.0
"""The definition: a product of reflections; and the three tall-skinny products against formulas written down here."""

import pytest
import torch

from frodkernels.reference import householder as reference
from tests.householder.cases import F64, close, make_chain, make_operands
from tests.support import DTYPE_IDS, DTYPES, LAYOUTS

SHAPES = [(1, 1, 1), (5, 7, 3), (0, 6, 2), (4, 0, 2), (3, 6, 0), (33, 12, 12), (6, 5, 9), (64, 40, 1)]  # T, n, r
ACCUMULATORS = [
    (dtype, acc) for dtype in (torch.float32, torch.bfloat16, torch.float16) for acc in (torch.float32, F64)
] + [(F64, F64)]


def matrix(u, **options):
    return reference.reflect(torch.eye(u.shape[0], dtype=u.dtype), u, **options)


def reflection(u):
    """I - 2 u u^T / |u|^2, by elements."""
    n = u.numel()
    rows = [[float(i == j) - 2 * float(u[i]) * float(u[j]) / float(u @ u) for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("r", [1, 2, 3, 7, 12])
def test_a_chain_is_the_product_of_its_reflections(r):
    u = make_chain(7, r).u
    product = torch.eye(7, dtype=F64)
    for column in u.unbind(1):
        product = product @ reflection(column)
    close(matrix(u), product)
    close(matrix(u, transpose=True), product.t())


@pytest.mark.parametrize("r", [1, 2, 5, 9])
def test_chains_are_orthogonal(r):
    u = make_chain(6, r).u
    H = matrix(u)
    close(H @ H.t(), torch.eye(6, dtype=F64))
    assert float(torch.linalg.det(H)) == pytest.approx((-1) ** r)


def test_one_reflection_undoes_itself_and_turns_its_direction_round():
    x, u = (lambda c: (c.x, c.u))(make_chain(9, 1, 4))
    close(reference.reflect(reference.reflect(x, u), u), x)
    close(reference.reflect(u.t(), u), -u.t())
    across = x - (x @ u) @ u.t() / (u.t() @ u)
    close(reference.reflect(across, u), across)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_gradcheck(transpose, orthogonalize):
    leaves = make_chain(4, 3, 2, 2).leaves()

    def f(x, u):
        return reference.reflect(x, u, transpose, orthogonalize)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("n, r", [(1, 1), (6, 1), (6, 4), (6, 6)])
def test_gram_schmidt_spans_column_by_column(n, r):
    u = make_chain(n, r).u
    q = reference.gram_schmidt(u)
    close(q.t() @ q, torch.eye(r, dtype=F64))
    R = q.t() @ u
    close(q @ R, u)
    close(R, torch.triu(R))
    assert (R.diagonal() > 0).all()
    close(matrix(u, orthogonalize=True), torch.eye(n, dtype=F64) - 2 * u @ torch.linalg.inv(u.t() @ u) @ u.t())


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_a_zero_column_is_no_reflection(orthogonalize):
    chain = make_chain(5, 3, 4)
    chain.u[:, 1] = 0
    assert chain.exact(orthogonalize=orthogonalize).isnan().all()


# ---- the products ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, n, r", SHAPES)
@pytest.mark.parametrize("m", [None, 1, 9])
def test_products(T, n, r, m):
    case = make_operands(T, n, r, m)
    out, c = reference.householder(*case.forward)
    close((out, c), case.exact_forward())
    none, alone = reference.householder(case.x, case.left, None)
    assert none.shape == (0,) and none.dtype == case.x.dtype and torch.equal(alone, c)
    close(reference.householder_backward(*case.backward, [True, True]), case.exact_backward())
    close(reference.householder_gradient(*case.gradient), case.x.t() @ case.coefficients)


@pytest.mark.parametrize("needs", [[a, b] for a in (False, True) for b in (False, True)], ids=str)
@pytest.mark.parametrize("m", [None, 9])
def test_what_is_not_needed_is_empty(needs, m):
    case = make_operands(6, 5, 3, m, torch.bfloat16)
    whole = reference.householder_backward(*case.backward, [True, True])
    parts = reference.householder_backward(*case.backward, needs)
    for part, full, need in zip(parts, whole, (needs[0], True, needs[1], needs[1]), strict=True):
        assert part.dtype == full.dtype
        assert torch.equal(part, full) if need else part.shape == (0,)


@pytest.mark.parametrize("dtype, acc", ACCUMULATORS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("m", [None, 60])
def test_rounds_once_from_a_wide_sum(dtype, acc, m):
    case = make_operands(30, 70, 11, m, dtype, acc)
    out, c = reference.householder(*case.forward)
    exact_out, exact_c = case.exact_forward()
    assert (out.dtype, c.dtype) == (dtype, acc)
    # half an ulp of the result for the one rounding, plus what two sums of 70 and 12 products lose on the way
    size = case.x.double().abs() @ case.left.double().abs()
    base = (case.x if m is None else case.base_out).double().abs()
    scale = base + size @ case.right.double().abs().t()
    lost = 85 * torch.finfo(acc).eps
    assert ((c.double() - exact_c).abs() <= lost * size).all()
    bound = 0.51 * torch.finfo(dtype).eps * exact_out.abs() + lost * scale
    assert ((out.double() - exact_out).abs() <= bound).all()
    dx, q, sum_x, sum_g = reference.householder_backward(*case.backward, [True, True])
    assert [t.dtype for t in (dx, q, sum_x, sum_g)] == [dtype, acc, acc, acc]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    case = make_operands(8, 6, 3)
    case.x, case.g = (LAYOUTS[layout](t.t()).t() for t in (case.x, case.g))
    out = reference.householder(*case.forward)
    back = reference.householder_backward(*case.backward, [True, True])
    close((out, back), (case.exact_forward(), case.exact_backward()))
    assert all(t.is_contiguous() for t in (*out, *back))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_spoils_no_other(bad):
    case = make_operands(7, 6, 3)
    case.x[2, 4] = case.g[2, 1] = bad
    out, c = reference.householder(*case.forward)
    dx, q, *sums = reference.householder_backward(*case.backward, [True, True])
    for per_token in (out, c, dx, q):
        assert torch.equal(per_token.isfinite().all(1), torch.arange(7) != 2)
    assert not sums[0].isfinite().all()


@pytest.mark.parametrize("dtype, other", DTYPES, ids=DTYPE_IDS)
def test_accumulator(dtype, other):
    want = F64 if F64 in (dtype, other) else torch.float32
    assert reference.accumulator(torch.empty(1, dtype=dtype), torch.empty(1, dtype=other)) == want
