# SPDX-License-Identifier: Apache-2.0
"""Sampling a product by the native CPU kernels, both ways, at every instruction set, against float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import frodkernels as fk
from frodkernels.reference import sampled as reference
from tests.sampled.cases import SAMPLED_DTYPES, make_sampling
from tests.support import KINDS, LAYOUTS, assert_no_worse_than_torch, names

WAYS = {"entries": False, "blocks": True}
# around the ends of vectors, of pairs of tokens, of the tiles of one way and of the chains of the other
TOKENS = [1, 2, 3, 15, 17, 33, 63, 65, 127, 128, 129, 255, 257, 1000]
# around the ends of vectors, of register blocks and of blocks
SHAPES = [(1, 1), (7, 5), (1, 300), (300, 1), (48, 49), (192, 193), (200, 390)]
native = torch.ops.frodkernels.native_sampled_product


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def tiled(request):
    return request.param


def check(*cases, tiled):
    """Both views; the errors of all cases make the norm, so that one luckily rounded sum decides nothing."""
    for view in ("by_columns", "by_rows"):
        got, exact, plain = [], [], []
        for case in cases:
            arguments = getattr(case, view)
            got.append(native(*arguments, tiled))
            plain.append(reference.sampled_product(*arguments))
            exact.append(case.exact())
        assert_no_worse_than_torch(torch.cat(got), torch.cat(exact), torch.cat(plain))


@pytest.mark.parametrize("features, dtype", SAMPLED_DTYPES, ids=[names(*pair) for pair in SAMPLED_DTYPES])
@pytest.mark.parametrize("T", TOKENS)
def test_every_token_count(isa, T, features, dtype, tiled):
    check(*(make_sampling(37, 53, T, "random", features, dtype, seed) for seed in range(2)), tiled=tiled)


@pytest.mark.parametrize("features", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(isa, shape, features, tiled):
    dtype = torch.float64 if features == torch.float64 else torch.float32
    seeds = 24 if min(shape) < 10 else 1
    check(*(make_sampling(*shape, 70, "random", features, dtype, seed) for seed in range(seeds)), tiled=tiled)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pattern(isa, kind, tiled):
    seeds = 24 if kind in ("one", "gaps") else 2
    check(*(make_sampling(20, 35, 37, kind, seed=seed) for seed in range(seeds)), tiled=tiled)


@pytest.mark.parametrize("features", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_every_pair_of_layouts(isa, first, second, features, tiled):
    """Padding between features is NaN: whoever reads it shows it."""
    dtype = torch.float64 if features == torch.float64 else torch.float32
    for n, T in ((70, 67), (18, 9)):
        case = make_sampling(n, n + 3, T, "random", features, dtype)
        plain = case.laid_out(first, second)
        same = plain.laid_out("feature_major")  # the numbers that an expanded layout leaves
        for view in ("by_columns", "by_rows"):
            assert torch.equal(native(*getattr(plain, view), tiled), native(*getattr(same, view), tiled))
        if "expanded" not in first + second:
            check(plain, tiled=tiled)


@pytest.mark.parametrize("m, n, T", [(0, 0, 3), (0, 5, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)])
def test_nothing_to_sum(isa, m, n, T, tiled):
    for kind in ("empty", "random"):
        case = make_sampling(m, n, T, kind)
        for view in (case.by_columns, case.by_rows):
            got = native(*view, tiled)
            assert got.shape == (case.pattern.nnz,) and not got.any()


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_whatever_the_threads(features, tiled):
    case = make_sampling(500, 450, 700, "random", features)
    first = native(*case.by_columns, tiled)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(native(*case.by_columns, tiled), first)


def test_calls_from_many_threads_at_once(tiled):
    """Scratch memory belongs to a thread."""
    cases = [make_sampling(60 + 31 * i, 90, 50 + 100 * i, "random", seed=i) for i in range(4)]
    want = [native(*case.by_columns, tiled) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, right in zip(pool.map(lambda case: native(*case.by_columns, tiled), cases), want, strict=True):
                assert torch.equal(got, right)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_feature_that_is_not_finite_spoils_its_own_entries_only(isa, features, bad, tiled):
    case = make_sampling(60, 70, 90, "random", features)
    case.a[11, 40] = bad
    got = native(*case.by_columns, tiled)
    mine = case.rows == 11
    assert mine.any() and not got[mine].isfinite().any() and got[~mine].isfinite().all()
    plain = reference.sampled_product(*case.by_columns)
    assert torch.equal(got.isnan(), plain.isnan())


@pytest.mark.parametrize("m, n", [(3, 65_536), (65_537, 5), (70_001, 70_001)])
def test_wide_and_huge_matrices(m, n, tiled):
    """Indices of 32 bits, and m n beyond 2^31 and 2^32: nothing is allocated in proportion to it."""
    g = torch.Generator().manual_seed(0)
    flat = torch.randint(0, m * n, (4000,), generator=g).unique()
    rows, cols = torch.cat([flat // n, torch.tensor([m - 1])]), torch.cat([flat % n, torch.tensor([n - 1])])
    keep = torch.ones(rows.numel(), dtype=torch.bool)
    keep[:-1] = (rows[:-1] != m - 1) | (cols[:-1] != n - 1)
    rows, cols = rows[keep], cols[keep]
    pattern = fk.SparsePattern(rows, cols, (m, n))
    a, b = torch.randn(m, 5, generator=g), torch.randn(n, 5, generator=g)
    exact = (a.double()[rows] * b.double()[cols]).sum(1)
    for arguments in ((a, b, *pattern.csc, torch.float32), (b, a, *pattern.csr, torch.float32)):
        assert_no_worse_than_torch(native(*arguments, tiled), exact, reference.sampled_product(*arguments))


def test_long_sums_stay_accurate(tiled):
    """A single chain of additions would lose what plain torch's trees keep."""
    case = make_sampling(30, 30, 40_000, "random")
    check(case, tiled=tiled)
