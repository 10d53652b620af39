# SPDX-License-Identifier: Apache-2.0
"""When sampled products go by dense blocks on CUDA: modelled, not measured.

The table of docs/kernels.md (Sampled products), from ``python -m bench.roofline --sampled``: features [4096, 4096
tokens], contiguous tokens. From fewer tokens or features the break-even lies a little higher or lower; where features
are contiguous (activations), blocks read them as they are and entries need a copy first, so it lies lower.
"""

from __future__ import annotations

import torch

NEVER = 1.0
# By compute capability; 80 is the model's A100, 89 its RTX 4090, 90 its H100, 100 its B200.
BREAK_EVEN = {
    80: {torch.bfloat16: 0.047, torch.float32: 0.336, torch.float64: 0.178},
    89: {torch.bfloat16: 0.132, torch.float32: 0.163, torch.float64: NEVER},
    90: {torch.bfloat16: 0.038, torch.float32: 0.244, torch.float64: 0.372},
    100: {torch.bfloat16: 0.038, torch.float32: 0.185, torch.float64: 0.305},
}
BREAK_EVEN[86] = BREAK_EVEN[120] = BREAK_EVEN[89]  # assumed: no model of them


def gpu_break_even(capability: int, dtype: torch.dtype) -> float:
    """The modelled density above which dense blocks are faster than an inner product an entry.

    Args:
        capability: compute capability as 10 * major + minor. A device that is not in the table is taken for the
            highest known one below it.
        dtype: of the features; float16 is as bfloat16.

    Returns:
        A density; 1.0 where blocks are never faster, or no kernel runs on the device (below 80).
    """
    known = [key for key in BREAK_EVEN if key <= capability]
    if not known:
        return NEVER
    return BREAK_EVEN[max(known)][torch.bfloat16 if dtype == torch.float16 else dtype]
