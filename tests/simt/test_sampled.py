# SPDX-License-Identifier: Apache-2.0
"""The sampled product's kernels, run by the executor: right, exact about infinities, repeatable."""

import pytest
import torch

import frodkernels as fk
from frodkernels.reference import sampled as reference
from tests.simt.sampled_cases import (
    BF16,
    BLOCKS,
    F16,
    F32,
    F64,
    NARROW,
    SCHEDULES,
    SMALLEST,
    arguments,
    blocks,
    check,
    grid_of,
    launched,
    ops,
)
from tests.support import KINDS, LAYOUTS, Case, assert_no_worse_than_torch, make_case

DTYPES = (F32, F64, BF16, F16)
# What comes out: as the operands, or another type.
OUTPUTS = {F32: (F32, BF16), F64: (F64, F32), BF16: (F32, BF16), F16: (F32, F16)}
# m, n, T: one block and parts of it, several both ways, every remainder of a tile of tokens
SHAPES = [(1, 1, 1), (3, 130, 7), (67, 45, 33), (200, 130, 64), (400, 20, 17)]


def case_of(shape, dtype, kind="random", seed=0) -> Case:
    m, n, T = shape
    return make_case(m, n, T, kind, dtype, F32, lam=False, seed=seed)


# --- by blocks: right -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(plain, dtype, shape):
    plain.configure(shared_per_block=SMALLEST)
    for out in OUTPUTS[dtype]:
        check(plain, case_of(shape, dtype), out)
    assert launched(plain) == {BLOCKS[dtype], "reduce_sources_kernel"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_pattern(plain, dtype, kind):
    check(plain, case_of((210, 70, 20), dtype, kind))


@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
def test_wide_sums_of_narrow_features(plain, dtype):
    """float64 is asked for: sums are made in it."""
    case = case_of((40, 30, 70), dtype)
    got = check(plain, case, F64)
    assert got.dtype == F64 and launched(plain) == {"sampled_fma_kernel", "reduce_sources_kernel"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["same", "feature_major", "token_major"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_every_layout(plain, dtype, other, layout):
    """Activations as they are, weights as they are, one of each; the same bits wherever the same kernel runs."""
    case = case_of((67, 41, 37), dtype)
    moved = case.laid_out(layout)
    if other != "same":
        moved.z = LAYOUTS[other](moved.z)
    got = check(plain, moved) if not layout.startswith("expanded") else blocks(plain, moved)
    assert torch.equal(got, blocks(plain, moved.laid_out("feature_major")))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_on_16_bytes_and_off(plain, dtype):
    for n in (64, 67):
        for T in (40, 41):
            case = case_of((n, n, T), dtype)
            want = check(plain, case)
            assert torch.equal(check(plain, case.laid_out("token_major")), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_do(plain, dtype):
    for shape in ((5, 4, 0), (0, 4, 3), (5, 0, 3), (0, 0, 0)):
        case = case_of(shape, dtype)
        for tiled in (True, False):
            got = ops(plain).native_sampled_product(*arguments(case, F32), tiled)
            assert got.dtype == F32 and torch.equal(got, torch.zeros(case.pattern.nnz))
    case = case_of((5, 4, 3), dtype, "empty")
    assert blocks(plain, case).shape == (0,)
    assert launched(plain) <= {"reduce_sources_kernel"}


# --- by blocks: long, wide, sparse ------------------------------------------------------------------------------------
@pytest.mark.parametrize("sms", [1, 3, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_and_segments(plain, dtype, sms):
    """One split holds several segments of tokens; or there are many splits."""
    plain.configure(sms=sms)
    T = 2 * 2048 + 40 if dtype in NARROW else 2 * 512 + 21
    check(plain, case_of((20, 9, T), dtype), F64 if dtype == F64 else F32)
    assert (grid_of(plain, BLOCKS[dtype]) == 1) == (sms == 1)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_long_sums_stay_accurate(plain, dtype):
    """The executor's tensor cores cut their sums towards zero: over all tokens that would be a bias."""
    plain.configure(sms=1)
    case = case_of((8, 6, 9000), dtype)
    case.u, case.z = case.u.abs(), case.z.abs()  # sums that only grow
    check(plain, case, F32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranges_of_many_blocks(plain, dtype):
    """A thread block walks several blocks of columns, past those that hold nothing."""
    plain.configure(sms=1)
    m, n = 9000, 40
    g = torch.Generator().manual_seed(1)
    rows, cols = torch.randint(0, m, (300,), generator=g), torch.randint(0, n, (300,), generator=g)
    rows = torch.where(rows > m // 3, rows, rows // 16)  # a gap of several blocks
    flat = torch.unique(rows * n + cols)
    flat = flat[torch.randperm(flat.numel(), generator=g)]
    u, z = (torch.randn(k, 5, generator=g, dtype=F64).to(dtype) for k in (m, n))
    case = Case(
        u, z, None, torch.zeros(flat.numel()), flat // n, flat % n, fk.SparsePattern(flat // n, flat % n, (m, n))
    )
    check(plain, case, F64 if dtype == F64 else F32)
    assert grid_of(plain, BLOCKS[dtype]) <= 32


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_wide_patterns(plain, dtype, tiled):
    """More columns than 16 bits count; more pairs than 31 bits; and nothing in proportion to either."""
    plain.configure(sms=1)
    m, n, T = 70_000, 40_000, 3
    rows = torch.tensor([0, 69_999, 65_536, 65_535, 12, 69_999])
    cols = torch.tensor([39_999, 39_999, 0, 128, 129, 0])
    pattern = fk.SparsePattern(rows, cols, (m, n))
    assert pattern.csc[1].dtype == torch.int32 and m * n > 2**31
    g = torch.Generator().manual_seed(2)
    u, z = (torch.randn(k, T, generator=g, dtype=F64).to(dtype) for k in (m, n))
    got = ops(plain).native_sampled_product(u, z, *pattern.csc, F32, tiled)
    exact = (u[rows].double() * z[cols].double()).sum(1)
    assert_no_worse_than_torch(got, exact, reference.sampled_product(u, z, *pattern.csc, F32))
    if tiled:
        side = 128
        assert grid_of(plain, BLOCKS[dtype]) == -(-n // side), "a thread block for each block of rows, no more"


@pytest.mark.parametrize("m, T", [(1000, 9), (40_000, 2)])
def test_one_full_row_of_many(plain, m, T):
    """Of which each thread block finds its own part."""
    n = 300
    rows = torch.randperm(m, generator=torch.Generator().manual_seed(4))
    cols = torch.full_like(rows, 150)
    pattern = fk.SparsePattern(rows, cols, (m, n))
    for dtype in (F32, F16):
        plain.reset()
        u, z = (torch.randn(k, T, generator=torch.Generator().manual_seed(k)).to(dtype) for k in (m, n))
        got = ops(plain).native_sampled_product(u, z, *pattern.csc, F32, True)
        exact = (u.double() @ z[150].double())[rows]
        assert_no_worse_than_torch(got, exact, reference.sampled_product(u, z, *pattern.csc, F32))
        assert grid_of(plain, BLOCKS[dtype]) >= 3 * (m // 192)


# --- infinities, bits -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_with_its_feature(plain, dtype, tiled, value):
    case = case_of((70, 50, 37), dtype, "dense")
    clean = ops(plain).native_sampled_product(*arguments(case, F32), tiled)
    case.u[7, 36] = case.z[9, 3] = value
    got = ops(plain).native_sampled_product(*arguments(case, F32), tiled)
    hit = (case.rows == 7) | (case.cols == 9)
    assert torch.equal(got[~hit], clean[~hit]) and not got[hit].isfinite().any()
    want = reference.sampled_product(*arguments(case, F32))
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got[got.isinf()], want[want.isinf()])


@pytest.mark.parametrize("schedule", [*SCHEDULES, dict(threads=2)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_no_schedule_changes_a_bit(plain, dtype, schedule):
    case = case_of((210, 140, 71), dtype)
    plain.configure(sms=3)
    want = blocks(plain, case)
    plain.configure(sms=3, **schedule)
    assert torch.equal(blocks(plain, case), want)


# --- entry by entry: the gradient's kernels ---------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["feature_major", "token_major", "strided"])
@pytest.mark.parametrize("T", [7, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries(plain, dtype, T, layout):
    for out in OUTPUTS[dtype]:
        check(plain, case_of((67, 45, T), dtype).laid_out(layout), out, tiled=False)
    assert launched(plain) <= {"gradient_rows_kernel", "gradient_tiles_kernel", "reduce_sources_kernel"}


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("layout", ["feature_major", "token_major"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_entries_on_tensor_cores(plain, dtype, layout, square):
    """With tiles; those of a square pattern hold its diagonal too, which nobody asks for."""
    case = case_of((150, 150 if square else 70, 40), dtype).laid_out(layout)
    check(plain, case, F32, tiled=False, tiles=list(case.pattern.tiles(True, 128)))
    assert launched(plain) == {"gradient_mma_kernel", "reduce_sources_kernel"}


# --- refusals ---------------------------------------------------------------------------------------------------------
def test_what_does_not_fit_is_refused(plain):
    case = case_of((20, 10, 6), F32)
    u, z, indptr, indices, perm, _ = arguments(case)
    op = ops(plain).native_sampled_product
    for bad, message in (
        ((u.double(), z, indptr, indices, perm, F32), "a and b must share a dtype"),
        ((u, z[:9], indptr, indices, perm, F32), "one row per group"),
        ((u[:, :5], z, indptr, indices, perm, F32), "equally many tokens"),
        ((u[0], z, indptr, indices, perm, F32), r"a must be \[features, T\]"),
        ((u.int(), z.int(), indptr, indices, perm, F32), "a must be float32, float64, bfloat16 or float16"),
        ((u, z, indptr, indices, perm, torch.int32), "dtype must be float32, float64, bfloat16 or float16"),
        ((u, z, indptr.long(), indices, perm, F32), "indptr must be a non-empty int32 vector"),
        ((u, z, indptr, indices.long(), perm, F32), "indices must be uint16 or int32"),
        ((u, z, indptr, indices, perm[1:], F32), "perm must be a vector"),
    ):
        for tiled in (True, False):
            with pytest.raises(RuntimeError, match=message):
                op(*bad, tiled)
