# SPDX-License-Identifier: Apache-2.0
"""Merging without loss: a layer's own weight is kept while reflections are merged into it, and put back bit for bit.

PEFT multiplies the merged weight by the inverse instead, which changes a fifth of the weights of a bfloat16 model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frodkernels.functional.householder import householder
from frodkernels.ops.sparse_core import FLOATS
from frodkernels.peft.base_layer import plain_tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


class MergedFrom(NamedTuple):
    """What a merged weight was made from.

    weight      the layer's weight before, untouched: the very tensor.
    directions  [n, R] of all reflections merged into it since, as they were then: a further merge starts from
                ``weight`` again, so that the result is rounded once.
    before      the adapters that were merged into ``weight`` already, by PEFT itself.
    bits        of the merged weight: another one is not ours to undo.
    """

    weight: Tensor
    directions: Tensor
    before: tuple[str, ...]
    bits: tuple[int, int]

    def made(self, merged: Tensor) -> bool:
        """``merged`` is the weight this was merged into: nobody has written to it since, wherever it was moved."""
        if merged.is_meta or merged.shape != self.weight.shape or merged.dtype != self.weight.dtype:
            return False
        return bits_of(merged) == self.bits

    def moved(self, move: Callable[[Tensor], Tensor], merged: Tensor) -> MergedFrom | None:
        """After the layer was moved or cast: the weight as it would be if nothing were merged. None on meta."""
        if merged.is_meta:
            return None
        with torch.no_grad():
            return self._replace(weight=move(self.weight), bits=bits_of(merged))


def bits_of(weight: Tensor) -> tuple[int, int]:
    """Two sums over the bits of a weight and their places, the same on every device. Synchronises."""
    flat = weight.detach().contiguous().view(_BITS[weight.element_size()]).flatten()
    total = torch.zeros(2, dtype=torch.int64, device=weight.device)
    for chunk in flat.split(_CHUNK):
        place = 2 * torch.arange(chunk.numel(), device=weight.device) + 1
        exact = chunk.to(torch.int64)
        total = 31 * total + torch.stack([exact.sum(), (exact * exact * place).sum()])
    first, second = total.tolist()
    return first, second


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype for what is small, or done once: float64 where the device has it."""
    return torch.float64 if tensor.device.type in ("cpu", "cuda") else torch.promote_types(tensor.dtype, torch.float32)


def rotated(weight: Tensor, u: Tensor) -> Tensor:
    """W H for a weight [m, ...], in its dtype: summed in u's and rounded once."""
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        merged = householder(weight.flatten(1), u).view(weight.shape)
        return merged if weight.is_contiguous() else torch.empty_like(weight).copy_(merged)


def mergeable(base: nn.Module) -> Any:
    """The weight of ``base``, when reflections can be merged into it.

    Raises:
        ValueError: it is quantised, wrapped, or not in memory.
    """
    weight = getattr(base, "weight", None)
    name = type(base).__name__
    if weight is None or weight.dtype not in FLOATS or not plain_tensor(weight):
        raise ValueError(f"HRA cannot be merged into {name}: its weight is quantised or wrapped")
    if weight.is_meta:
        raise ValueError(f"HRA cannot be merged into {name}: its weight is not in memory (meta device)")
    return weight
