# SPDX-License-Identifier: Apache-2.0
"""The tensor-core kernels of the sparse core, run by the executor: right, exact about infinities, repeatable, clean."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import frodkernels as fk
from frodkernels.reference import sparse_core as reference
from tests.simt import executor
from tests.simt.coverage import base_name
from tests.support import KINDS, assert_no_worse_than_torch, make_case

DTYPES = [torch.bfloat16, torch.float16]
ALL = [True, True, True]
KERNELS = {"pack_kernel", "product_mma_kernel", "gradient_mma_kernel", "reduce_sources_kernel"}
SMALL, LARGE = 101376, 232448  # shared memory of a block: sm_86, 89, 120 and sm_90, 100
SCHEDULES = [
    dict(order="reverse"),
    dict(order="random", seed=3),
    dict(order="random", seed=4, yield_permille=20),
    dict(lazy_copies=False),
]


def ops(module):
    return torch.ops.simt_check if module.checked else torch.ops.simt


def outputs(module, case, block=128, needs=ALL):
    """(w, dz, dlam, dvalues)"""
    rows, columns = (list(case.pattern.tiles(transpose, block)) for transpose in (False, True))
    w = ops(module).native_sparse_core(*case.forward, False, rows)
    return w, *ops(module).native_sparse_core_backward(*case.backward, needs, False, columns)


def check(module, case, block=128):
    got = outputs(module, case, block)
    plain = reference.sparse_core(*case.forward), *reference.sparse_core_backward(*case.backward, ALL)
    exact = case.exact_forward(), *case.exact_backward()
    for ours, torchs, right in zip(got, plain, exact, strict=True):
        assert_no_worse_than_torch(ours, right, torchs)
    return got


def launched(module):
    return {base_name(name) for name in module.launches()}


# --- right ------------------------------------------------------------------------------------------------------------
# One tile, one token more, tokens that no 16-byte access fits, several tiles.
@pytest.mark.parametrize("param_dtype", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [32, 33, 40, 71, 128])
def test_every_token_count(plain, T, dtype, param_dtype):
    check(plain, make_case(67, 67, T, "random", dtype, param_dtype or dtype))
    scaled = {"largest_parameter_kernel"} if dtype == torch.float16 else set()
    assert launched(plain) == KERNELS | scaled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (9, 9), (35, 150), (150, 35), (1, 40), (40, 1), (260, 260)], ids=str)
def test_every_pattern(plain, shape, kind):
    case = make_case(*shape, 40, kind, torch.bfloat16, torch.float32)
    check(plain, case)


@pytest.mark.parametrize("T", [31, 32])
def test_fewer_tokens_than_a_tile_go_to_the_other_kernels(plain, T):
    check(plain, make_case(40, 40, T, "random", torch.bfloat16, torch.float32))
    assert ("product_mma_kernel" in launched(plain)) == (T == 32)


# Cells of every number of steps; jobs of three and four steps; one row block or several; more items than thread blocks
# and fewer.
@pytest.mark.parametrize("shared", [SMALL, LARGE])
@pytest.mark.parametrize("sms", [1, 3, 200])
@pytest.mark.parametrize("n, density, block", [(512, 0.01, 512), (300, 0.08, 256), (384, 0.14, 384), (260, 0.5, 128)])
def test_every_plan(plain, n, density, block, sms, shared):
    plain.configure(sms=sms, shared_per_block=shared)
    case = make_case(n, n, 100, "empty", torch.bfloat16, torch.float32)
    g = torch.Generator().manual_seed(n)
    rows, cols = (torch.rand(n, n, generator=g) < density).nonzero(as_tuple=True)
    case.rows, case.cols, case.values = rows, cols, torch.randn(rows.numel(), generator=g)
    case.pattern = fk.SparsePattern(rows, cols, (n, n))
    check(plain, case, block)


def gradient_blocks(module, case, tiles):
    """Thread blocks of the gradient kernel; few of them run, so the results are no gradients."""
    module.reset()
    ops(module).native_sparse_core_backward(*case.backward, [False, True, True], False, tiles)
    (grid,) = (k["grid"] for name, k in module.kernels().items() if base_name(name) == "gradient_mma_kernel")
    return grid


def test_splits_of_the_tokens_have_a_bound_on_their_memory(plain):
    """On a device so large that every further split would pay, 64 MiB of partial sums are the limit."""
    n = 2304
    g = torch.Generator().manual_seed(0)
    rows, cols = (torch.rand(n, n, generator=g) < 0.05).nonzero(as_tuple=True)
    pattern = fk.SparsePattern(rows, cols, (n, n))
    tiles = list(pattern.tiles(True, 128))
    slots = 64 * int(tiles[2][-1, -1])  # partial sums of a split: 64 a step
    most = (64 << 20) // (4 * slots)
    assert 1 < most <= 32, "with more, the bound of 64 splits would be met first"
    case = make_case(n, n, 32 * 2 * most, "empty", torch.bfloat16)  # fewer splits have more than two tiles of tokens
    case.pattern, case.values = pattern, torch.ones(rows.numel())
    few = dataclasses.replace(case, u=case.u[:, :32].contiguous(), z=case.z[:, :32].contiguous())  # one tile, one split
    plain.configure(sms=100000, sample={name: 1000 for name in KERNELS})
    assert gradient_blocks(plain, case, tiles) == most * gradient_blocks(plain, few, tiles)


@pytest.mark.parametrize("capability, shared, columns, block", [
    (80, 166912, 4096, 1024), (80, 166912, 100, 128), (90, LARGE, 4096, 1408), (90, LARGE, 9216, 1536),
    (86, SMALL, 3072, 640), (80, 40000, 4096, 128), (80, 20000, 4096, 0), (75, 65536, 4096, 0),
])  # fmt: skip
def test_blocks_fit_the_device(plain, capability, shared, columns, block):
    plain.configure(capability=capability, shared_per_block=shared)
    assert torch.ops.simt.native_tile_block(torch.empty(0), columns) == block


def test_a_device_that_cannot_run_them_says_so(plain):
    for capability, reason in ((75, "older than compute capability 8.0"), (80, ""), (120, "")):
        plain.configure(capability=capability)
        assert reason in torch.ops.simt.native_why_not(torch.empty(0))
        assert bool(reason) == bool(torch.ops.simt.native_why_not(torch.empty(0)))


def test_every_block_up_to_the_limit_can_be_launched(plain):
    for shared in (SMALL, 166912, LARGE):
        plain.configure(shared_per_block=shared, sms=1)
        block = torch.ops.simt.native_tile_block(torch.empty(0), 65000)
        check(plain, make_case(block + 3, block + 3, 32, "one", torch.bfloat16, torch.float32), block)
        assert "gradient_mma_kernel" in launched(plain)


def test_a_plan_for_a_larger_device_goes_to_the_other_kernels(plain):
    plain.configure(shared_per_block=SMALL)
    check(plain, make_case(67, 67, 64, "random", torch.bfloat16, torch.float32), 1024)
    assert "product_mma_kernel" not in launched(plain)


@pytest.mark.parametrize(
    "needs", [[True, False, False], [False, True, False], [False, False, True], [False] * 3], ids=str
)
def test_only_what_is_needed(plain, needs):
    case = make_case(67, 67, 40, "random", torch.bfloat16, torch.float32)
    whole, part = outputs(plain, case)[1:], outputs(plain, case, needs=needs)[1:]
    for full, got, need in zip(whole, part, needs, strict=True):
        assert torch.equal(got, full) if need else got.numel() == 0


@pytest.mark.parametrize("pitch", [3, 8])  # rows that do not, and that do, start on 16 bytes
def test_rows_with_a_pitch(plain, pitch):
    case = make_case(67, 67, 40, "random", torch.bfloat16, torch.float32)
    w, *grads = outputs(plain, case)
    wide = {name: torch.full((67, 40 + pitch), float("nan"), dtype=torch.bfloat16) for name in "uz"}
    for name, buffer in wide.items():
        buffer[:, :40] = getattr(case, name)
        setattr(case, name, buffer[:, :40])
    for got, want in zip(outputs(plain, case), (w, *grads), strict=True):
        assert torch.equal(got, want)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 80), n=st.integers(1, 300), T=st.integers(32, 80), kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES), block=st.sampled_from((128, 256)), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape(m, n, T, kind, dtype, block, seed):
    check(executor.plain(), make_case(m, n, T, kind, dtype, torch.float32, seed=seed), block)


# --- numbers at the edge ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_infinities_reach_the_rows_that_have_them_and_no_others(plain, bad, dtype):
    case = make_case(67, 67, 70, "random", dtype, torch.float32)
    case.z[5, 3] = case.z[40, 69] = case.u[11, 64] = bad
    got = outputs(plain, case)
    want = reference.sparse_core(*case.forward), *reference.sparse_core_backward(*case.backward, ALL)
    for ours, torchs in zip(got, want, strict=True):
        assert not torch.isfinite(torchs).all()
        assert torch.equal(torch.isnan(ours), torch.isnan(torchs))
        assert torch.equal(ours[torch.isinf(torchs)], torchs[torch.isinf(torchs)])
        fine = torch.isfinite(torchs)
        torch.testing.assert_close(ours[fine], torchs[fine], rtol=0.05, atol=0.1)  # exact bars: the finite tests


# Alone in each of the four chunks of eight tokens of a tile, so that no other one has its group summed again.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("token", [3, 12, 21, 30, 35, 44, 53, 62])
def test_an_infinity_in_any_token_is_noticed(plain, token, dtype):
    case = make_case(67, 67, 64, "random", dtype, torch.float32)
    case.z[5, token] = case.u[11, token] = float("inf")
    w, dz = outputs(plain, case)[:2]
    views = (w, reference.sparse_core(*case.forward)), (dz, reference.sparse_core(*case.transpose))
    for ours, torchs in views:
        assert torch.isinf(torchs).any() and torch.isfinite(torchs[:, token]).any()
        assert torch.equal(ours.isnan(), torchs.isnan()) and torch.equal(ours.isinf(), torchs.isinf())


def in_half(x):
    """Rounded to half's 11 bits, at any size."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2048).round(), exponent - 11)


def check_scaled(module, case):
    """Right, and by the tensor cores: where a scale lets parameters overflow, sums are made again with parameters as
    they are, right but slow. Then it matters whether they were rounded before; the tensor cores round them anyway."""
    once = outputs(module, case)[:2]
    for ours, exact, call in zip(
        once, (case.exact_forward(), case.exact_transpose()), (case.forward, case.transpose), strict=True
    ):
        assert_no_worse_than_torch(ours, exact, reference.sparse_core(*call))
    before = case.lam, case.values
    case.lam, case.values = in_half(case.lam), in_half(case.values)
    assert not torch.equal(before[0], case.lam) and not torch.equal(before[1], case.values)
    for ours, same in zip(outputs(module, case)[:2], once, strict=True):
        assert torch.equal(ours, same)


def case_in_half(n, T):
    """Parameters of magnitudes between 1 and 2, so that none is subnormal beside another that is 1e6 times as large."""
    case = make_case(n, n, T, "random", torch.float16, torch.float32)
    case.lam, case.values = (x.sign() * (1 + x.abs().frac()) for x in (case.lam, case.values))
    return case


@pytest.mark.parametrize("large", ["lam", "values"])
def test_float16_is_scaled_by_the_larger_of_diagonal_and_entries(plain, large):
    case = case_in_half(67, 40)
    case.lam *= 1e3 if large == "lam" else 1e-3
    case.values *= 1e3 if large == "values" else 1e-3
    check_scaled(plain, case)


# The parameters are looked through by 64 thread blocks of 256 threads: another warp, another block, the last block, a
# second turn of the loop.
@pytest.mark.parametrize("n, index", [(67, 0), (67, 100), (67, 500), (67, -1), (350, 16200), (350, 17000)])
def test_float16_is_scaled_by_the_largest_entry_wherever_it_is(plain, n, index):
    case = case_in_half(n, 32)
    case.lam *= 1e-3
    case.values *= 1e-3
    case.values[index] = 1234.567
    assert case.values.numel() > max(index, 300)
    check_scaled(plain, case)


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 3e4, 1e9, 1e30])
def test_float16_takes_parameters_of_any_size(plain, scale):
    case = make_case(67, 67, 40, "random", torch.float16, torch.float32)
    case.values *= scale
    case.lam *= scale
    case.z *= min(1 / scale, 1) if scale > 1 else 1
    rows = list(case.pattern.tiles(False, 128))
    got = torch.ops.simt.native_sparse_core(*case.forward, False, rows)
    want = reference.sparse_core(*case.forward)
    if torch.isfinite(want).all():
        assert_no_worse_than_torch(got, case.exact_forward(), want)
    else:
        assert torch.equal(got.isfinite(), want.isfinite())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_stay_accurate(plain, dtype):
    """The executor's tensor cores cut their sums towards zero: over all tokens that would be a bias."""
    plain.configure(sms=1)
    case = make_case(24, 24, 12000, "random", dtype, torch.float32)
    case.u, case.z = case.u.abs(), case.z.abs()  # sums that only grow
    got = torch.ops.simt.native_sparse_core_backward(
        *case.backward, [False, True, True], False, list(case.pattern.tiles(True, 128))
    )
    want = reference.sparse_core_backward(*case.backward, ALL)
    for ours, right, torchs in zip(got[1:], case.exact_backward()[1:], want[1:], strict=True):
        assert_no_worse_than_torch(ours, right, torchs)


def test_infinite_parameters(plain):
    for dtype in DTYPES:
        case = make_case(40, 40, 40, "random", dtype, torch.float32)
        case.values[3], case.lam[7] = float("inf"), float("nan")
        got = torch.ops.simt.native_sparse_core(*case.forward, False, list(case.pattern.tiles(False, 128)))
        want = reference.sparse_core(*case.forward)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


# --- repeatable, clean ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_no_schedule_changes_a_bit(plain, schedule):
    case = make_case(260, 260, 71, "random", torch.bfloat16, torch.float32)
    plain.configure(sms=3)
    want = outputs(plain, case)
    plain.configure(sms=3, **schedule)
    for got, once in zip(outputs(plain, case), want, strict=True):
        assert torch.equal(got, once)


@pytest.mark.kernel("pack_kernel", "largest_parameter_kernel", "product_mma_kernel", "gradient_mma_kernel")
@pytest.mark.kernel("reduce_sources_kernel")
@pytest.mark.parametrize("shared", [SMALL, 166912])
@pytest.mark.parametrize("T, n", [(64, 260), (71, 67)])
def test_no_race_no_stray_access(checker, T, n, shared):
    checker.configure(sms=3, shared_per_block=shared)
    case = make_case(n, n, T, "random", torch.float16, torch.float32)
    check(checker, case)
    case.z[3, 3] = case.u[5, 5] = float("nan")  # and where sums are made again
    outputs(checker, case)
    assert checker.reports() == []


@pytest.mark.kernel("product_mma_kernel", "gradient_mma_kernel")
@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=str)
def test_no_race_under_other_schedules(checker, schedule):
    checker.configure(sms=2, **schedule)
    check(checker, make_case(150, 150, 72, "random", torch.bfloat16, torch.float32))
    assert checker.reports() == []


def test_under_the_sanitisers():
    script = """
from tests.support import make_case
import frodkernels
for dtype, T in ((torch.bfloat16, 71), (torch.float16, 64)):
    case = make_case(67, 67, T, "random", dtype, torch.float32)
    tiles = [list(case.pattern.tiles(transpose, 128)) for transpose in (False, True)]
    simt.configure(sms=3)
    w = torch.ops.simt_asan.native_sparse_core(*case.forward, False, tiles[0])
    grads = torch.ops.simt_asan.native_sparse_core_backward(*case.backward, [True] * 3, False, tiles[1])
    assert all(t.isfinite().all() for t in (w, *grads))
print("came through")
"""
    (end,) = executor.under_asan([script])
    assert end.status == 0 and "came through" in end.output, end.output


# --- refusals ---------------------------------------------------------------------------------------------------------
def test_tiles_that_do_not_fit_are_refused(plain):
    case = make_case(67, 67, 40, "random", torch.bfloat16, torch.float32)
    other = make_case(75, 75, 40, "random", torch.bfloat16, torch.float32)
    good = list(case.pattern.tiles(False, 128))
    for bad, message in (
        (good[:5], "tiles must be 7 tensors"),
        (list(other.pattern.tiles(False, 128)), "tiles do not fit the plan"),
        ([t.float() for t in good], "row_order has the wrong dtype"),
        ([*good[:5], good[5][:, :3], good[6]], "jobs has the wrong dtype or layout"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.simt.native_sparse_core(*case.forward, False, bad)
