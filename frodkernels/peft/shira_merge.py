# SPDX-License-Identifier: Apache-2.0
"""Merging a sparse change in place, at the price of its entries, and undoing it bit for bit.

PEFT subtracts what it added, which leaves rounding errors behind; in bfloat16 a large part of the entries change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from frodkernels.functional.sampled import scatter_values_
from frodkernels.ops.sparse_core import FLOATS
from frodkernels.pattern import SparsePattern
from frodkernels.peft.base_layer import plain_tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Merged(NamedTuple):
    """One merge of one adapter, as it can be undone.

    adapter     its name.
    below       how many adapters were merged before it.
    pattern     where the entries are; the adapter itself may change, or go.
    old, new    [nnz] entries of the weight before the merge and after it, in the weight's dtype; others than ``new``
                are not ours to replace.
    """

    adapter: str
    below: int
    pattern: SparsePattern
    old: Tensor
    new: Tensor

    def moved(self, move: Callable[[Tensor], Tensor]) -> Merged | None:
        """After the layer was moved or cast: the entries, like those of the weight. None on meta."""
        with torch.no_grad():
            old, new = move(self.old), move(self.new)
        return None if new.is_meta else self._replace(old=old, new=new)


def in_place(weight: object, shape: tuple[int, int]) -> bool:
    """Whether entries can be written to a weight where it is: a plain matrix of ``shape`` in memory."""
    return (
        isinstance(weight, Tensor)
        and plain_tensor(weight)
        and weight.layout == torch.strided
        and weight.dtype in FLOATS
        and not weight.is_meta
        and weight.shape == shape
        and not any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True))
    )


def add(weight: Tensor, values: Tensor, pattern: SparsePattern, scale: float, safe: bool) -> tuple[Tensor, Tensor]:
    """``weight += scale * S`` in place; returns the entries from before and those it has now, [nnz] each.

    Raises:
        FloatingPointError: ``safe``, and the result would not be finite; the weight is as it was.
    """
    old, new = weight.new_empty(pattern.nnz), weight.new_empty(pattern.nnz)
    scatter_values_(weight, values, pattern, scale=scale, old=old)
    scatter_values_(weight, old, pattern, accumulate=False, old=new)  # reads them; the weight is as it was
    if safe and not (bool(torch.isfinite(new).all()) and bool(torch.isfinite(weight).all())):
        raise FloatingPointError
    scatter_values_(weight, new, pattern, accumulate=False)
    return old, new


def read(weight: Tensor, pattern: SparsePattern) -> Tensor:
    """The entries of a weight, [nnz]."""
    rows, cols = pattern.coo()
    return weight[rows.to(weight.device), cols.to(weight.device)]


def put_back(weight: Tensor, merged: Merged) -> bool:
    """Put the entries from before a merge back; False, and nothing is changed, where somebody has overwritten them."""
    pattern = merged.pattern
    old, new = merged.old.to(weight), merged.new.to(weight)
    there = weight.new_empty(pattern.nnz)
    scatter_values_(weight, old, pattern, accumulate=False, old=there)
    bits = _BITS[weight.element_size()]
    if torch.equal(there.view(bits), new.view(bits)):  # NaN equals itself this way
        return True
    scatter_values_(weight, there, pattern, accumulate=False)
    return False
