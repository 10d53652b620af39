# SPDX-License-Identifier: Apache-2.0
"""What the sparse core means, in plain PyTorch.

Features are the rows here: a matrix of features is [features, T]. Only stored entries are multiplied, so a NaN or an
infinity travels along entries of S and nowhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 2**24  # products held at once: the reference also serves as a fallback, and nnz * T may be huge


def accumulator(features: Tensor, values: Tensor) -> torch.dtype:
    """float64 when an operand is, float32 otherwise: what every backend sums in."""
    return torch.float64 if torch.float64 in (features.dtype, values.dtype) else torch.float32


def _slots(indptr: Tensor, indices: Tensor, perm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = torch.arange(indptr.numel() - 1, device=indptr.device)
    owner = torch.repeat_interleave(groups, indptr.diff().to(torch.int64), output_size=indices.numel())
    return owner, indices.to(torch.int64), perm.to(torch.int64)


def _chunks(T: int, nnz: int) -> list[slice]:
    step = max(1, _CHUNK // max(nnz, 1))
    return [slice(t, t + step) for t in range(0, T, step)]


def new_features(like: Tensor, rows: int, token_major: bool) -> Tensor:
    """Uninitialised [rows, T] features in the layout the ops return: contiguous, or strides (1, rows)."""
    T = like.shape[1]
    return like.new_empty(T, rows).t() if token_major else like.new_empty(rows, T)


def sparse_core(
    z: Tensor,
    lam: Tensor | None,
    values: Tensor,
    indptr: Tensor,
    indices: Tensor,
    perm: Tensor,
    token_major: bool = False,
) -> Tensor:
    """out[i, t] = lam[i] z[i, t] + sum_p values[perm[p]] z[indices[p], t],  indptr[i] <= p < indptr[i + 1].

    ``z`` [n_in, T] -> [n_out, T] in z's dtype. Summed in float32 (float64 for float64), rounded once.
    """
    acc = accumulator(z, values)
    owner, other, order = _slots(indptr, indices, perm)
    weight = values.to(acc)[order].unsqueeze(1)
    parts = []
    for tokens in _chunks(z.shape[1], values.numel()):
        tile = z[:, tokens].to(acc)
        out = tile.new_zeros(indptr.numel() - 1, tile.shape[1]) if lam is None else lam.to(acc).unsqueeze(1) * tile
        parts.append(out.index_add(0, owner, weight * tile[other]))
    out = torch.cat(parts, 1) if parts else z.new_zeros(indptr.numel() - 1, 0, dtype=acc)
    out = out.to(z.dtype)
    return new_features(z, out.shape[0], True).copy_(out) if token_major else out.contiguous()


def sparse_core_backward(
    u: Tensor,
    z: Tensor,
    lam: Tensor | None,
    values: Tensor,
    indptr: Tensor,
    indices: Tensor,
    perm: Tensor,
    needs: list[bool],
    token_major: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w = (S + diag lam) z for u = dL/dw; the plan groups S by column (``pattern.csc``).

    dz = (S + diag lam)^T u;  dlam[j] = sum_t u[j, t] z[j, t];  dvalues[k] = sum_t u[row_k, t] z[col_k, t].
    """
    acc = accumulator(u, values)
    dz = dlam = dvalues = None
    if needs[0]:
        dz = sparse_core(u, lam, values, indptr, indices, perm, token_major)
    if needs[1] and lam is not None:
        dlam = (u.to(acc) * z.to(acc)).sum(1).to(lam.dtype)
    if needs[2]:
        owner, other, order = _slots(indptr, indices, perm)
        by_slot = torch.zeros(values.numel(), dtype=acc, device=values.device)
        for tokens in _chunks(u.shape[1], values.numel()):
            by_slot += (u[:, tokens].to(acc)[other] * z[:, tokens].to(acc)[owner]).sum(1)
        dvalues = torch.empty_like(by_slot).scatter_(0, order, by_slot).to(values.dtype)
    return (
        u.new_empty(0) if dz is None else dz,
        values.new_empty(0, dtype=acc if lam is None else lam.dtype) if dlam is None else dlam,
        values.new_empty(0) if dvalues is None else dvalues,
    )
