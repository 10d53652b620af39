# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels where factors may be rounded to bfloat16 tokens, against float64 and plain bfloat16 torch.

On a CPU with bfloat16 instructions these are kernels of their own; elsewhere the float32 ones serve.
"""

import pytest
import torch
from torch import Tensor

import frodkernels as fk
from frodkernels.ops import reflect
from frodkernels.reference import householder as reference
from tests.householder.cases import Operands, make_operands
from tests.support import assert_no_worse_than_torch

BF16 = torch.bfloat16
BOTH = [True, True]
native = torch.ops.frodkernels
# Around every boundary: pairs, vectors of 16, blocks of 32 and 64 features, panels of 256, groups of 12 tokens.
FEATURES = [0, 1, 2, 3, 31, 32, 33, 63, 65, 129, 257, 600]
RANKS = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 64, 129]
TOKENS = [0, 1, 2, 3, 11, 12, 13, 25, 49, 97, 1000]


def run(case: Operands, rounded: bool = True) -> list[Tensor]:
    """(out, coefficients; dx, q, sum_x, sum_g)"""
    backward = native.native_householder_backward(*case.backward, BOTH, rounded)
    return [*native.native_householder(*case.forward, rounded), *backward]


def in_bf16(case: Operands) -> list[Tensor]:
    """What plain torch makes of it in bfloat16: rounded products. Sums are given in float32."""
    x, left, right, out = case.forward
    g, _, c, left_g, right_x, base = case.backward
    coefficients, q = x @ left.to(BF16), g @ left_g.to(BF16)
    sums = (x.t() @ q).float(), (g.t() @ c.to(BF16)).float()
    found = [(x if out is None else out) - coefficients @ right.to(BF16).t(), coefficients.float()]
    found += [(g if base is None else base) - q @ right_x.to(BF16).t(), q.float()]
    return found + ([sums[0] + sums[1], x.new_empty(0).float()] if base is None else list(sums))


def exact(case: Operands) -> list[Tensor]:
    forward, backward = ([None if t is None else t.double() for t in ts] for ts in (case.forward, case.backward))
    return [*reference.householder(*forward), *reference.householder_backward(*backward, BOTH)]


def check(*cases: Operands) -> None:
    """The errors of all cases make the norm: of few numbers one lucky rounding would decide."""
    groups = zip(*([run(c), exact(c), in_bf16(c)] for c in cases), strict=True)
    for ours, right, plain in zip(*(zip(*group, strict=True) for group in groups), strict=True):
        assert_no_worse_than_torch(*(torch.cat([t.flatten() for t in ts]) for ts in (ours, right, plain)))


def several(*sizes: int, few: bool) -> list[Operands]:
    return [make_operands(*sizes, dtype=BF16, acc=torch.float32, seed=seed) for seed in range(48 if few else 1)]


@pytest.mark.parametrize("T", TOKENS)
def test_every_token_count(isa, T):
    check(*several(T, 37, 5, few=T < 20))
    check(*several(T, 37, 19, 21, few=T < 20))


@pytest.mark.parametrize("n", FEATURES)
def test_every_feature_count(isa, n):
    check(*several(30, n, 6, few=n < 40))
    check(*several(30, n, 6, 50, few=n < 40))
    check(*several(30, 50, 6, n, few=n < 40))


@pytest.mark.parametrize("r", RANKS)
def test_every_rank(isa, r):
    check(*several(30, 65, r, few=r < 4))
    check(*several(30, 65, r, 41, few=r < 4))


def test_factors_that_are_bfloat16_lose_nothing(isa):
    """What enters a product is exact then, and sums are float32."""
    case = make_operands(40, 64, 8, dtype=BF16, acc=torch.float32)
    x, left, right, _ = case.forward
    left, right = left.to(BF16).float(), right.to(BF16).float()
    _, coefficients = native.native_householder(x, left, right, None, True)
    torch.testing.assert_close(coefficients.double(), x.double() @ left.double(), rtol=1e-5, atol=1e-5)


def test_bfloat16_instructions_are_used_where_there_are_any(isa):
    """Otherwise every test here would be one of the float32 kernels."""
    with open("/proc/cpuinfo") as file:
        has = "avx512_bf16" in file.read() and isa == "avx512"
    x = torch.ones(3, 64, dtype=BF16)
    left = torch.full((64, 1), 1 + 2**-12)  # rounds to 1
    assert native.native_householder(x, left, None, None, False)[1][0, 0] > 64
    assert (native.native_householder(x, left, None, None, True)[1][0, 0] == 64) == has


def test_other_dtypes_are_never_rounded(isa):
    for dtype in (torch.float32, torch.float64, torch.float16):
        case = make_operands(20, 33, 5, dtype=dtype, acc=torch.float64 if dtype == torch.float64 else torch.float32)
        for a, b in zip(run(case, True), run(case, False), strict=True):
            assert torch.equal(a, b)


def test_a_token_keeps_its_nan(isa):
    case = make_operands(30, 70, 9, dtype=BF16, acc=torch.float32)
    x, left, right, _ = case.forward
    clean = native.native_householder(x, left, right, None, True)
    x = x.clone()
    x[7, 3] = float("nan")
    for got, before in zip(native.native_householder(x, left, right, None, True), clean, strict=True):
        assert got[7].isnan().all()
        keep = torch.arange(30) != 7
        assert torch.equal(got[keep], before[keep])


def test_layouts_and_strides(isa):
    case = make_operands(50, 70, 9, dtype=BF16, acc=torch.float32)
    x, left, right, _ = case.forward
    want = native.native_householder(x, left, right, None, True)
    wide = torch.full((50, 97), float("nan"), dtype=BF16)
    wide[:, 13:83] = x
    for other in (wide[:, 13:83], x.t().contiguous().t()):
        for a, b in zip(native.native_householder(other, left, right, None, True), want, strict=True):
            assert torch.equal(a, b)
    row = x[:1].expand(50, 70)
    same = native.native_householder(row.contiguous(), left, right, None, True)
    for a, b in zip(native.native_householder(row, left, right, None, True), same, strict=True):
        assert torch.equal(a, b)


def test_bits_do_not_depend_on_the_threads(isa):
    case = make_operands(700, 96, 12, dtype=BF16, acc=torch.float32)
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(run(case))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_function_rounds_for_bfloat16_directions_only():
    """The native op is told so, by whichever way it is reached."""
    x = torch.randn(5, 12, dtype=BF16)
    for dtype in (BF16, torch.float32, torch.float64, torch.float16):
        u = torch.randn(12, 4).to(dtype)
        assert reflect.rounds(x, u) == (dtype == BF16)
        if dtype != torch.float64:
            want = native.native_reflect(x, u, False, dtype == BF16)[0]
            assert torch.equal(fk.householder(x, u), want)
            assert torch.equal(torch.ops.frodkernels.reflect(x, u, False)[0], want)
