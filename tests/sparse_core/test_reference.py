# SPDX-License-Identifier: Apache-2.0
"""The definition against a dense formula written down independently here."""

import pytest
import torch

from frodkernels.reference import sparse_core as reference
from tests.support import DTYPE_IDS, DTYPES, KINDS, LAYOUTS, make_case

ALL = [True, True, True]
SHAPES = [(1, 1, 1), (5, 5, 0), (7, 7, 3), (12, 12, 33), (9, 4, 5), (4, 9, 5), (3, 3, 64)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m, n, T", SHAPES)
def test_forward_transpose_and_backward_are_the_dense_formula(m, n, T, kind):
    for lam in {m == n, False}:
        case = make_case(m, n, T, kind, torch.float64, torch.float64, lam=lam)
        torch.testing.assert_close(reference.sparse_core(*case.forward), case.exact_forward())
        torch.testing.assert_close(reference.sparse_core(*case.transpose), case.exact_transpose())
        got = reference.sparse_core_backward(*case.backward, ALL)
        torch.testing.assert_close(got, case.exact_backward())


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    case = make_case(5, 5, 3, kind, torch.float64, torch.float64)
    leaves = [t.requires_grad_() for t in (case.z, case.lam, case.values)]
    assert torch.autograd.gradcheck(lambda z, lam, v: reference.sparse_core(z, lam, v, *case.pattern.csr), leaves)


def test_backward_is_the_gradient_of_the_forward():
    case = make_case(11, 11, 6, "gaps", torch.float64, torch.float64)
    leaves = [t.requires_grad_() for t in (case.z, case.lam, case.values)]
    want = torch.autograd.grad(reference.sparse_core(*case.forward), leaves, case.u)
    with torch.no_grad():
        got = reference.sparse_core_backward(*case.backward, ALL)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("needs", [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_what_is_not_needed_is_empty(needs):
    case = make_case(6, 6, 4, dtype=torch.bfloat16)
    got = reference.sparse_core_backward(*case.backward, [bool(need) for need in needs])
    everything = reference.sparse_core_backward(*case.backward, ALL)
    for need, part, whole in zip(needs, got, everything, strict=True):
        assert part.dtype == whole.dtype
        assert torch.equal(part, whole) if need else part.shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("token_major", [False, True])
def test_layouts(layout, token_major):
    case = make_case(8, 8, 5, dtype=torch.float64, param_dtype=torch.float64).laid_out(layout)
    out = reference.sparse_core(*case.forward, token_major)
    dz, *_ = reference.sparse_core_backward(*case.backward, ALL, token_major)
    torch.testing.assert_close(out, case.exact_forward())
    torch.testing.assert_close(dz, case.exact_transpose())
    for features in (out, dz):
        assert (features.t() if token_major else features).is_contiguous()


@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_rounds_once_from_a_wide_sum(dtype, param_dtype):
    case = make_case(40, 40, 7, "dense", dtype, param_dtype)
    acc = torch.float64 if torch.float64 in (dtype, param_dtype) else torch.float32
    got = reference.sparse_core(*case.forward)
    assert got.dtype == dtype
    # Half an ulp of the result for the one rounding, plus what a float32 sum of 41 products loses.
    scale = case.matrix().abs() @ case.z.double().abs()
    bound = 0.5 * torch.finfo(dtype).eps * case.exact_forward().abs() + 41 * torch.finfo(acc).eps * scale
    assert ((got.double() - case.exact_forward()).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_travel_along_entries_only(bad):
    case = make_case(9, 9, 4, "gaps", torch.float64, torch.float64)
    case.z[2, 1] = bad
    out = reference.sparse_core(*case.forward)
    reached = torch.zeros(9, 4, dtype=torch.bool)
    reached[case.rows[case.cols == 2], 1] = True
    reached[2, 1] = True  # along the diagonal
    assert torch.equal(~out.isfinite(), reached)


def test_a_large_product_is_worked_in_chunks(monkeypatch):
    case = make_case(8, 8, 29, dtype=torch.float64, param_dtype=torch.float64)
    monkeypatch.setattr(reference, "_CHUNK", 2 * case.values.numel())  # two tokens at a time
    torch.testing.assert_close(reference.sparse_core(*case.forward), case.exact_forward())
    torch.testing.assert_close(reference.sparse_core_backward(*case.backward, ALL), case.exact_backward())
