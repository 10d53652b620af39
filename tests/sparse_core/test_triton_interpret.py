# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the sparse core, run by Triton's interpreter.

``make test`` runs this file in a process with TRITON_INTERPRET=1, which Triton reads when it is imported. The
interpreter's bfloat16 is wrong, so bfloat16 is compiled (``test_aot_triton.py``) but not run here.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported (make test sets it)", allow_module_level=True)
pytest.importorskip("triton")

import frodkernels as fk
from frodkernels.reference import sparse_core as reference
from frodkernels.triton_kernels import sparse_core as kernels

DTYPES = (torch.float32, torch.float16, torch.float64)
ALL = [True, True, True]
# n, T, nnz: one token, a few, one past a tile, several tiles and odd; an empty S, a full S
SHAPES = [(1, 1, 0), (7, 1, 20), (33, 5, 90), (70, 33, 60), (20, 129, 0), (9, 257, 81), (24, 600, 60)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN: an element that a kernel fails to write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def make_pattern(m, n, nnz, seed=0):
    flat = torch.randperm(m * n, generator=torch.Generator().manual_seed(seed))[:nnz]
    return fk.SparsePattern(flat // max(n, 1), flat % max(n, 1), (m, n))


def make_case(n, T, nnz, dtype, param_dtype=torch.float32, seed=0):
    """(u, z, lam, values, pattern) of a square S."""
    g = torch.Generator().manual_seed(seed)
    u, z = (torch.randn(n, T, generator=g).to(dtype) for _ in range(2))
    lam, values = (torch.randn(k, generator=g).to(param_dtype) for k in (n, nnz))
    return u, z, lam, values, make_pattern(n, n, nnz, seed)


def double(tensor):
    return None if tensor is None else tensor.double()


def assert_no_worse(got, exact, plain, factor=1.5, ulps=0.5):
    """Error against float64 within `factor` of plain torch's in the same dtype, plus `ulps` of relative rounding."""
    assert got.shape == exact.shape and got.dtype == plain.dtype
    assert torch.isfinite(got).all()
    error, torch_error = (got.double() - exact).norm(), (plain.double() - exact).norm()
    floor = ulps * torch.finfo(got.dtype).eps * exact.norm()
    assert error <= factor * torch_error + floor, f"{error=:.2e} {torch_error=:.2e} {floor=:.2e}"


def check_forward(z, lam, values, plan, token_major=False):
    got = kernels.sparse_core(z, lam, values, *plan, token_major)
    exact = reference.sparse_core(z.double(), double(lam), values.double(), *plan)
    assert_no_worse(got, exact, reference.sparse_core(z, lam, values, *plan))
    assert got.stride() == ((1, got.shape[0]) if token_major else (got.shape[1], 1))
    return got


def check_backward(u, z, lam, values, plan, token_major=False):
    got = kernels.sparse_core_backward(u, z, lam, values, *plan, ALL, token_major)
    exact = reference.sparse_core_backward(u.double(), z.double(), double(lam), values.double(), *plan, ALL)
    plain = reference.sparse_core_backward(u, z, lam, values, *plan, ALL)
    for parts in zip(got, exact, plain, strict=True):
        assert_no_worse(*parts)
    assert got[0].stride() == ((1, got[0].shape[0]) if token_major else (got[0].shape[1], 1))
    return got


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, T, nnz", SHAPES)
def test_forward_and_backward(n, T, nnz, dtype, token_major):
    u, z, lam, values, pattern = make_case(n, T, nnz, dtype)
    check_forward(z, lam, values, pattern.csr, token_major)
    check_backward(u, z, lam, values, pattern.csc, token_major)


@pytest.mark.parametrize(
    "dtype, param_dtype",
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.float64),
        (torch.float16, torch.float64),
        (torch.float64, torch.float16),
    ],
    ids=str,
)
def test_mixed_dtypes(dtype, param_dtype):
    u, z, lam, values, pattern = make_case(13, 40, 50, dtype, param_dtype)
    check_forward(z, lam, values, pattern.csr)
    check_backward(u, z, lam, values, pattern.csc)


@pytest.mark.parametrize("m, n", [(5, 19), (19, 5)])
@pytest.mark.parametrize("T", [3, 140])
def test_rectangular(m, n, T):
    pattern = make_pattern(m, n, 40)
    z, u, values = torch.randn(n, T), torch.randn(m, T), torch.randn(40)
    assert check_forward(z, None, values, pattern.csr).shape == (m, T)
    dz, dlam, dvalues = check_backward(u, z, None, values, pattern.csc)
    assert dz.shape == (n, T) and dlam.shape == (0,) and dvalues.shape == (40,)


def test_rectangular_without_entries_is_zero():
    pattern = make_pattern(4, 6, 0)
    out = kernels.sparse_core(torch.randn(6, 5), None, torch.randn(0), *pattern.csr)
    assert torch.equal(out, torch.zeros(4, 5))


@pytest.mark.parametrize("n, T", [(0, 5), (6, 0), (0, 0)])
def test_nothing_to_do(n, T):
    u, z, lam, values, pattern = make_case(n, T, min(n, 3), torch.float32)
    assert kernels.sparse_core(z, lam, values, *pattern.csr).shape == (n, T)
    dz, dlam, dvalues = kernels.sparse_core_backward(u, z, lam, values, *pattern.csc, ALL)
    assert dz.shape == (n, T)
    assert torch.equal(dlam, torch.zeros(n)) and torch.equal(dvalues, torch.zeros(min(n, 3)))


def test_empty_and_full_rows():
    n = 12
    rows = torch.cat([torch.full((n,), 3), torch.arange(4, n)])  # row 3 full, rows 0..2 empty
    cols = torch.cat([torch.arange(n), torch.full((n - 4,), 5)])  # column 5 nearly full
    pattern = fk.SparsePattern(rows, cols, (n, n))
    u, z, lam, values, _ = make_case(n, 20, rows.numel(), torch.float32)
    check_forward(z, lam, values, pattern.csr)
    check_backward(u, z, lam, values, pattern.csc)


@pytest.mark.parametrize("n_in", [2**16, 2**16 + 1])
def test_widest_narrow_and_narrowest_wide_index(n_in):
    cols = torch.tensor([0, 32767, 32768, 40000, n_in - 1])
    pattern = fk.SparsePattern(torch.tensor([0, 0, 1, 1, 1]), cols, (2, n_in))
    assert pattern.csr.indices.dtype == (torch.uint16 if n_in <= 2**16 else torch.int32)
    check_forward(torch.randn(n_in, 3), None, torch.randn(5), pattern.csr)


def layouts(features):
    """The same numbers: transposed, sliced from something larger at an odd offset, sliced with steps."""
    n, T = features.shape
    sliced = torch.full((n + 2, 2 * T + 3), float("nan"), dtype=features.dtype)
    sliced[1:-1, 3 : T + 3] = features
    stepped = torch.full((2 * n, 2 * T), float("nan"), dtype=features.dtype)
    stepped[::2, ::2] = features
    return features.t().contiguous().t(), sliced[1:-1, 3 : T + 3], stepped[::2, ::2]


@pytest.mark.parametrize("T", [8, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layout_changes_nothing(T, dtype):
    u, z, lam, values, pattern = make_case(11, T, 40, dtype)
    out = kernels.sparse_core(z, lam, values, *pattern.csr)
    grads = kernels.sparse_core_backward(u, z, lam, values, *pattern.csc, ALL)
    for u_view, z_view in zip(layouts(u), layouts(z), strict=True):
        assert torch.equal(kernels.sparse_core(z_view, lam, values, *pattern.csr), out)
        for got, want in zip(
            kernels.sparse_core_backward(u_view, z_view, lam, values, *pattern.csc, ALL), grads, strict=True
        ):
            assert torch.equal(got, want)


def test_expanded_gradient_and_strided_parameters():
    _, z, lam, values, pattern = make_case(9, 35, 30, torch.float32)
    strided = torch.stack([lam, lam], 1)[:, 0], torch.stack([values, values], 1)[:, 1]
    for u in (torch.ones(()).expand(9, 35), torch.randn(9, 1).expand(9, 35), torch.randn(35).expand(9, 35)):
        assert torch.equal(
            kernels.sparse_core(u, *strided, *pattern.csr),
            kernels.sparse_core(u.contiguous(), lam, values, *pattern.csr),
        )
        got = kernels.sparse_core_backward(u, z, *strided, *pattern.csc, ALL)
        want = kernels.sparse_core_backward(u.contiguous(), z, lam, values, *pattern.csc, ALL)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("needs", [[bool(k & 4), bool(k & 2), bool(k & 1)] for k in range(8)], ids=str)
def test_needs(needs):
    u, z, lam, values, pattern = make_case(10, 40, 25, torch.float16)
    full = kernels.sparse_core_backward(u, z, lam, values, *pattern.csc, ALL)
    parts = kernels.sparse_core_backward(u, z, lam, values, *pattern.csc, needs)
    for part, whole, needed in zip(parts, full, needs, strict=True):
        assert part.dtype == whole.dtype
        assert torch.equal(part, whole) if needed else part.shape == (0,)


def test_repeats_bit_for_bit():
    u, z, lam, values, pattern = make_case(15, 300, 60, torch.float32)
    once, again = (
        (
            kernels.sparse_core(z, lam, values, *pattern.csr),
            *kernels.sparse_core_backward(u, z, lam, values, *pattern.csc, ALL),
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_nan_travels_along_entries_only():
    pattern = fk.SparsePattern(torch.tensor([0, 2, 3]), torch.tensor([1, 1, 0]), (4, 4))
    z = torch.ones(4, 6)
    z[1, 2] = float("nan")
    lam, values = torch.ones(4), torch.ones(3)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[[0, 1, 2], 2] = True
    assert torch.equal(kernels.sparse_core(z, lam, values, *pattern.csr).isnan(), expected)
    dz, dlam, dvalues = kernels.sparse_core_backward(torch.ones(4, 6), z, lam, values, *pattern.csc, ALL)
    assert not dz.isnan().any()
    assert dlam.isnan().tolist() == [False, True, False, False]
    assert dvalues.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("splits, per_split", [(1, 3), (2, 2), (3, 1)])
def test_splits_of_several_tiles(monkeypatch, splits, per_split):
    monkeypatch.setattr(kernels, "token_splits", lambda tiles, programs: (splits, per_split))
    u, z, lam, values, pattern = make_case(9, 600, 30, torch.float32)
    check_backward(u, z, lam, values, pattern.csc)


def test_more_tiles_than_the_grid_may_have(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_GRID_Y", 2)
    _, z, lam, values, pattern = make_case(5, 1100, 12, torch.float32)
    check_forward(z, lam, values, pattern.csr)


def test_token_splits():
    from frodkernels.triton_kernels._config import MAX_SPLITS, token_splits

    for tiles in (1, 2, 7, 8, 9, 63, 64, 65, 1000, 12345):
        for programs in (1, 100, 4096, 10**6):
            splits, per_split = token_splits(tiles, programs)
            assert 1 <= splits <= MAX_SPLITS
            assert (splits - 1) * per_split < tiles <= splits * per_split  # all covered, none empty


def test_bad_arguments_are_named():
    u, z, lam, values, pattern = make_case(6, 4, 10, torch.float32)
    with pytest.raises(ValueError, match="z is on meta"):
        kernels.sparse_core(z.to("meta"), lam, values, *pattern.csr)
    with pytest.raises(ValueError, match="lam is on meta"):
        kernels.sparse_core(z, lam.to("meta"), values, *pattern.csr)
    with pytest.raises(ValueError, match="values must be"):
        kernels.sparse_core(z, lam, values[1:], *pattern.csr)
    with pytest.raises(ValueError, match="lam must be"):
        kernels.sparse_core(z, lam[1:], values, *pattern.csr)
    with pytest.raises(ValueError, match="indices must be contiguous"):
        kernels.sparse_core(z, lam, values, pattern.csr.indptr, torch.zeros(20).int()[::2], pattern.csr.perm)
    with pytest.raises(ValueError, match="2147483647 tokens"):
        kernels.sparse_core(torch.ones(6, 1).expand(6, 2**31 - 1), lam, values, *pattern.csr)
    with pytest.raises(ValueError, match="z must be"):
        kernels.sparse_core_backward(u, z[:, 1:], lam, values, *pattern.csc, ALL)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    n=st.integers(1, 24),
    T=st.integers(1, 150),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    token_major=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(n, T, density, dtype, token_major, seed):
    u, z, lam, values, pattern = make_case(n, T, int(density * n * min(n, 9)), dtype, seed=seed)
    check_forward(z, lam, values, pattern.csr, token_major)
    check_backward(u, z, lam, values, pattern.csc, token_major)


def test_serves_the_registered_ops():
    _, z, lam, values, pattern = make_case(8, 10, 20, torch.float32)
    leaves = [t.requires_grad_() for t in (z.t().contiguous(), lam, values)]
    results = []
    for name in ("triton", "reference"):
        with fk.backend(name):
            y = fk.sparse_core(*leaves, pattern)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
