# SPDX-License-Identifier: Apache-2.0
"""Which way to sample a product: an inner product for every entry, or dense blocks of which the entries are kept.

Inner products cost as many multiply-adds as entries times tokens, at the pace of gathered rows; blocks cost all m n T
of them, at the pace of a matrix product. The break-even is a density, and depends on the dtype: 16-bit products are
faster, gathering hardly is.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Density above which blocks are faster on the CPU: measured, the plot is in docs/sampled.md.
BREAK_EVEN = {
    torch.float32: 0.25,
    torch.float64: 0.25,
    torch.bfloat16: 0.12,
    torch.float16: 0.25,
}
_FEWEST_TOKENS = 64  # fewer do not fill a block's inner loop


def tiled_is_faster(entries: int, a: Tensor, b: Tensor) -> bool:
    """The choice for features a [m, T] and b [n, T], from shapes, dtype and device alone."""
    if a.device.type != "cpu" or a.shape[1] < _FEWEST_TOKENS:
        return False
    return entries > BREAK_EVEN[a.dtype] * a.shape[0] * b.shape[0]
