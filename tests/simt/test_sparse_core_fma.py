# SPDX-License-Identifier: Apache-2.0
"""The fused multiply-add kernels of the sparse core, run by the executor: right, repeatable, and how economical.

Up to 64 tokens a warp owns a row (``*_rows_kernel``); with more, and entries enough, tiles of 128 bytes of tokens pass
through shared memory (``*_tiles_kernel``). DEVICES make blocks of every size and few or many feature blocks.
"""

import pytest
import torch

import frodkernels as fk
from frodkernels.reference import sparse_core as reference
from tests.simt import executor
from tests.simt.coverage import base_name
from tests.support import DTYPE_IDS, DTYPES, FLOATS, KINDS, LAYOUTS, assert_no_worse_than_torch, make_case

ALL = [True, True, True]
# Around 1, 2, 4 and 8 tokens a lane, 32 lanes, the change of kernel, and tiles of 16, 32 and 64 tokens.
TOKENS = [0, 1, 2, 3, 4, 8, 9, 31, 32, 33, 64, 65, 66, 96, 127, 128, 129, 192]
SHAPES = [(1, 1), (2, 2), (17, 17), (67, 67), (35, 20), (20, 35), (1, 40), (40, 1)]  # rectangular ones have no lam
DEVICES = {
    "large blocks": dict(sms=1, shared_per_block=166912),
    "small blocks": dict(sms=1000, shared_per_block=101376),
    "large blocks, 56 features": dict(sms=1, shared_per_block=20000),
    "small blocks, 8 features": dict(sms=1000, shared_per_block=20000),
}
SCHEDULES = [
    dict(order="reverse"),
    dict(order="random", seed=3),
    dict(order="random", seed=4, yield_permille=50),
    dict(lazy_copies=False),
]
PRODUCT_TILES = {"pack_entries_kernel", "product_tiles_kernel"}
GRADIENT_TILES = {"gradient_tiles_kernel", "reduce_sources_kernel"}


def ops(module):
    return torch.ops.simt_check if module.checked else torch.ops.simt


def outputs(module, case, needs=ALL, token_major=False):
    """(w, S^T u, dz, dlam, dvalues)"""
    product, gradient = ops(module).native_sparse_core, ops(module).native_sparse_core_backward
    w, v = product(*case.forward, token_major), product(*case.transpose, token_major)
    return w, v, *gradient(*case.backward, needs, token_major)


def plain_outputs(case):
    w, v = reference.sparse_core(*case.forward), reference.sparse_core(*case.transpose)
    return w, v, *reference.sparse_core_backward(*case.backward, ALL)


def check(module, *cases):
    """No worse than plain torch; errors of several cases make one norm, since a lone number may round luckily."""
    got = [outputs(module, case) for case in cases]
    plain = [plain_outputs(case) for case in cases]
    exact = [(case.exact_forward(), case.exact_transpose(), *case.exact_backward()) for case in cases]
    for ours, torchs, right in zip(*(zip(*them, strict=True) for them in (got, plain, exact)), strict=True):
        assert [t.shape for t in ours] == [t.shape for t in right]
        assert_no_worse_than_torch(*(torch.cat([t.flatten() for t in ts]) for ts in (ours, right, torchs)))


def launched(module):
    return {base_name(name) for name in module.launches()}


@pytest.fixture(params=DEVICES)
def device(request, plain):
    plain.configure(**DEVICES[request.param])
    return plain


# --- right ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("T", TOKENS)
def test_every_token_count(plain, T, dtype, param_dtype):
    plain.configure(sms=1000, shared_per_block=20000)
    check(plain, make_case(19, 19, T, "random", dtype, param_dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [33, 150])
def test_every_block_size(device, n, dtype):
    check(device, make_case(n, n, 130, "random", dtype, dtype))
    assert launched(device) == PRODUCT_TILES | GRADIENT_TILES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pattern(plain, shape, kind, dtype):
    plain.configure(sms=1000, shared_per_block=20000)
    for lam in {shape[0] == shape[1], False}:  # square, and yet without a diagonal
        few = kind == "one" or min(shape) < 3 or (kind == "gaps" and min(shape) < 33)
        for T in (9, 67):
            check(plain, *(make_case(*shape, T, kind, dtype, dtype, lam=lam, seed=s) for s in range(12 if few else 1)))


@pytest.mark.parametrize("layout", ["feature_major", "feature_pitched"])
def test_rows_longer_than_a_window_and_a_chunk(device, layout):
    """Full rows, columns and matrices: windows of 8 entries, chunks of 32, many in one feature block."""
    for kind in ("full_row", "full_column", "dense"):
        for T in (5, 66):
            check(device, make_case(101, 101, T, kind).laid_out(layout))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "aligned_pitch"])
def test_every_layout(plain, layout, dtype):
    """Rows that start anywhere, and rows of 16-byte vectors in a larger buffer: no other bits but where few tokens are
    read one by one instead of in vectors, which sums in another order."""
    for T in (16, 24, 33, 72, 80):
        case = make_case(40, 40, T, "random", dtype, dtype)
        if layout == "aligned_pitch":
            case.u, case.z = (
                torch.nn.functional.pad(x, (0, 16 + -T % 8), value=torch.nan)[:, :T] for x in (case.u, case.z)
            )
        else:
            case = case.laid_out(layout)
        got, dense = outputs(plain, case), outputs(plain, case.laid_out("feature_major"))
        for a, b in zip(got, dense, strict=True):
            if T > 64:
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b)
        for a, b in zip(outputs(plain, case, token_major=True), got, strict=True):
            assert torch.equal(a, b)


def test_wide_indices(device):
    """int32 indices, as patterns of more than 65,536 features have: the same sums."""
    for T in (7, 70):
        case = make_case(60, 60, T)
        narrow = outputs(device, case)
        views = [(ptr, index.to(torch.int32), perm) for ptr, index, perm in (case.pattern.csr, case.pattern.csc)]
        w = ops(device).native_sparse_core(case.z, case.lam, case.values, *views[0])
        grads = ops(device).native_sparse_core_backward(case.u, case.z, case.lam, case.values, *views[1], ALL)
        assert torch.equal(w, narrow[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, narrow[2:], strict=True))


def test_more_features_than_16_bits_count(plain):
    m, n, T = 3, 66000, 65
    cols = torch.arange(n).repeat_interleave(2)[: n + 4000]
    rows = torch.arange(n + 4000) % m
    pattern = fk.SparsePattern(rows, cols, (m, n))
    assert pattern.csr[1].dtype == torch.int32
    z, values = torch.randn(n, T), torch.randn(cols.numel())
    got = torch.ops.simt.native_sparse_core(z, None, values, *pattern.csr)
    want = torch.zeros(m, T, dtype=torch.float64).index_add(0, rows, values.double()[:, None] * z.double()[cols])
    assert_no_worse_than_torch(got, want, reference.sparse_core(z, None, values, *pattern.csr))
    assert launched(plain) == PRODUCT_TILES


@pytest.mark.parametrize("m, n", [(0, 0), (0, 5), (5, 0)])
def test_empty_matrices(plain, m, n):
    case = make_case(m, n, 7)
    assert torch.equal(torch.ops.simt.native_sparse_core(*case.forward), torch.zeros(m, 7))
    got = torch.ops.simt.native_sparse_core_backward(*case.backward, ALL)
    assert [tuple(t.shape) for t in got] == [(n, 7), (0,), (0,)] and not got[0].any()


def test_no_tokens_give_zero_gradients(plain):
    _, _, dz, dlam, dvalues = outputs(plain, make_case(9, 9, 0))
    assert dz.shape == (9, 0) and not dlam.any() and not dvalues.any()


@pytest.mark.parametrize("needs", [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
@pytest.mark.parametrize("T", [20, 100])
def test_what_is_not_needed_is_empty(plain, needs, T):
    """Leaving something out changes no bit of the rest."""
    for dtype, param_dtype in DTYPES:
        for lam in (True, False):
            case = make_case(33, 33, T, "random", dtype, param_dtype, lam=lam)
            needs = [bool(need) for need in needs]
            got = torch.ops.simt.native_sparse_core_backward(*case.backward, needs)
            everything = torch.ops.simt.native_sparse_core_backward(*case.backward, ALL)
            for part, whole, need in zip(got, everything, needs, strict=True):
                assert part.dtype == whole.dtype
                if not need:
                    assert part.numel() == 0
                elif part is got[1] and not needs[2]:  # a pass for dlam alone sums in another order
                    torch.testing.assert_close(part, whole)
                else:
                    assert torch.equal(part, whole)


@pytest.mark.parametrize("lam_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("T", [9, 70])
def test_lam_and_values_of_different_dtypes(plain, T, lam_dtype):
    for dtype in FLOATS[1:]:
        for value_dtype in (torch.float32, torch.float16):
            case = make_case(40, 40, T, "random", dtype, value_dtype)
            case.lam = case.lam.to(lam_dtype)
            *_, dlam, dvalues = outputs(plain, case)
            assert dlam.dtype == lam_dtype and dvalues.dtype == value_dtype
            check(plain, case)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("T", [40, 99])
def test_nan_and_infinity_travel_along_entries_only(device, T, dtype):
    case = make_case(60, 60, T, "gaps", dtype, dtype)
    case.z[4, 7], case.z[5, T - 1], case.u[3, 0] = float("nan"), float("inf"), -float("inf")
    for part, same in zip(outputs(device, case), plain_outputs(case), strict=True):
        assert torch.equal(part.isnan(), same.isnan())
        assert torch.equal(part.isinf(), same.isinf())


def test_long_sums_stay_accurate(plain):
    """Sums go on from tile to tile in float32 only for so long; splits join in float64."""
    plain.configure(sms=1)  # the fewest splits
    case = make_case(4, 4, 4096, "dense")
    case.u, case.z = case.u + 1, case.z + 1  # a mean, so that the sum grows and its rounding with it
    check(plain, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_storage_is_the_float32_sum_rounded_once(device, dtype):
    case = make_case(60, 60, 77, "random", dtype)
    wide = case.laid_out("feature_major")
    wide.u, wide.z = case.u.float(), case.z.float()
    for narrow, rounded in zip(outputs(device, case)[:3], outputs(device, wide)[:3], strict=True):
        assert torch.equal(narrow, rounded.to(dtype))


# --- repeatable -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", [*SCHEDULES, dict(threads=2)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("T", [17, 150])
def test_same_bits_in_every_schedule(plain, T, dtype, schedule):
    small = dict(sms=1000, shared_per_block=20000)
    case = make_case(50, 50, T, "random", dtype)
    plain.configure(**small)
    first = outputs(plain, case)
    plain.configure(**small, **schedule)
    for a, b in zip(first, outputs(plain, case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_have_the_same_bits_on_every_device(plain, dtype):
    """Block sizes change where a sum is made, not its order. (Gradients split the tokens as the device suggests.)"""
    case = make_case(70, 70, 150, "random", dtype)
    runs = []
    for device in DEVICES.values():
        plain.configure(**device)
        runs.append(outputs(plain, case, [True, False, False])[:3])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


# --- checked ----------------------------------------------------------------------------------------------------------
@pytest.mark.kernel("product_rows_kernel", "gradient_rows_kernel", "reduce_sources_kernel")
@pytest.mark.parametrize("schedule", [{}, *SCHEDULES[:3]], ids=str)
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_rows_kernels_are_clean(checker, dtype, param_dtype, schedule):
    for T in (1, 5, 16, 40):
        checker.configure(**schedule)
        check(checker, *(make_case(37, 37, T, "random", dtype, param_dtype, seed=seed) for seed in range(2)))
    assert checker.reports() == []


@pytest.mark.kernel(*PRODUCT_TILES, *GRADIENT_TILES)
@pytest.mark.parametrize("schedule", [{}, *SCHEDULES], ids=str)
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_tiles_kernels_are_clean(checker, dtype, param_dtype, schedule):
    """Several feature blocks, tiles and splits; rows aligned and not."""
    checker.configure(**schedule, sms=1000, shared_per_block=20000)
    for T in (69, 136):
        check(checker, make_case(45, 45, T, "random", dtype, param_dtype))
    assert checker.reports() == []
    assert launched(checker) == PRODUCT_TILES | GRADIENT_TILES


@pytest.mark.kernel(*PRODUCT_TILES, *GRADIENT_TILES)
def test_large_blocks_are_clean(checker):
    checker.configure(sms=1, shared_per_block=101376)
    for kind in ("random", "full_row", "full_column"):
        check(checker, make_case(100, 100, 130, kind))
    assert checker.reports() == []


def test_under_the_sanitisers():
    script = """
from tests.support import make_case
simt.configure(sms=1000, shared_per_block=20000)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for T in (1, 16, 33, 67, 72):
        case = make_case(41, 41, T, "random", dtype, torch.float32)
        w = torch.ops.simt_asan.native_sparse_core(*case.forward)
        grads = torch.ops.simt_asan.native_sparse_core_backward(*case.backward, [True] * 3)
        assert all(part.isfinite().all() for part in (w, *grads))
print("came through")
"""
    (end,) = executor.under_asan([script])
    assert end.status == 0 and "came through" in end.output, end.output


# --- economical -------------------------------------------------------------------------------------------------------
class Economy:
    """Requests of one kernel: bytes moved, and how many sectors or wavefronts above the least."""

    def __init__(self, module, kernel):
        self.sites = [site for site in module.sites() if base_name(site["kernel"]) == kernel]

    def of(self, space, write, size):
        found = [s for s in self.sites if (s["space"], s["write"], s["bytes"]) == (space, write, size)]
        assert found, f"no {size}-byte {'stores' if write else 'loads'} of {space} memory"
        return found

    def ratio(self, space, write, size):
        unit = "sectors" if space == "global" else "wavefronts"
        found = self.of(space, write, size)
        return sum(s[unit] for s in found) / sum(s[f"{unit}_least"] for s in found)

    def sectors(self, write, size):
        return sum(s["sectors"] for s in self.of("global", write, size))


@pytest.mark.kernel(*PRODUCT_TILES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_economy_of_the_product(checker, dtype):
    """Every global access of the main path moves whole sectors; the gather has no bank conflicts at all."""
    n, T = 256, 192
    checker.configure(sms=1, shared_per_block=101376)
    case = make_case(n, n, T, "random", dtype, lam=False)
    ops(checker).native_sparse_core(*case.forward)
    cost = Economy(checker, "product_tiles_kernel")
    entry = 16 if dtype == torch.float64 else 8
    row_blocks = 1 if dtype.itemsize > 2 else 1
    features = row_blocks * n * T * dtype.itemsize // 32
    if entry == 8:  # else entries are 16-byte loads as well
        assert cost.sectors(False, 16) == features, "`in` is read once per row block"
        assert cost.ratio("global", False, 8) <= 1.1
        assert cost.ratio("shared", True, 8) <= 1.15 and cost.ratio("shared", False, 8) <= 1.15
    assert cost.ratio("global", False, 16) <= 1.1 and cost.ratio("global", True, 16) <= 1.1
    assert cost.ratio("shared", True, 16) <= 1.15
    assert cost.ratio("shared", False, 16) == 1.0, "the gather's conflict factor"
    assert cost.sectors(True, 16) == n * T * dtype.itemsize // 32
    packing = Economy(checker, "pack_entries_kernel")
    assert packing.ratio("global", True, entry) <= 1.1 and packing.ratio("global", False, 2) <= 1.1
    assert checker.reports() == []


@pytest.mark.kernel(*GRADIENT_TILES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_economy_of_the_gradient(checker, dtype):
    """As the product. Index windows of 16 bits fill half a sector; sums in flight start where a row starts."""
    n, T = 256, 192
    checker.configure(sms=1, shared_per_block=101376)
    case = make_case(n, n, T, "random", dtype)
    ops(checker).native_sparse_core_backward(*case.backward, [False, True, True])
    cost = Economy(checker, "gradient_tiles_kernel")
    acc = 8 if dtype == torch.float64 else 4
    rows = n * T * dtype.itemsize // 32
    assert cost.sectors(False, 16) == 3 * rows, "z once, u once for dvalues and once for dlam"
    assert cost.ratio("global", False, 16) <= 1.1
    assert cost.ratio("global", False, 2) <= 2.0
    assert cost.ratio("global", True, acc) <= 1.15
    assert cost.ratio("shared", True, 16) <= 1.15
    assert cost.ratio("shared", True, 4) <= 1.15 and cost.ratio("shared", False, 4) <= 1.15
    assert cost.ratio("shared", False, 16) == 1.0, "the gather's conflict factor"
    assert Economy(checker, "reduce_sources_kernel").ratio("global", False, acc) <= 1.1
    assert checker.reports() == []


@pytest.mark.kernel("product_rows_kernel", "gradient_rows_kernel")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("T", [16, 32, 64])
def test_economy_of_few_tokens(checker, T, dtype):
    """Where rows are whole sectors, nothing but whole sectors of features is read or written."""
    case = make_case(128, 128, T, "random", dtype)
    ops(checker).native_sparse_core(*case.forward)
    ops(checker).native_sparse_core_backward(*case.backward, [False, True, True])
    product = Economy(checker, "product_rows_kernel")
    assert product.ratio("global", False, 16) <= 1.1 and product.ratio("global", True, 16) <= 1.1
    assert Economy(checker, "gradient_rows_kernel").ratio("global", False, 16) <= 1.1
    assert checker.reports() == []
