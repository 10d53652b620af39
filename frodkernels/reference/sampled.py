# SPDX-License-Identifier: Apache-2.0
"""What sampling a product and scattering into a matrix mean, in plain PyTorch. Features are rows: [features, T]."""

from __future__ import annotations

import torch
from torch import Tensor

from frodkernels.reference.sparse_core import _chunks, _slots, accumulator


def sampled_product(
    a: Tensor,
    b: Tensor,
    indptr: Tensor,
    indices: Tensor,
    perm: Tensor,
    dtype: torch.dtype,
    tiled: bool = False,
) -> Tensor:
    """out[perm[p]] = sum_t a[indices[p], t] b[g, t],  indptr[g] <= p < indptr[g + 1].

    ``a`` [n, T], ``b`` [groups, T] of one dtype -> [nnz] in ``dtype``. Summed in float32 (float64 where an operand or
    the result is), rounded once. ``tiled`` chooses between two ways to the same sums and means nothing here.
    """
    acc = torch.float64 if dtype == torch.float64 else accumulator(a, b)
    owner, other, order = _slots(indptr, indices, perm)
    by_slot = torch.zeros(order.numel(), dtype=acc, device=a.device)
    for tokens in _chunks(a.shape[1], order.numel()):
        by_slot += (a[:, tokens].to(acc)[other] * b[:, tokens].to(acc)[owner]).sum(1)
    return torch.empty_like(by_slot).scatter_(0, order, by_slot).to(dtype)


def scatter_values_(
    weight: Tensor,
    values: Tensor,
    indptr: Tensor,
    indices: Tensor,
    perm: Tensor,
    scale: float,
    accumulate: bool,
    old: Tensor | None,
) -> None:
    """weight[g, indices[p]] = scale values[perm[p]], or that much more than it was where ``accumulate`` is set.

    In place; computed in float32 (float64 where an operand is) and rounded once. ``old`` [nnz] gets what the entries
    were before, in COO order.
    """
    owner, other, order = _slots(indptr, indices, perm)
    before = weight[owner, other]
    if old is not None:
        old.index_copy_(0, order, before)
    acc = accumulator(weight, values)
    change = values[order]
    if scale != 1.0 or accumulate:
        change = scale * change.to(acc)
        change = before.to(acc) + change if accumulate else change
    weight[owner, other] = change.to(weight.dtype)
