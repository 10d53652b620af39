# SPDX-License-Identifier: Apache-2.0
"""What every function does to its arguments before any arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from frodkernels.ops.sparse_core import FLOATS
from frodkernels.pattern import SparsePattern


def check_tensor(tensor: object, name: str, device: torch.device | None = None) -> None:
    """A dense floating-point tensor on ``device``; ValueError names the argument."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {device}")


def check_pattern(pattern: object, shape: tuple[int, int] | None = None) -> None:
    """A SparsePattern, of ``shape`` when one is given."""
    if not isinstance(pattern, SparsePattern):
        raise ValueError(f"pattern must be a frodkernels.SparsePattern, got {type(pattern).__name__}")
    if shape is not None and pattern.shape != shape:
        raise ValueError(f"pattern must be {shape[0]} x {shape[1]}, got {pattern.shape[0]} x {pattern.shape[1]}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast runs GEMMs in on x's device, or None outside autocast (and for float64, as in torch)."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
