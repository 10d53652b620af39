# SPDX-License-Identifier: Apache-2.0
"""What a FRoD layer means: y = x V (S + diag lam)^T U^T + bias, differentiable in everything."""

from __future__ import annotations

import torch
from torch import Tensor

from frodkernels.pattern import SparsePattern
from frodkernels.reference import sparse_core as core


def frod_linear(
    x: Tensor, U: Tensor, V: Tensor, lam: Tensor, values: Tensor, pattern: SparsePattern, bias: Tensor | None = None
) -> Tensor:
    """``x`` [..., n] -> [..., m], in the activation order."""
    z = (x.reshape(-1, x.shape[-1]) @ V).t()  # [n, T]
    w = core.sparse_core(z, lam, values, *pattern.csr)
    y = w.t() @ U.t()
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], U.shape[0])


def frod_weight(U: Tensor, V: Tensor, lam: Tensor, values: Tensor, pattern: SparsePattern) -> Tensor:
    """``U (S + diag lam) V^T``, dense [m, n]."""
    rows, cols = pattern.coo()
    middle = torch.diag(lam).index_put((rows, cols), values, accumulate=True)
    return U @ middle.to(U.dtype) @ V.t()
