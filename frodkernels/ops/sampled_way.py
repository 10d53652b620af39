# SPDX-License-Identifier: Apache-2.0
"""Which way to sample a product: an inner product for every entry, or dense blocks of which the entries are kept.

Inner products cost as many multiply-adds as entries times tokens, at the pace of gathered rows; blocks cost all m n T
of them, at the pace of a matrix product. The break-even is a density, and depends on the dtype: 16-bit products are
faster, gathering hardly is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from frodkernels import _native
from frodkernels.ops.sampled_way_gpu import NEVER, gpu_break_even

# Density above which blocks are faster on the CPU: measured on a Zen 5 at m = n = 2048 and T = 1024, forced to each
# instruction set in turn; the plot is in docs/sampled.md. At 768 the break-even is a quarter lower.
BREAK_EVEN = {
    "avx512": {torch.float32: 0.36, torch.float64: 0.31, torch.bfloat16: 0.33, torch.float16: 0.36},
    "avx2": dict.fromkeys((torch.float32, torch.float64, torch.bfloat16, torch.float16), 0.48),
    "portable": dict.fromkeys((torch.float32, torch.float64, torch.bfloat16, torch.float16), 0.60),
}
_FEWEST_TOKENS = 64  # fewer do not fill a block's inner loop


@functools.cache
def _break_even() -> dict[torch.dtype, float]:
    isa = torch.ops.frodkernels.native_cpu_isa() if _native.load() else "portable"
    return BREAK_EVEN[isa]


@functools.cache
def _on_gpu(device: torch.device, dtype: torch.dtype) -> float:
    if torch.version.hip is not None:
        return NEVER  # no model of those
    major, minor = torch.cuda.get_device_capability(device)
    return gpu_break_even(10 * major + minor, dtype)


def tiled_is_faster(entries: int, a: Tensor, b: Tensor) -> bool:
    """The choice for features a [m, T] and b [n, T], from shapes, dtype and device alone."""
    if a.device.type not in ("cpu", "cuda") or a.shape[1] < _FEWEST_TOKENS:
        return False
    density = _on_gpu(a.device, a.dtype) if a.is_cuda else _break_even()[a.dtype]
    return density < NEVER and entries > density * a.shape[0] * b.shape[0]
