# SPDX-License-Identifier: Apache-2.0
"""The Householder kernels under the checker: no races, no stray accesses; and how economical they are."""

import pytest
import torch

from tests.simt import executor
from tests.simt.coverage import base_name
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
    SCHEDULES,
    check,
    launched,
    make,
    ops,
    outputs,
)

# T, n, r, m: every padding of tokens, features and ranks; more chunks than the ring has slots
SHAPES = [(17, 136, 7, None), (20, 264, 33, 40), (8, 72, 128, 400)]
LONG = (33, 1000, 8, None)
TIGHT = dict(sms=3, shared_per_block=80000)


@pytest.mark.kernel(*MMA, *MMA_GRADIENT)
@pytest.mark.parametrize("schedule", [{}, *SCHEDULES], ids=str)
@pytest.mark.parametrize("tokens", NARROW, ids=str)
def test_tensor_core_kernels_are_clean(checker, tokens, schedule):
    checker.configure(**TIGHT, **schedule)
    for shape in SHAPES if schedule else [*SHAPES, LONG]:
        check(checker, make(*shape[:3], tokens, F32, shape[3]))
    checker.configure(sms=1000, **schedule)
    check(checker, make(37, 264, 9, tokens))
    assert checker.reports() == []
    assert launched(checker) == MMA | MMA_GRADIENT


@pytest.mark.kernel(*FMA, *FMA_GRADIENT)
@pytest.mark.parametrize("schedule", [{}, SCHEDULES[0], SCHEDULES[2]], ids=str)
@pytest.mark.parametrize("tokens, sums", [(F32, F32), (F64, F64), (BF16, F32)], ids=["float32", "float64", "bfloat16"])
def test_plain_kernels_are_clean(checker, tokens, sums, schedule):
    for extra in (0, 1):  # rows on 16 bytes, and rows that are not
        if tokens in NARROW and extra == 0:
            continue  # these are the tensor cores'
        checker.configure(**TIGHT, **schedule)
        for T, n, r, m in SHAPES if schedule else [*SHAPES, LONG]:
            check(checker, make(T, n + extra, r, tokens, sums, None if m is None else m + extra))
    assert checker.reports() == []
    assert launched(checker) == FMA | FMA_GRADIENT


@pytest.mark.kernel(*MMA)
@pytest.mark.parametrize("tiles", [2, 3, 4, 5])
def test_larger_blocks_are_clean(checker, tiles):
    T = 16 * tiles * 2 - 3
    checker.configure(sms=2, shared_per_block=166912)
    checker_case = make(T, 264, 20, BF16)
    ops(checker).native_householder(*checker_case.forward)
    (kernel,) = [k for name, k in checker.kernels().items() if base_name(name) == "householder_mma_kernel"]
    assert kernel["grid"] == 2
    assert checker.reports() == []


def test_under_the_sanitisers():
    script = """
from tests.simt.householder_cases import BF16, F16, F32, F64, make
op, back = torch.ops.simt_asan.native_householder, torch.ops.simt_asan.native_householder_backward
for tokens, sums in ((F32, F32), (F64, F64), (BF16, F32), (F16, F32)):
    for T, n, r, m in ((1, 7, 1, None), (17, 136, 33, None), (70, 264, 100, 41)):
        case = make(T, n, r, tokens, sums, m)
        parts = (*op(*case.forward), *back(*case.backward, [True, True]))
        assert all(part.isfinite().all() for part in parts)
print("came through")
"""
    (end,) = executor.under_asan([script])
    assert end.status == 0 and "came through" in end.output, end.output


# --- economical -------------------------------------------------------------------------------------------------------
class Economy:
    """The requests of one kernel, over the least that their bytes need."""

    def __init__(self, module, kernel):
        self.sites = [site for site in module.sites() if base_name(site["kernel"]) == kernel]
        assert self.sites, f"{kernel} was not launched"

    def ratio(self, space):
        unit = "sectors" if space == "global" else "wavefronts"
        found = [s for s in self.sites if s["space"] == space]
        return sum(s[unit] for s in found) / sum(s[f"{unit}_least"] for s in found)

    def sectors(self, write, file=""):
        found = [s for s in self.sites if s["space"] == "global" and s["write"] == write and file in s["file"]]
        return sum(s["sectors"] for s in found)


@pytest.mark.kernel(*MMA, *MMA_GRADIENT)
@pytest.mark.parametrize("tokens", NARROW, ids=str)
@pytest.mark.parametrize("r", [8, 32, 128])
def test_economy_of_the_tensor_core_kernels(checker, r, tokens):
    """Whole sectors, hardly a bank conflict; x is read once where shared memory holds a block's rows."""
    T, n = 64, 1024
    checker.configure(sms=4, shared_per_block=166912)
    outputs(checker, make(T, n, r, tokens), [False, True])
    forward = Economy(checker, "householder_mma_kernel")
    assert forward.ratio("global") <= 1.05 and forward.ratio("shared") <= 1.15
    rows = T * n * 2 // 32
    assert forward.sectors(False, "householder_common") == 2 * rows, "once for out, once for q"
    gradient = Economy(checker, "householder_gradient_mma_kernel")
    assert gradient.ratio("global") <= 1.05 and gradient.ratio("shared") <= 1.05
    assert Economy(checker, "householder_pack_kernel").ratio("global") <= 2.0
    assert checker.reports() == []


@pytest.mark.kernel(*MMA)
def test_rows_that_shared_memory_cannot_hold(checker):
    """The ring keeps the last chunks of pass one: only the others are read again."""
    T, n = 64, 2048
    checker.configure(sms=4, shared_per_block=60000)
    case = make(T, n, 8, BF16)
    ops(checker).native_householder(*case.forward)
    (kernel,) = [k for name, k in checker.kernels().items() if base_name(name) == "householder_mma_kernel"]
    slots = (kernel["shared_bytes"] - 2 * 16 * 48 - 8 * 16 * 40 * 4) // (16 * 272)
    chunks = n // 128
    assert kernel["grid"] == 4 and 2 <= slots < chunks
    read = Economy(checker, "householder_mma_kernel").sectors(False, "householder_common") * 32
    assert read == T * 256 * (2 * chunks - slots)


@pytest.mark.kernel(*FMA, *FMA_GRADIENT)
@pytest.mark.parametrize("tokens, sums", [(F32, F32), (F64, F64)], ids=["float32", "float64"])
@pytest.mark.parametrize("r", [8, 32, 128])
def test_economy_of_the_plain_kernels(checker, r, tokens, sums):
    """A lane's four numbers of float64 are two loads, each of half the sectors: the second finds them in L1."""
    checker.configure(sms=4, shared_per_block=166912)
    outputs(checker, make(64, 512, r, tokens, sums))
    for kernel in ("householder_fma_kernel", "householder_gradient_fma_kernel"):
        cost = Economy(checker, kernel)
        assert cost.ratio("global") <= (2.0 if tokens == F64 else 1.1), kernel
        assert cost.ratio("shared") <= (1.35 if tokens == F64 else 1.15), kernel
    assert checker.reports() == []


def test_float16_is_served_by_tensor_cores_too(plain):
    outputs(plain, make(5, 64, 3, F16))
    assert launched(plain) == MMA | MMA_GRADIENT
    assert torch.ops.simt.native_householder(*make(5, 64, 3, F32).forward)[0].dtype == F32
    assert launched(plain) > MMA | FMA
