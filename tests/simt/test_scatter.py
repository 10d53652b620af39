# SPDX-License-Identifier: Apache-2.0
"""The scatter's kernel, run by the executor: every bit as the definition has it, and exact to undo."""

import itertools
import mmap

import pytest
import torch

import frodkernels as fk
from frodkernels.reference import sampled as reference
from tests.simt.sampled_cases import BF16, F16, F32, F64, SCHEDULES, launched, ops
from tests.support import KINDS, LAYOUTS, coo

DTYPES = (F32, F64, BF16, F16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x):
    return x.view(BITS[x.element_size()])


def drawn(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def pattern_of(m, n, kind="random"):
    return fk.SparsePattern(*coo(kind, m, n), (m, n))


def both(module, weight, values, pattern, scale, accumulate, keep=True):
    """Ours and the definition's (weight, old), each in place on a copy of its own in weight's layout."""
    found = []
    for run in (ops(module).native_scatter_values_, reference.scatter_values_):
        room = weight.new_full((int((torch.tensor(weight.stride()) * (torch.tensor(weight.shape) - 1)).sum()) + 1,), 7)
        mine = room.as_strided(weight.shape, weight.stride()).copy_(weight)
        old = torch.full((pattern.nnz,), 3.0, dtype=weight.dtype) if keep else None
        run(mine, values, *pattern.csr, scale, accumulate, old)
        found.append((room, old))
    return found


def check(module, weight, values, pattern, scale=1.0, accumulate=True, keep=True):
    (ours, old), (theirs, their_old) = both(module, weight, values, pattern, scale, accumulate, keep)
    assert torch.equal(bits(ours), bits(theirs)), "also what no entry names"
    if keep:
        assert torch.equal(bits(old), bits(their_old))


@pytest.mark.parametrize("scale", [1.0, -0.37, 0.0])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("values_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(plain, dtype, values_dtype, accumulate, scale):
    pattern = pattern_of(40, 70)
    weight, values = drawn((40, 70), dtype), drawn(pattern.nnz, values_dtype, 1)
    if values_dtype == F64 and dtype in (BF16, F16):  # torch rounds float64 to 16 bits twice
        values = values.float().to(F64)
        (ours, _), (theirs, _) = both(plain, weight, values, pattern, scale, accumulate)
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        check(plain, weight, values, pattern, scale, accumulate)
    assert launched(plain) == {"scatter_values_kernel"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (9, 300), (300, 9), (67, 45), (513, 2)], ids=str)
def test_every_pattern(plain, shape, kind):
    pattern = pattern_of(*shape, kind)
    for keep in (True, False):
        check(plain, drawn(shape, F32), drawn(pattern.nnz, F32, 1), pattern, 2.5, keep=keep)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_layout(plain, dtype, layout):
    pattern = pattern_of(33, 50)
    check(plain, LAYOUTS[layout](drawn((33, 50), dtype)), drawn(pattern.nnz, F32, 1), pattern, -1.0)


def test_vectors_of_any_stride(plain):
    """Values that repeat, values and old entries that lie apart."""
    pattern = pattern_of(20, 30)
    weight = drawn((20, 30), F32)
    wide = drawn((pattern.nnz, 3), F32, 1)
    for values in (wide[:, 1], torch.tensor([2.5]).expand(pattern.nnz)):
        mine, kept = weight.clone(), torch.zeros(pattern.nnz, 2)
        ops(plain).native_scatter_values_(mine, values, *pattern.csr, 1.0, True, kept[:, 1])
        rows, cols = pattern.coo()
        want = weight.clone()
        want[rows, cols] += values
        assert torch.equal(mine, want) and torch.equal(kept[:, 1], weight[rows, cols]) and not kept[:, 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_copied_and_kept(plain, dtype):
    """Those of every NaN and of minus zero: in, and back out."""
    pattern = pattern_of(40, 30)
    kind = BITS[torch.empty(0, dtype=dtype).element_size()]
    g = torch.Generator().manual_seed(5)
    limits = torch.iinfo(kind)
    before, values = (
        torch.randint(limits.min, limits.max, (k,), generator=g, dtype=kind).view(dtype) for k in (1200, pattern.nnz)
    )
    inf_bits = bits(torch.tensor([float("inf")], dtype=dtype))
    bits(values)[::3] = inf_bits + 1 + torch.arange(len(values[::3])).to(kind) % 5  # NaNs, signalling ones
    weight = before.clone().view(40, 30)
    old = torch.empty(pattern.nnz, dtype=dtype)
    scatter = ops(plain).native_scatter_values_
    scatter(weight, values, *pattern.csr, 1.0, False, old)
    rows, cols = pattern.coo()
    assert values.isnan().any() and torch.equal(bits(weight)[rows, cols], bits(values))
    taken = torch.empty_like(old)
    scatter(weight, old, *pattern.csr, 1.0, False, taken)
    assert torch.equal(bits(weight), bits(before).view(40, 30)) and torch.equal(bits(taken), bits(values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_to_undo(plain, dtype):
    pattern = pattern_of(40, 70)
    weight, values = drawn((40, 70), dtype), drawn(pattern.nnz, F32, 1)
    mine, old = weight.clone(), torch.empty(pattern.nnz, dtype=dtype)
    scatter = ops(plain).native_scatter_values_
    scatter(mine, values, *pattern.csr, 0.77, True, old)
    assert not torch.equal(mine, weight)
    scatter(mine, old, *pattern.csr, 1.0, False, None)
    assert torch.equal(mine, weight)


def test_a_large_matrix(plain):
    """Places beyond 2^31 elements, of a matrix of which only its entries are touched."""
    m, n = 70_000, 40_000
    rows, cols = torch.tensor([69_999, 0, 65_536]), torch.tensor([39_999, 39_998, 1])
    pattern = fk.SparsePattern(cols, rows, (n, m))  # 40,000 rows of 70,000 columns: wide indices
    memory = mmap.mmap(-1, 2 * n * m)  # the system gives it where it is touched
    weight = torch.frombuffer(memory, dtype=BF16).view(n, m)
    weight[cols, rows] = 1.0
    ops(plain).native_scatter_values_(weight, torch.tensor([0.5, 1.0, 2.0]), *pattern.csr, 2.0, True, None)
    assert weight[cols, rows].tolist() == [2.0, 3.0, 5.0]


@pytest.mark.kernel("scatter_values_kernel")
@pytest.mark.parametrize("schedule", [{}, *SCHEDULES[:2]], ids=str)
def test_clean(checker, schedule):
    checker.configure(**schedule)
    pattern = pattern_of(61, 47)
    for dtype, values_dtype in ((F32, F32), (BF16, F32), (F16, F16), (F64, F32), (F32, F64)):
        for accumulate, keep in itertools.product((True, False), repeat=2):
            weight, values = drawn((61, 47), dtype), drawn(pattern.nnz, values_dtype, 1)
            check(checker, weight, values, pattern, 1.0 if keep else 0.5, accumulate, keep)
    assert checker.reports() == []


def test_what_does_not_fit_is_refused(plain):
    pattern = pattern_of(9, 7)
    weight, values = drawn((9, 7), F32), drawn(pattern.nnz, F32)
    scatter = ops(plain).native_scatter_values_
    for bad, message in (
        ((weight[:8], values, *pattern.csr, 1.0, True, None), "weight must have one row per group"),
        ((weight[0], values, *pattern.csr, 1.0, True, None), "weight must be a matrix"),
        ((weight, values[1:], *pattern.csr, 1.0, True, None), "values must be a vector"),
        ((weight, values.int(), *pattern.csr, 1.0, True, None), "values must be float32"),
        ((weight, values, *pattern.csr, 1.0, True, values[1:]), "old must be a vector"),
        ((weight, values, *pattern.csr, 1.0, True, values.double()), "old must have weight's dtype"),
    ):
        before = weight.clone()
        with pytest.raises(RuntimeError, match=message):
            scatter(*bad)
        assert torch.equal(weight, before)
