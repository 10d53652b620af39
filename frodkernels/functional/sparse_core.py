# SPDX-License-Identifier: Apache-2.0
"""``frodkernels.sparse_core``: z (S + diag lam)^T for a fixed sparse pattern."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frodkernels.functional._common import check_pattern, check_tensor, first_order
from frodkernels.functional._views import both_views, columns_view, gradients, product, rows_view
from frodkernels.ops import sparse_core as ops
from frodkernels.pattern import SparsePattern


class SparseCore(torch.autograd.Function):
    """w = (S + diag lam) z on features [n, T];  dz, dlam, dvalues from one pass over u = dL/dw and z.

    Saves z: both parameter gradients need it, and w is never needed again.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, lam: Tensor, values: Tensor, *views: Tensor) -> Tensor:
        ctx.save_for_backward(z, lam, values, *columns_view(views))
        return product(z, lam, values, rows_view(views), True)

    @staticmethod
    @first_order
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        z, lam, values, *columns = ctx.saved_tensors
        needs = list(ctx.needs_input_grad)
        return *gradients(u.to(z.dtype), z, lam, values, columns, needs[:3], True), *(None,) * (len(needs) - 3)


def sparse_core(z: Tensor, lam: Tensor, values: Tensor, pattern: SparsePattern) -> Tensor:
    """Multiply features by a fixed-pattern sparse matrix plus a diagonal: ``z (S + diag lam)^T``.

    The middle factor of a FRoD layer (https://doi.org/10.1609/aaai.v40i31.39813).

    Args:
        z: [..., n] features; float32, float64, bfloat16 or float16, any strides. A transposed [n, T] buffer
            (stride 1 along the tokens) is what the kernels like best.
        lam: [n] diagonal, any of these dtypes.
        values: [nnz] entries of S in the pattern's COO order, any of these dtypes.
        pattern: square [n, n] pattern.

    Returns:
        [..., n], contiguous, in z's dtype; summed in float32 (float64 when z or values are) and rounded once.
        Differentiable once in z, lam and values.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; names it.
    """
    check_tensor(z, "z")
    if z.dim() < 1:
        raise ValueError("z must be [..., n], got a scalar")
    n = z.shape[-1]
    check_pattern(pattern, (n, n))
    for name, tensor in (("lam", lam), ("values", values)):
        check_tensor(tensor, name, z.device)
    ops.check_entries(lam, values, pattern.nnz, n)
    pattern = pattern.to(z.device)
    flat = z.reshape(-1 if n else z.shape[:-1].numel(), n).t()
    out = SparseCore.apply(flat, lam, values, *both_views(pattern, flat))
    return out.t().reshape(z.shape)
