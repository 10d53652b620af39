# SPDX-License-Identifier: Apache-2.0
"""Real sizes and wide offsets: where 16 and 32 bits end."""

import mmap

import pytest
import torch

import frodkernels as fk
from frodkernels.reference import sparse_core as reference
from tests.support import assert_no_worse_than_torch, make_case

ALL = [True, True, True]
native = torch.ops.frodkernels


def scattered(m, n, nnz):
    g = torch.Generator().manual_seed(0)
    flat = torch.randint(0, m * n, (nnz + nnz // 4 + 8,), generator=g).unique()
    flat = flat[torch.randperm(flat.numel(), generator=g)[:nnz]]
    return flat // n, flat % n


@pytest.mark.parametrize("m, n", [(3, 65_536), (3, 65_537), (70_001, 70_001), (65_537, 5), (200_000, 3)])
def test_beyond_65536_features(isa, m, n):
    """Indices of 32 bits, and the last narrow size; entries at the very end of the range are among them."""
    rows, cols = scattered(m, n, min(m * n // 4, 5000))
    keep = (rows != m - 1) | (cols != n - 1)
    rows, cols = torch.cat([rows[keep], rows.new_tensor([m - 1])]), torch.cat([cols[keep], cols.new_tensor([n - 1])])
    pattern = fk.SparsePattern(rows, cols, (m, n))
    g = torch.Generator().manual_seed(0)
    z, u, values = (torch.randn(*size, generator=g) for size in ((n, 3), (m, 3), (rows.numel(),)))
    out = native.native_sparse_core(z, None, values, *pattern.csr)
    exact = torch.zeros(m, 3, dtype=torch.float64).index_add(0, rows, values.double()[:, None] * z.double()[cols])
    assert_no_worse_than_torch(out, exact, reference.sparse_core(z, None, values, *pattern.csr))
    dz, _, dvalues = native.native_sparse_core_backward(u, z, None, values, *pattern.csc, ALL)
    exact = torch.zeros(n, 3, dtype=torch.float64).index_add(0, cols, values.double()[:, None] * u.double()[rows])
    plain = reference.sparse_core_backward(u, z, None, values, *pattern.csc, ALL)
    assert_no_worse_than_torch(dz, exact, plain[0])
    assert_no_worse_than_torch(dvalues, (u.double()[rows] * z.double()[cols]).sum(1), plain[2])


def test_the_largest_frod_pattern():
    """849,347 nonzeros at n = 9216, the FLUX shape: forward and backward in bfloat16 with float32 parameters."""
    n, nnz, T = 9216, 849_347, 24
    rows, cols = scattered(n, n, nnz)
    pattern = fk.SparsePattern(rows, cols, (n, n))
    assert pattern.nnz == nnz
    z, u = torch.randn(n, T).bfloat16(), torch.randn(n, T).bfloat16()
    lam, values = torch.randn(n), torch.randn(nnz) / 10
    out = native.native_sparse_core(z, lam, values, *pattern.csr)
    plain = reference.sparse_core(z, lam, values, *pattern.csr)
    exact = reference.sparse_core(z.double(), lam.double(), values.double(), *pattern.csr)
    assert_no_worse_than_torch(out, exact, plain)
    got = native.native_sparse_core_backward(u, z, lam, values, *pattern.csc, ALL)
    plain = reference.sparse_core_backward(u, z, lam, values, *pattern.csc, ALL)
    wide = (t.double() for t in (u, z, lam, values))
    for part, exact, same in zip(got, reference.sparse_core_backward(*wide, *pattern.csc, ALL), plain, strict=True):
        assert_no_worse_than_torch(part, exact, same)


def sparse_memory(size):
    """``size`` bfloat16 zeros that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which not every Python names
    return torch.frombuffer(mmap.mmap(-1, 2 * size, flags=flags), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "strides, T",
    [
        ((2**30 + 5, 1), 5),  # from feature to feature
        ((1, 2**29 + 3), 5),  # from token to token
        ((2**30 + 5, 7), 5),
        ((1, 2**24 + 3), 140),  # from tile to tile
        ((3, 2**24 + 1), 140),
    ],
    ids=str,
)
def test_offsets_beyond_2_to_the_31(isa, strides, T):
    """Features or tokens gigabytes apart, in reserved addresses: only the touched pages are ever in memory."""
    n = 3
    size = strides[0] * (n - 1) + strides[1] * (T - 1) + 1
    assert size > 2**31
    case = make_case(n, n, T, "dense", torch.bfloat16)
    z, u = (sparse_memory(size).as_strided((n, T), strides).copy_(t) for t in (case.z, case.u))
    want = native.native_sparse_core(*case.forward), *native.native_sparse_core_backward(*case.backward, ALL)
    got = (
        native.native_sparse_core(z, *case.forward[1:]),
        *native.native_sparse_core_backward(u, z, *case.backward[2:], ALL),
    )
    for wide, narrow in zip(got, want, strict=True):
        assert torch.equal(wide, narrow)
