# SPDX-License-Identifier: Apache-2.0
"""What is r-sized in a chain: the ops' registration, and the native calls against plain torch and float64."""

import pytest
import torch

from frodkernels.ops import reflections as ops
from frodkernels.reference import reflections as reference
from tests.support import FLOATS, assert_no_worse_than_torch, names

SIZES = [(1, 1), (5, 3), (33, 8), (129, 17), (300, 64), (700, 130)]
either = pytest.mark.parametrize("transpose", [False, True])
kinds = pytest.mark.parametrize("wide", [False, True])


def directions(n: int, r: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Columns of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 4.0 ** torch.randint(-3, 4, (r,), generator=generator)
    return (torch.randn(n, r, generator=generator) * lengths).to(dtype)


@either
@kinds
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("n, r", SIZES)
def test_factors(n, r, dtype, wide, transpose):
    u = directions(n, r, dtype)
    got, plain = ops.reflections(u, wide, transpose), reference.reflections(u, wide, transpose)
    right = reference.reflections(u.double(), True, transpose)
    for ours, torchs, exact in zip(got, plain, right, strict=True):
        assert ours.is_contiguous()
        if ours.dtype == torch.float64:  # there is nothing more exact to compare with: two orders of summation
            torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13 * float(exact.abs().max()))
        else:
            assert_no_worse_than_torch(ours, exact, torchs)
    again = ops.reflections_again(u, got[2], got[3], wide, transpose)
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=False))


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("n, r", SIZES)
def test_gradient(n, r, dtype):
    u = directions(n, r, dtype)
    unit, left, _, norms = ops.reflections(u, False, False)
    a, b = torch.randn(2, 40, r, dtype=unit.dtype)
    arguments = unit, norms, left, a, b
    exact = reference.reflections_gradient(u.double(), *(t.double() for t in arguments))
    got, plain = ops.reflections_gradient(u, *arguments), reference.reflections_gradient(u, *arguments)
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-13 * float(exact.abs().max()))
    else:
        assert_no_worse_than_torch(got, exact, plain)


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_registration(dtype):
    u = directions(20, 6, dtype)
    unit, left, inverse, norms = ops.reflections(u, False, True)
    a, b = torch.randn(2, 9, 6, dtype=unit.dtype)
    torch.library.opcheck(ops.reflections, (u, False, True))
    torch.library.opcheck(ops.reflections_again, (u, inverse, norms, False, True))
    torch.library.opcheck(ops.reflections_gradient, (u, unit, norms, left, a, b))


def test_the_system_makes_the_chain_orthogonal():
    """S + S^T = G: the defining property of S, whatever u."""
    unit, left, inverse, _ = ops.reflections(directions(50, 12, torch.float64), False, False)
    S = torch.linalg.inv(inverse)
    torch.testing.assert_close(S + S.t(), unit.t() @ unit)
    H = torch.eye(50, dtype=torch.float64) - left @ unit.t()
    torch.testing.assert_close(H.t() @ H, torch.eye(50, dtype=torch.float64))


def test_a_zero_column_is_nan():
    u = directions(30, 5, torch.float32)
    u[:, 2] = 0
    unit, left, _, _ = ops.reflections(u, False, False)
    assert unit[:, 2].isnan().all() and left.isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_beyond_the_square_root_of_the_range(scale):
    u = directions(30, 5, torch.float32)
    for ours, one in zip(ops.reflections(u * scale, False, True)[:3], ops.reflections(u, False, True), strict=False):
        torch.testing.assert_close(ours, one, rtol=1e-5, atol=1e-5)


def test_matrix_precision_settings_change_nothing():
    u = directions(200, 16, torch.float32)
    before = ops.reflections(u, False, True)
    torch.set_float32_matmul_precision("medium")
    try:
        assert all(torch.equal(a, b) for a, b in zip(ops.reflections(u, False, True), before, strict=True))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bits_do_not_depend_on_the_threads():
    u = directions(3000, 40, torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(ops.reflections(u, False, False))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_layouts():
    u = directions(60, 7, torch.float32)
    for other in (u.t().contiguous().t(), torch.cat([u, u], 1)[:, :7]):
        pairs = zip(ops.reflections(other, False, False), ops.reflections(u, False, False), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_hostile_calls_are_refused():
    u = directions(20, 6, torch.float32)
    unit, left, inverse, norms = ops.reflections(u, False, True)
    native = torch.ops.frodkernels
    for bad in (
        lambda: native.native_reflections(u[0], False, False),
        lambda: native.native_reflections(u.long(), False, False),
        lambda: native.native_reflections_again(u, inverse[:3], norms, False, False),
        lambda: native.native_reflections_again(u, inverse, norms[:3], False, False),
        lambda: native.native_reflections_again(u, inverse.float(), norms, False, False),
        lambda: native.native_reflections_gradient(u, unit, norms[:2], left, unit, unit),
        lambda: native.native_reflections_gradient(u, unit, norms, left[:3], unit, unit),
        lambda: native.native_reflections_gradient(u, unit, norms, left, unit, unit[:3]),
        lambda: native.native_reflections_gradient(u[:3], unit, norms, left, unit, unit),
    ):
        with pytest.raises(RuntimeError):
            bad()
