# SPDX-License-Identifier: Apache-2.0
"""The sampled product's kernels under the checker: no races, no stray accesses; and how economical they are."""

import pytest
import torch

from bench.kernels.patterns import uniform
from tests.simt import executor
from tests.simt.sampled_cases import BF16, BLOCKS, F16, F32, F64, NARROW, SCHEDULES, SMALLEST, check, launched, ops
from tests.simt.test_householder_checked import Economy
from tests.support import LAYOUTS, make_case

# m, n, T: several blocks both ways, odd ends; more tiles of tokens than the ring has places; several segments
SHAPES = [(210, 140, 37), (70, 40, 200)]
SEGMENTS = {"sampled_mma_kernel": 2100, "sampled_fma_kernel": 600}


def clean(checker, dtype, layouts, shapes):
    for shape in shapes:
        for layout in layouts:
            check(checker, make_case(*shape, "random", dtype, F32, lam=False).laid_out(layout), F32)
    assert checker.reports() == []
    assert launched(checker) == {BLOCKS[dtype], "reduce_sources_kernel"}


@pytest.mark.kernel("sampled_mma_kernel", "reduce_sources_kernel")
@pytest.mark.parametrize("schedule", [{}, *SCHEDULES], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_tensor_core_kernels_are_clean(checker, dtype, schedule):
    checker.configure(sms=2, shared_per_block=SMALLEST, **schedule)
    clean(checker, dtype, ("feature_major", "token_major"), SHAPES)


@pytest.mark.kernel("sampled_fma_kernel", "reduce_sources_kernel")
@pytest.mark.parametrize("schedule", [{}, SCHEDULES[0], SCHEDULES[2]], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_plain_kernels_are_clean(checker, dtype, schedule):
    checker.configure(sms=2, shared_per_block=SMALLEST, **schedule)
    clean(checker, dtype, ("feature_pitched", "token_major", "token_pitched"), SHAPES)


@pytest.mark.kernel("sampled_mma_kernel", "sampled_fma_kernel")
def test_segments_are_clean(checker):
    checker.configure(sms=1)
    for dtype in (F16, F32):
        check(checker, make_case(20, 30, SEGMENTS[BLOCKS[dtype]], "random", dtype, F32, lam=False), F32)
    assert checker.reports() == []


def test_under_the_sanitisers():
    script = """
from tests.simt.sampled_cases import BF16, F16, F32, F64, arguments
from tests.support import LAYOUTS, make_case
op, scatter = torch.ops.simt_asan.native_sampled_product, torch.ops.simt_asan.native_scatter_values_
for dtype in (F32, F64, BF16, F16):
    for shape in ((1, 1, 1), (210, 140, 37)):
        for layout in ("feature_major", "token_pitched"):
            case = make_case(*shape, "random", dtype, F32, lam=False).laid_out(layout)
            for tiled in (True, False):
                assert op(*arguments(case, F32), tiled).isfinite().all()
            weight = torch.zeros(case.pattern.shape, dtype=dtype)
            scatter(weight, case.values, *case.pattern.csr, 0.5, True, torch.empty(case.pattern.nnz, dtype=dtype))
print("came through")
"""
    (end,) = executor.under_asan([script])
    assert end.status == 0 and "came through" in end.output, end.output


# --- economical -------------------------------------------------------------------------------------------------------
N, DENSITY = 384, 0.1  # blocks are the way


@pytest.mark.parametrize("layout", ["feature_major", "token_major"])
@pytest.mark.parametrize(
    "dtype, T, rows, columns", [(BF16, 1024, 128, 192), (F32, 512, 128, 128), (F64, 512, 64, 64)], ids=str
)
def test_economy(checker, dtype, T, rows, columns, layout):
    """Whole sectors, hardly a bank conflict; features are read once for each block of the other side, no more."""
    checker.configure(sms=1)
    x = LAYOUTS[layout](torch.randn(N, T, generator=torch.Generator().manual_seed(1)).to(dtype))
    ops(checker).native_sampled_product(x, x, *uniform(N, int(N * N * DENSITY)).csc, F32, True)
    assert checker.reports() == [] and BLOCKS[dtype] in launched(checker)
    cost = Economy(checker, BLOCKS[dtype])
    assert cost.ratio("global") <= 1.1 and cost.ratio("shared") <= 1.05
    copied = cost.sectors(False, BLOCKS[dtype].removesuffix("_kernel"))
    assert copied == N * T * x.element_size() // 32 * (-(-N // rows) + -(-N // columns))
