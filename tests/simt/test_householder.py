# SPDX-License-Identifier: Apache-2.0
"""The Householder kernels, run by the executor: right for every shape, dtype, layout and device, and repeatable."""

import pytest
import torch

from tests.simt.householder_cases import (
    BF16,
    F16,
    F32,
    F64,
    FMA,
    FMA_GRADIENT,
    MMA,
    MMA_GRADIENT,
    NARROW,
    PAIR_IDS,
    PAIRS,
    SCHEDULES,
    check,
    grid_of,
    launched,
    make,
    ops,
    outputs,
    plain_outputs,
)
from tests.support import assert_no_worse_than_torch

# T, n, r, m: around tiles of 16 and 32 tokens, chunks of 64, 128 and 256 features, groups of 8, 16, 32 and 64 ranks
SHAPES = [
    (1, 7, 1, None),
    (5, 16, 7, None),
    (17, 33, 8, None),
    (33, 129, 9, None),
    (16, 128, 16, None),
    (31, 130, 17, None),
    (32, 64, 32, None),
    (40, 72, 33, 40),
    (3, 264, 64, 8),
    (70, 384, 16, None),
    (50, 40, 65, 200),
    (20, 256, 97, None),
    (19, 136, 128, 24),
]
# The ring holds everything, some or hardly anything; one block, a few or many.
DEVICES = {
    "roomy": dict(sms=1000, shared_per_block=232448),
    "small": dict(sms=2, shared_per_block=101376),
    "tight": dict(sms=1, shared_per_block=80000),
}


@pytest.fixture(params=DEVICES)
def device(request, plain):
    plain.configure(**DEVICES[request.param])
    return plain


# --- right ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens, sums", PAIRS, ids=PAIR_IDS)
def test_every_shape(device, tokens, sums):
    cases = [make(*shape[:3], tokens, sums, shape[3], seed) for seed, shape in enumerate(SHAPES)]
    check(device, *cases[:4])
    for case in cases[4:]:
        check(device, case)


@pytest.mark.parametrize("tokens", NARROW, ids=str)
@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5])
def test_every_block_of_tokens(plain, tiles, tokens):
    """The launcher takes the block that fills the device in one round."""
    T = 232
    blocks = -(-T // (16 * tiles))
    plain.configure(sms=blocks)
    case = make(T, 136, 24, tokens)
    got = outputs(plain, case)
    assert grid_of(plain, "householder_mma_kernel") == 2 * blocks  # forward and backward
    plain.configure(sms=1000)
    again = outputs(plain, case)
    assert all(torch.equal(a, b) for a, b in zip(got[:4], again[:4], strict=True)), "blocks change no sum's order"
    check(plain, case)


@pytest.mark.parametrize("tokens", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("shared", [80000, 101376, 232448])
@pytest.mark.parametrize("m", [None, 520])
def test_every_ring(plain, m, shared, tokens):
    """Many chunks and few slots: those kept from pass one are read where they lie. Rings change no bit."""
    sums = F64 if tokens == F64 else F32
    case = make(20, 1000, 8, tokens, sums, m)
    plain.configure(sms=1000)
    first = outputs(plain, case)
    plain.configure(sms=1000, shared_per_block=shared)
    assert all(torch.equal(a, b) for a, b in zip(outputs(plain, case)[:4], first[:4], strict=True))
    check(plain, case)


def shifted(x):
    """The same matrix, no row of it on 16 bytes."""
    return torch.full((x.shape[0], x.shape[1] + 9), torch.nan, dtype=x.dtype)[:, 1 : 1 + x.shape[1]].copy_(x)


def pitched(x):
    """Rows on 16 bytes, NaN between them."""
    room = torch.full((x.shape[0], x.shape[1] + 16 + -x.shape[1] % 8), torch.nan, dtype=x.dtype)
    return room[:, 8 : 8 + x.shape[1]].copy_(x)


def feature_major(x):
    return x.t().contiguous().t()


@pytest.mark.parametrize("tokens, sums", PAIRS[:4], ids=PAIR_IDS[:4])
@pytest.mark.parametrize("layout", [shifted, pitched, feature_major], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(37, 72, 5, None), (37, 67, 20, 45)], ids=str)
def test_every_layout(plain, shape, layout, tokens, sums):
    case = make(*shape[:3], tokens, sums, shape[3])
    moved = case.with_tokens(layout)
    check(plain, moved)
    on_tensor_cores = tokens in NARROW and (layout is pitched or (layout is feature_major and shape[1] % 8 == 0))
    assert launched(plain) == (MMA | MMA_GRADIENT if on_tensor_cores else FMA | FMA_GRADIENT)
    if tokens not in NARROW or on_tensor_cores == (shape[1] % 8 == 0):  # the same kernels as without it
        assert all(torch.equal(a, b) for a, b in zip(outputs(plain, moved), outputs(plain, case), strict=True))


@pytest.mark.parametrize("tokens", [F32, BF16], ids=str)
def test_tokens_that_are_one_row(plain, tokens):
    case = make(20, 64, 4, tokens).with_tokens(lambda x: x[:1].expand(20, -1))
    check(plain, case)


@pytest.mark.parametrize("tokens, sums", PAIRS, ids=PAIR_IDS)
def test_nothing_to_do(plain, tokens, sums):
    """No tokens, no ranks, no features on one side: copies and zeros."""
    for T, n, r, m in ((0, 9, 3, None), (5, 9, 0, None), (5, 0, 3, 4), (5, 0, 3, None), (0, 0, 0, 0), (5, 9, 0, 6)):
        case = make(T, n, r, tokens, sums, m)
        for got, want in zip(outputs(plain, case), plain_outputs(case), strict=True):
            torch.testing.assert_close(got, want)
    case = make(5, 9, 3, tokens, sums, 0)  # nothing comes out, but coefficients do
    out, coefficients = ops(plain).native_householder(*case.forward)
    assert out.shape == (5, 0) and coefficients.shape == (5, 3) and bool(coefficients.isfinite().all())


def test_a_copy_is_no_view(plain):
    x = torch.randn(3, 4)
    out, _ = ops(plain).native_householder(x, torch.empty(4, 0), torch.empty(4, 0), None)
    out.zero_()
    assert bool(x.any())


@pytest.mark.parametrize("tokens, sums", PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("n, m", [(72, None), (72, 40), (67, None)])
def test_parts_of_the_work(plain, n, m, tokens, sums):
    """Coefficients alone, a gradient alone, and what is not needed: the same bits."""
    case = make(37, n, 20, tokens, sums, m)
    whole = outputs(plain, case)
    out, coefficients = ops(plain).native_householder(case.x, case.left, None, None)
    assert out.shape == (0,) and out.dtype == tokens and torch.equal(coefficients, whole[1])
    if m is not None:
        assert torch.equal(ops(plain).native_householder_gradient(case.x, whole[3]), whole[4])
    for needs in ([False, False], [True, False], [False, True]):
        dx, q, sum_x, sum_g = outputs(plain, case, needs)[2:]
        assert torch.equal(q, whole[3])
        assert torch.equal(dx, whole[2]) if needs[0] else dx.shape == (0,) and dx.dtype == tokens
        for part, all_of_it in ((sum_x, whole[4]), (sum_g, whole[5])):
            assert torch.equal(part, all_of_it) if needs[1] else part.shape == (0,) and part.dtype == sums


@pytest.mark.parametrize("tokens", [F32, BF16, F16], ids=str)
def test_a_gradient_alone(plain, tokens):
    for T, n, r in ((37, 72, 5), (65, 67, 40), (100, 264, 128)):
        case = make(T, n, r, tokens)
        got = ops(plain).native_householder_gradient(case.x, case.coefficients)
        plain_sum = case.x.float().t() @ case.coefficients
        assert_no_worse_than_torch(got, case.x.double().t() @ case.coefficients.double(), plain_sum)


def test_what_the_kernels_refuse(plain):
    found = ops(plain)
    x = torch.randn(4, 200)
    with pytest.raises(RuntimeError, match="ranks up to 128, got 129"):
        found.native_householder(x, torch.randn(200, 129), torch.randn(200, 129), None)
    with pytest.raises(RuntimeError, match=r"left must be \[200, 3\]"):
        found.native_householder(x, torch.randn(199, 3), torch.randn(200, 3), None)
    with pytest.raises(RuntimeError, match="base must have the dtype of x"):
        found.native_householder(x, torch.randn(200, 3), torch.randn(7, 3), torch.randn(4, 7).double())
    with pytest.raises(RuntimeError, match=r"q must be \[4, 3\]"):
        found.native_householder_gradient(x, torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="float32, float64, bfloat16 or float16"):
        found.native_householder(x.int(), torch.randn(200, 3), torch.randn(200, 3), None)


# --- numbers ----------------------------------------------------------------------------------------------------------
def test_factors_keep_all_their_bits_beside_bfloat16(plain):
    """A one for each feature: coefficients are the factor's own numbers, to the last bit."""
    n, r = 64, 24
    left = torch.randn(n, r) * torch.logspace(-30, 30, r)
    _, coefficients = ops(plain).native_householder(torch.eye(n, dtype=BF16), left, None, None)
    assert torch.equal(coefficients, left)
    (sums,) = (ops(plain).native_householder_gradient(torch.eye(n, dtype=BF16), left),)
    assert torch.equal(sums, left)


def test_factors_of_any_size_beside_float16(plain):
    """Columns far outside of float16's range, both ways: to 2^-38 of each column's largest number in 16."""
    n, r = 64, 24
    left = torch.randn(n, r) * torch.logspace(-30, 30, r)
    left[:, 3] = 0
    _, coefficients = ops(plain).native_householder(torch.eye(n, dtype=F16), left, None, None)
    sums = ops(plain).native_householder_gradient(torch.eye(n, dtype=F16), left)
    largest = left.abs().reshape(n // 16, 16, r).amax(1).repeat_interleave(16, 0)
    for got in (coefficients, sums):
        assert bool(((got - left).abs() <= largest * 2**-38).all())


@pytest.mark.parametrize("tokens, sums", PAIRS[:4], ids=PAIR_IDS[:4])
def test_long_sums_stay_accurate(plain, tokens, sums):
    """Numbers with a mean, so that sums grow and their rounding with them."""
    plain.configure(sms=1)  # the fewest splits
    case = make(4096, 8, 2, tokens, sums)
    for name in ("x", "g", "coefficients"):
        setattr(case, name, getattr(case, name) + 1)
    check(plain, case)
    case = make(3, 6000, 2, tokens, sums)
    for name in ("x", "g", "left", "g_left"):
        setattr(case, name, getattr(case, name).abs())
    check(plain, case)


@pytest.mark.parametrize("tokens, sums", PAIRS[:4], ids=PAIR_IDS[:4])
@pytest.mark.parametrize("n, r", [(136, 5), (67, 32), (264, 100)])
def test_a_token_that_is_not_finite_stays_alone(plain, n, r, tokens, sums):
    clean = make(45, n, r, tokens, sums)
    for value in (float("nan"), float("inf")):
        case = make(45, n, r, tokens, sums)
        case.x[20, 3] = case.g[20, 5] = value
        got, same, before = outputs(plain, case), plain_outputs(case), outputs(plain, clean)
        for k in range(4):  # by token
            others = torch.arange(45) != 20
            assert torch.equal(got[k][others], before[k][others])
            assert torch.equal(got[k].isfinite(), same[k].isfinite())
        assert not got[4].isfinite().any()  # q of that token takes part in every sum
        alone = ops(plain).native_householder_gradient(case.x, case.coefficients)
        features = torch.arange(n) != 3  # by feature
        assert bool(alone[features].isfinite().all()) and not alone[3].isfinite().any()


@pytest.mark.parametrize("tokens", NARROW, ids=str)
def test_infinite_coefficients_and_large_outputs(plain, tokens):
    """float16 overflows to infinity where the rounded result does; nothing else is lost."""
    case = make(17, 64, 3, tokens)
    case.right[:, 0] *= 1e6
    got, same = outputs(plain, case)[0], plain_outputs(case)[0]
    assert torch.equal(got.isinf(), same.isinf()) and not got.isnan().any()
    assert bool(same.isinf().any()) == (tokens == F16)


# --- repeatable -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", [*SCHEDULES, dict(threads=2)], ids=str)
@pytest.mark.parametrize("tokens, sums", PAIRS[:4], ids=PAIR_IDS[:4])
def test_same_bits_in_every_schedule(plain, tokens, sums, schedule):
    case = make(70, 400, 40, tokens, sums)
    plain.configure(sms=3, shared_per_block=101376)
    first = outputs(plain, case)
    plain.configure(sms=3, shared_per_block=101376, **schedule)
    assert all(torch.equal(a, b) for a, b in zip(outputs(plain, case), first, strict=True))


@pytest.mark.parametrize("tokens", [F32, BF16, F16], ids=str)
def test_a_token_does_not_know_its_neighbours(plain, tokens):
    """Its results are the same wherever it stands and however many come with it."""
    case = make(100, 200, 12, tokens)
    got = outputs(plain, case)
    few = case.with_tokens(lambda t: t[37:41])
    few.coefficients = case.coefficients[37:41]
    for part, whole in zip(outputs(plain, few)[:4], got[:4], strict=True):
        assert torch.equal(part, whole[37:41])
