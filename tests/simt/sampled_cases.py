# SPDX-License-Identifier: Apache-2.0
"""What the tests of the sampled product's and the scatter's kernels share."""

from __future__ import annotations

import torch

from frodkernels.reference import sampled as reference
from tests.simt.coverage import base_name
from tests.support import Case, assert_no_worse_than_torch

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NARROW = (BF16, F16)
BLOCKS = {F32: "sampled_fma_kernel", F64: "sampled_fma_kernel", BF16: "sampled_mma_kernel", F16: "sampled_mma_kernel"}
SMALLEST = 101376  # bytes of shared memory of a block on sm_86, 89 and 120
SCHEDULES = [
    dict(order="reverse"),
    dict(order="random", seed=3),
    dict(order="random", seed=4, yield_permille=20),
    dict(lazy_copies=False),
]


def ops(module):
    return torch.ops.simt_check if module.checked else torch.ops.simt


def launched(module):
    return {base_name(name) for name in module.launches()}


def grid_of(module, kernel):
    return sum(k["grid"] for name, k in module.kernels().items() if base_name(name) == kernel)


def arguments(case: Case, dtype=None):
    """Of the op, for the entries u[row] . z[column]: the view whose groups are columns."""
    return case.u, case.z, *case.pattern.csc, dtype or case.u.dtype


def blocks(module, case: Case, dtype=None):
    """The entries, by way of dense blocks."""
    return ops(module).native_sampled_product(*arguments(case, dtype), True)


def check(module, case: Case, dtype=None, tiled=True, tiles=None):
    """The error is within the bar; returns what the op returned."""
    args = arguments(case, dtype)
    got = ops(module).native_sampled_product(*args, tiled, tiles)
    exact = case._exact(case.u, case.z.t())[case.rows, case.cols]
    assert_no_worse_than_torch(got, exact, reference.sampled_product(*args))
    return got
