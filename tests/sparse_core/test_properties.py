# SPDX-License-Identifier: Apache-2.0
"""Algebra that must hold for every pattern, size and layout, on every backend the CPU has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import frodkernels as fk
from tests.support import KINDS, LAYOUTS, Case, make_case

ALL = [True, True, True]
ops = fk.ops.sparse_core
F64 = torch.float64


@pytest.fixture(params=["native", "reference"], autouse=True)
def backend(request):
    with fk.backend(request.param):
        yield


@st.composite
def cases(draw, square=None):
    """A float64 case: what is wrong then is the algebra and not the rounding."""
    m = draw(st.integers(1, 40))
    n = m if square or (square is None and draw(st.booleans())) else draw(st.integers(1, 40))
    T = draw(st.integers(0, 70))
    kind, layout = draw(st.sampled_from(KINDS)), draw(st.sampled_from(sorted(LAYOUTS)))
    return make_case(m, n, T, kind, F64, F64, seed=draw(st.integers(0, 99))).laid_out(layout)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def product(case: Case, z, values=None):
    return ops.sparse_core(z, case.lam, case.values if values is None else values, *case.pattern.csr)


few = settings(max_examples=40)


@few
@given(cases(), st.floats(-3, 3))
def test_linear_in_the_features(case, a):
    other = torch.randn(case.z.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    close(product(case, a * case.z + other), a * product(case, case.z) + product(case, other))


@few
@given(cases())
def test_linear_in_the_parameters(case):
    lam = None if case.lam is None else 2 * case.lam
    twice = ops.sparse_core(case.z, lam, 2 * case.values, *case.pattern.csr)
    close(twice, 2 * product(case, case.z))


@few
@given(cases(square=True))
def test_zero_entries_leave_the_diagonal(case):
    close(product(case, case.z, torch.zeros_like(case.values)), case.lam[:, None] * case.z)


@few
@given(cases(), st.randoms(use_true_random=False))
def test_tokens_do_not_mix(case, random):
    order = list(range(case.z.shape[1]))
    random.shuffle(order)
    assert torch.equal(product(case, case.z[:, order]), product(case, case.z)[:, order])


@few
@given(cases())
def test_the_transpose_is_the_adjoint(case):
    """<A z, u> = <z, A^T u>"""
    Az, Atu = product(case, case.z), ops.sparse_core(*case.transpose)
    close((Az * case.u).sum(), (case.z * Atu).sum())


@few
@given(cases())
def test_backward_is_the_adjoint_in_every_argument(case):
    """A is linear in z and in (lam, values): <w, u> = <z, dz> = <lam, dlam> + <values, dvalues>."""
    dz, dlam, dvalues = ops.sparse_core_backward(*case.backward, ALL)
    inner = (product(case, case.z) * case.u).sum()
    close((case.z * dz).sum(), inner)
    diagonal = 0 if case.lam is None else (case.lam * dlam).sum()
    close(diagonal + (case.values * dvalues).sum(), inner)


@few
@given(cases())
def test_token_major_is_the_same_numbers(case):
    assert torch.equal(ops.sparse_core(*case.forward, True), ops.sparse_core(*case.forward))
    for wide, narrow in zip(
        ops.sparse_core_backward(*case.backward, ALL, True), ops.sparse_core_backward(*case.backward, ALL), strict=True
    ):
        assert torch.equal(wide, narrow)


@few
@given(cases(square=True), st.randoms(use_true_random=False))
def test_the_order_of_the_entries_is_the_callers_affair(case, random):
    order = list(range(case.values.numel()))
    random.shuffle(order)
    pattern = fk.SparsePattern(case.rows[order], case.cols[order], case.pattern.shape)
    z = case.z.t()
    want = fk.sparse_core(z, case.lam, case.values, case.pattern)
    assert torch.equal(fk.sparse_core(z, case.lam, case.values[order], pattern), want)
    dvalues = ops.sparse_core_backward(*case.backward, ALL)[2]
    args = case.u, case.z, case.lam, case.values[order], *pattern.csc
    assert torch.equal(ops.sparse_core_backward(*args, ALL)[2], dvalues[order])


@few
@given(cases())
def test_twice_is_bitwise_the_same(case):
    for first, again in zip(
        ops.sparse_core_backward(*case.backward, ALL), ops.sparse_core_backward(*case.backward, ALL), strict=True
    ):
        assert torch.equal(first, again)
