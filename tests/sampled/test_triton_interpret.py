# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the sampled product and the scatter, run by Triton's interpreter.

``make test`` runs this file in a process with TRITON_INTERPRET=1, which Triton reads when it is imported. The
interpreter rounds to bfloat16 wrongly and multiplies its bit patterns: bfloat16 is read and copied here, features are
multiplied as float32, and what rounds to it is compiled (``test_aot_triton.py``) but not run.
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
from frodkernels import ops
from frodkernels.reference import sampled as reference
from frodkernels.triton_kernels import _config
from frodkernels.triton_kernels import sampled as kernels
from tests.support import KINDS, LAYOUTS, Case, assert_no_worse_than_torch, make_case, names

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F16, F16), (F16, F32), (BF16, F32), (F64, F64), (F32, F64), (F64, F16)]  # features, result
dtypes = pytest.mark.parametrize("dtype, result", DTYPES, ids=[names(*pair) for pair in DTYPES])
both_ways = pytest.mark.parametrize("tiled", [False, True], ids=["entries", "tiled"])
# Many blocks of a small matrix, rows of several rounds, parts of two tiles
SMALL = _config.SampledConfig(4, 8, 16, 2, fold=2, num_warps=8, num_stages=2)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "SAMPLED_TILES", dict.fromkeys((2, 4, 8), SMALL))


def views(case: Case):
    """a, b and the plan: S^T's groups are columns, S's are rows."""
    return [(case.u, case.z, *case.pattern.csc), (case.z, case.u, *case.pattern.csr)]


def exact(case: Case):
    return case._exact(case.u, case.z.t())[case.rows, case.cols]


def check(case, result=F32, tiled=True):
    for args in views(case):
        got = kernels.sampled_product(*args, result, tiled)
        assert got.is_contiguous()
        assert_no_worse_than_torch(got, exact(case), reference.sampled_product(*args, result))


@both_ways
@dtypes
@pytest.mark.parametrize("m, n, T", [(7, 19, 5), (66, 7, 33)])
def test_dtypes(m, n, T, dtype, result, tiled):
    case = make_case(m, n, T, "random", dtype, lam=False)
    if result == F64 != dtype:  # the yardstick's own precision
        for args in views(case):
            torch.testing.assert_close(
                kernels.sampled_product(*args, result, tiled), exact(case), rtol=1e-13, atol=1e-14
            )
    else:
        check(case, result, tiled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m, n, T", [(6, 30, 20), (13, 9, 50)])
def test_kinds_of_pattern(small_tiles, kind, m, n, T):
    check(make_case(m, n, T, kind, lam=False))


@pytest.mark.parametrize("m, n", [(1, 1), (1, 40), (40, 1), (64, 128), (65, 129)])
def test_one_past_a_block(m, n):
    check(make_case(m, n, 3, "random", F16, lam=False), F16)


@pytest.mark.parametrize("ranges, splits", [(1, 1), (1, 3), (2, 2), (4, 1), (4, 3)])
def test_ranges_and_splits(small_tiles, monkeypatch, ranges, splits):
    def grid(config, groups, features, tokens):
        blocks, tiles = -(-features // config.block_n), -(-tokens // config.block_t)
        return -(-groups // config.block_r), ranges, splits, -(-blocks // ranges), -(-tiles // splits)

    monkeypatch.setattr(kernels, "sampled_grid", grid)
    check(make_case(21, 33, 50, "full_row", lam=False))


def test_a_range_is_found_in_long_rows(small_tiles, monkeypatch):
    """Rows of 600 entries and of none: three rounds of the search."""
    monkeypatch.setattr(_config, "SAMPLED_PROGRAMS", 4)
    rows = torch.arange(1, 6, 2).repeat_interleave(600)
    cols = torch.cat([torch.randperm(900)[:600] for _ in range(3)])
    pattern = fk.SparsePattern(rows, cols, (7, 900))
    a, b = torch.randn(900, 3), torch.randn(7, 3)
    got = kernels.sampled_product(a, b, *pattern.csr, F32, True)
    torch.testing.assert_close(got, (b @ a.t())[rows, cols])


def test_grid_covers_everything_and_nothing_is_empty():
    for config in (*_config.SAMPLED_TILES.values(), SMALL):
        for groups, features, tokens in (
            (1, 1, 1),
            (1, 10**9, 64),
            (4096, 4096, 1024),
            (64, 129, 8192),
            (10**6, 7, 65),
        ):
            rows, ranges, splits, per_range, per_split = _config.sampled_grid(config, groups, features, tokens)
            blocks, tiles = -(-features // config.block_n), -(-tokens // config.block_t)
            assert rows * config.block_r >= groups > (rows - 1) * config.block_r
            assert (ranges - 1) * per_range < blocks <= ranges * per_range
            assert (splits - 1) * per_split < tiles <= splits * per_split
            assert ranges * splits <= _config.SAMPLED_PROGRAMS
            assert ranges * per_range * config.block_n < 2**31 and kernels._LIMIT + 2**17 < 2**31


@both_ways
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T, dtype", [(8, F32), (21, F16)], ids=str)
def test_layout_changes_nothing(layout, T, dtype, tiled):
    case = make_case(5, 16, T, "random", dtype, lam=False).laid_out(layout)
    other = "feature_major" if layout == "token_major" else "token_major"
    for mixed in (case, Case(case.u, LAYOUTS[other](case.z), None, case.values, case.rows, case.cols, case.pattern)):
        for args, plain in zip(views(mixed), views(case.laid_out("feature_major")), strict=True):
            got = kernels.sampled_product(*args, F32, tiled)
            assert torch.equal(got, kernels.sampled_product(*plain, F32, tiled))


def test_only_what_cannot_be_read_widely_is_copied():
    x = torch.randn(24, 32)
    for whole in (x, x.t(), x[:, :16], x.t()[:8], x[:1].expand(24, 32)):
        got, tokens = kernels._operand(whole)
        assert got is whole and tokens == (whole.stride(1) == 1)
    for part in (x[:, :15], x.t()[:15], x[:, 1:17], x[:, ::2], x[:, :1].expand(24, 32), torch.randn(6, 7).t()):
        got, tokens = kernels._operand(part)
        unit, adjacent = 4, got if tokens else got.t()
        assert torch.equal(got, part) and adjacent.stride(1) == 1 and adjacent.stride(0) % unit == 0
        filled = adjacent.as_strided((adjacent.shape[0], adjacent.stride(0)), adjacent.stride())
        assert not filled[:, adjacent.shape[1] :].any()


@both_ways
@pytest.mark.parametrize(
    "m, n, T, kind", [(6, 5, 0, "random"), (6, 5, 4, "empty"), (0, 5, 4, "empty"), (5, 0, 4, "empty")]
)
def test_nothing_to_do(m, n, T, kind, tiled):
    case = make_case(m, n, T, kind, lam=False)
    for args in views(case):
        got = kernels.sampled_product(*args, F16, tiled)
        assert got.dtype == F16 and torch.equal(got, torch.zeros(case.rows.numel(), dtype=F16))


@both_ways
@pytest.mark.parametrize("n", [2**16, 2**16 + 1])
def test_widest_narrow_and_narrowest_wide_index(monkeypatch, n, tiled):
    monkeypatch.setattr(_config, "SAMPLED_PROGRAMS", 8)  # they would be 1,024
    rows, cols = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 32767, 32768, 40000, n - 1, n - 1])
    pattern = fk.SparsePattern(rows, cols, (3, n))
    assert pattern.csr.indices.dtype == (torch.uint16 if n <= 2**16 else torch.int32)
    a, b = torch.randn(n, 3), torch.randn(3, 3)
    torch.testing.assert_close(kernels.sampled_product(a, b, *pattern.csr, F32, tiled), (a[cols] * b[rows]).sum(1))


@both_ways
def test_more_than_2_31_places(tiled):
    m, n = 1030, 2**21 + 9
    rows, cols = torch.tensor([1029, 3, 1029, 500, 0]), torch.tensor([2**21 + 8, 5, 0, 2**20, 2**21 + 8])
    pattern = fk.SparsePattern(rows, cols, (m, n))
    assert m * n > 2**31
    a, b = torch.randn(n, 4), torch.randn(m, 4)
    torch.testing.assert_close(kernels.sampled_product(a, b, *pattern.csr, F32, tiled), (a[cols] * b[rows]).sum(1))


@both_ways
def test_repeats_bit_for_bit(tiled):
    for args in views(make_case(6, 20, 300, lam=False)):
        once, again = (kernels.sampled_product(*args, F32, tiled) for _ in range(2))
        assert torch.equal(once, again)


@pytest.mark.filterwarnings("ignore:invalid value")  # NaN that is computed, and not kept
@both_ways
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_entries(bad, tiled):
    rows, cols = torch.tensor([0, 2, 3, 3]), torch.tensor([1, 1, 0, 2])
    pattern = fk.SparsePattern(rows, cols, (4, 4))
    a, b = torch.ones(4, 7), torch.ones(4, 7)
    a[1, 2], b[1, 3] = bad, bad
    got = kernels.sampled_product(a, b, *pattern.csr, F32, tiled)
    torch.testing.assert_close(got, torch.tensor([bad, bad, 7.0, 7.0]), equal_nan=True)


def test_long_sums_keep_their_precision(monkeypatch):
    """What parts are for: over 4,096 tokens, 256 tiles in fp32, one running sum misses the bar."""
    monkeypatch.setattr(_config, "SAMPLED_PROGRAMS_LEAST", 1)  # one split
    check(make_case(12, 40, 4096, "dense", lam=False))


@settings(max_examples=15)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 40),
    T=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([F32, F16, F64]),
    tiled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(m, n, T, kind, dtype, tiled, seed):
    """|error| <= 32 roundings of the accumulator on the sum of |products|, plus the last one, entry by entry."""
    case = make_case(m, n, T, kind, dtype, lam=False, seed=seed)
    want = exact(case)
    magnitude = (case.u.double().abs() @ case.z.double().abs().t())[case.rows, case.cols]
    info = torch.finfo(dtype)
    bound = 32 * torch.finfo(F64 if dtype == F64 else F32).eps * magnitude + 0.51 * info.eps * want.abs()
    for args in views(case):
        got = kernels.sampled_product(*args, dtype, tiled)
        assert ((got.double() - want).abs() <= bound + info.smallest_normal).all()


def test_bad_arguments_are_named():
    case = make_case(6, 5, 4, lam=False)
    a, b, *plan = views(case)[0]
    with pytest.raises(ValueError, match="b is on meta"):
        kernels.sampled_product(a, b.to("meta"), *plan, F32)
    with pytest.raises(ValueError, match="b must be"):
        kernels.sampled_product(a, b[:, 1:], *plan, F32)
    with pytest.raises(ValueError, match="must share a dtype"):
        kernels.sampled_product(a, b.half(), *plan, F32)
    with pytest.raises(ValueError, match="2147483647 tokens"):
        kernels.sampled_product(a[:, :1].expand(6, 2**31 - 1), b[:, :1].expand(5, 2**31 - 1), *plan, F32, True)
    weight, values, plan = torch.zeros(6, 5), case.values, case.pattern.csr
    with pytest.raises(ValueError, match="weight must be"):
        kernels.scatter_values_(weight[1:], values, *plan, 1.0, True, None)
    with pytest.raises(ValueError, match="values must be"):
        kernels.scatter_values_(weight, values[1:], *plan, 1.0, True, None)
    with pytest.raises(ValueError, match="old must be"):
        kernels.scatter_values_(weight, values, *plan, 1.0, True, values[1:])
    with pytest.raises(ValueError, match="old must have"):
        kernels.scatter_values_(weight, values, *plan, 1.0, True, values.half())


# ---- scatter ---------------------------------------------------------------------------------------------------------

INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PLACES = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.t().contiguous().t(),
    "pitched": lambda w: w.new_zeros(w.shape[0] + 1, w.shape[1] + 3)[1:, 2:-1].copy_(w),
    "strided": lambda w: w.new_zeros(2 * w.shape[0], 3 * w.shape[1])[::2, 1::3].copy_(w),
}
PAIRS = [(F32, F32), (F16, F32), (F16, F16), (F64, F64), (F32, BF16), (F32, F64), (F64, F16)]  # weight, values


def bits(tensor):
    return tensor.view(INTS[tensor.element_size()])


def random_bits(shape, dtype):
    """Every bit pattern, NaN payloads and all."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(-(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1, shape).to(INTS[size]).view(dtype)


def scatter_both(weight, values, plan, scale, accumulate, old=None):
    """The kernel's weight and old, and the reference's."""
    found = []
    for module in (kernels, reference):
        w, o = weight.clone(), None if old is None else old.clone()
        assert module.scatter_values_(w, values, *plan, scale, accumulate, o) is None
        found.append((w, o))
    return found


@pytest.mark.parametrize("weight, values", PAIRS, ids=[names(*pair) for pair in PAIRS])
@pytest.mark.parametrize("scale, accumulate", [(1.0, False), (0.3, False), (1.0, True), (-1.7, True), (0.0, True)])
def test_scatter_is_the_reference_bit_for_bit(weight, values, scale, accumulate):
    case = make_case(7, 33, 1, "random", param_dtype=values, lam=False)
    matrix, old = torch.randn(7, 33, dtype=F64).to(weight), torch.zeros(case.rows.numel(), dtype=weight)
    for plan, w in ((case.pattern.csr, matrix), (case.pattern.csc, matrix.t())):
        (got, was), (want, before) = scatter_both(w, case.values, plan, scale, accumulate, old)
        assert torch.equal(got, want) and torch.equal(was, before)
        assert torch.equal(was, matrix[case.rows, case.cols])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m, n", [(40, 70), (1, 700), (600, 1)])  # several programs of a scatter
def test_scatter_kinds_of_pattern(kind, m, n):
    case = make_case(m, n, 1, kind, lam=False)
    (got, _), (want, _) = scatter_both(torch.randn(m, n), case.values, case.pattern.csr, 0.5, True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=names)
@pytest.mark.parametrize("place", PLACES)
def test_scatter_copies_bits_and_can_be_undone(dtype, place):
    case = make_case(9, 14, 1, "random", lam=False)
    nnz = case.rows.numel()
    weight = PLACES[place](random_bits((9, 14), dtype))
    values, old = random_bits((nnz, 2), dtype)[:, 1], random_bits((nnz, 3), dtype)[:, 0]
    before = weight.clone()
    kernels.scatter_values_(weight, values, *case.pattern.csr, 1.0, False, old)
    want = bits(before.clone())
    want[case.rows, case.cols] = bits(values)
    assert torch.equal(bits(weight), want)
    assert torch.equal(bits(old), bits(before)[case.rows, case.cols])
    kernels.scatter_values_(weight, old, *case.pattern.csr, 1.0, False, None)
    assert torch.equal(bits(weight), bits(before))


@pytest.mark.filterwarnings("ignore:invalid value")  # the numbers are not what is looked at
@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=names)
def test_scatter_keeps_old_bits_where_it_computes(dtype):
    case = make_case(9, 14, 1, "random", lam=False)
    weight, old = random_bits((9, 14), dtype), torch.empty(case.rows.numel(), dtype=dtype)
    before = bits(weight.clone())
    kernels.scatter_values_(weight, case.values, *case.pattern.csr, 0.3, True, old)
    assert torch.equal(bits(old), before[case.rows, case.cols])
    kernels.scatter_values_(weight, old, *case.pattern.csr, 1.0, False, None)
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("n", [2**16, 2**16 + 1])
def test_scatter_wide(n):
    rows, cols = torch.tensor([0, 2, 2, 2]), torch.tensor([n - 1, 0, 40000, n - 1])
    pattern = fk.SparsePattern(rows, cols, (4, n))
    (got, _), (want, _) = scatter_both(torch.zeros(4, n, dtype=F16), torch.randn(4), pattern.csr, 1.0, True)
    assert torch.equal(got, want) and got.count_nonzero() == 4


def test_serves_the_registered_ops():
    case = make_case(8, 10, 12, lam=False)
    args = views(case)[1]
    results = []
    for name in ("triton", "reference"):
        weight, old = torch.ones(8, 10), torch.zeros(case.rows.numel())
        with fk.backend(name):
            products = [ops.sampled.sampled_product(*args, F32, tiled) for tiled in (False, True)]
            ops.sampled.scatter_values_(weight, case.values, *case.pattern.csr, 0.5, True, old)
        results.append((*products, weight, old))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
