# SPDX-License-Identifier: Apache-2.0
"""FRoD's initialisation: one basis V for a category of weights, then U and lam of each weight.

Source: FRoD, https://doi.org/10.1609/aaai.v40i31.39813 (hierarchical joint decomposition).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frodkernels.functional.positions import distinct
from frodkernels.pattern import SparsePattern


def joint_basis(weights: Sequence[Tensor], alpha: float = 1e-3) -> Tensor:
    """The basis V [n, n] that a category of weights shares.

    With ``Q R = qr(all W_i stacked)`` and ``Z`` the eigenvectors of ``mean_i (Q_i^T Q_i + alpha I)^-1``, ``V = R^T Z``;
    where the stack has fewer rows than columns, its right singular vectors, completed to a basis.

    Args:
        weights: [m_i, n] each, in the order of the layers.
        alpha: ridge that keeps the inverses stable when layers are correlated.

    Returns:
        [n, n] in the first weight's dtype, computed in float32 (float64 for float64).

    Raises:
        ValueError: no weights, or they differ in their number of columns.
    """
    if isinstance(weights, Tensor) or not weights:
        raise ValueError("weights must be a sequence of at least one matrix")
    n = weights[0].shape[-1]
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != n:
            raise ValueError(f"weights[{i}] must be [m, {n}], got {list(weight.shape)}")
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    with torch.no_grad():
        stack = torch.cat([weight.detach().to(dtype) for weight in weights])
        if stack.shape[0] < n:
            return torch.linalg.svd(stack, full_matrices=True).Vh.mT.to(weights[0].dtype).contiguous()
        Q, R = torch.linalg.qr(stack)
        eye = torch.eye(n, dtype=dtype, device=stack.device)
        mean = torch.zeros_like(eye)
        for part in Q.split([weight.shape[0] for weight in weights]):
            mean += torch.linalg.inv(part.mT @ part + alpha * eye)
        Z = torch.linalg.eigh(mean / len(weights)).eigenvectors
        return (R.mT @ Z).to(weights[0].dtype)


def factor(weight: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """``(U, lam)`` with ``U diag(lam) V^T = weight`` and unit columns of U, solved in float64.

    A column of length below 1e-12 becomes a zero column with its (negligible) length kept in lam, as in PEFT; a
    singular V is inverted in the least-squares sense.

    Returns:
        U [m, n] and lam [n], in weight's dtype.
    """
    if weight.dim() != 2 or V.shape != (weight.shape[1],) * 2:
        raise ValueError(f"V must be [n, n] for weight [m, n], got {list(V.shape)} for {list(weight.shape)}")
    with torch.no_grad():
        w, v = weight.detach().double(), V.detach().double()
        try:
            B = torch.linalg.solve(v, w.mT).mT
        except RuntimeError:  # singular
            B = w @ torch.linalg.pinv(v, rtol=1e-6).mT
        lam = torch.linalg.vector_norm(B, dim=0)
        U = torch.where(lam > 1e-12, B / lam, 0.0)
    return U.to(weight.dtype).contiguous(), lam.to(weight.dtype)


def random_pattern(n: int, rate: float, generator: torch.Generator | None = None) -> SparsePattern:
    """``max(1, floor(rate n^2))`` distinct off-diagonal positions of an n x n matrix, uniformly at random.

    Raises:
        ValueError: rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be between 0 and 1, got {rate}")
    room = n * (n - 1)
    nnz = min(int(rate * n * n), room)
    nnz = max(nnz, 1) if rate > 0 and room > 0 else nnz
    flat = distinct(room, nnz, generator)
    rows = flat // max(n - 1, 1)
    cols = flat - rows * max(n - 1, 1)
    return SparsePattern(rows, cols + (cols >= rows), (n, n))
