# SPDX-License-Identifier: Apache-2.0
"""``frodkernels.householder``: tokens through a chain of reflections; and HRA's regulariser."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from frodkernels.functional._common import (
    as_dtype,
    autocast_dtype,
    autocast_off,
    check_tensor,
    first_order,
    without_autocast,
)
from frodkernels.functional._reflections import check_reflections, reflect, reflect_backward, warn_if_deficient
from frodkernels.reference.sparse_core import accumulator


class Householder(torch.autograd.Function):
    """C = x q S^-1;  out = x - C q^T  (S^-T for the transposed chain).

    Q = g q S^-T;  dx = g - Q q^T;  dq = -(x^T Q + g^T C) + q (dG + dG^T) with dS^T = Q^T C: one sum over the tokens.
    Saves x and C [T, r].
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, u: Tensor, transpose: bool, orthogonalize: bool) -> Tensor:
        out, (c, *kept) = reflect(x, u, transpose, orthogonalize)
        need_u = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if need_u else None, u, c if need_u else None, *kept)
        ctx.transpose = transpose
        ctx.dtype = x.dtype
        return out

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, u, *kept = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        dx, du = reflect_backward(as_dtype(g, ctx.dtype), x, u, kept, ctx.transpose, needs)
        return dx if needs[0] else None, du if needs[1] else None, None, None


def flattened(x: Tensor) -> Tensor:
    """x [..., n] as [T, n].

    Outside the Functions: a result that is a view inside of one could not be modified in place.
    """
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_input(x: Tensor, name: str = "x") -> int:
    """A floating-point tensor [..., n]; returns n."""
    check_tensor(x, name)
    if x.dim() < 1:
        raise ValueError(f"{name} must be [..., n], got a scalar")
    return x.shape[-1]


def householder(x: Tensor, u: Tensor, *, transpose: bool = False, orthogonalize: bool = False) -> Tensor:
    """Multiply features by a chain of Householder reflections: ``x H_1 H_2 ... H_r``, H_i = I - 2 u_i u_i^T / |u_i|^2.

    The chain is never formed: with its compact WY form it costs two products with an [n, r] matrix. Source: HRA,
    https://arxiv.org/abs/2405.17484.

    Args:
        x: [..., n] features; float32, float64, bfloat16 or float16, any strides. Under autocast it is cast as
            ``torch.nn.functional.linear`` would cast it.
        u: [n, r] directions, any of these dtypes; their lengths do not matter. A zero column is no reflection and
            makes the result NaN.
        transpose: the reverse order, ``x H_r ... H_1``, which undoes the chain.
        orthogonalize: take the Gram-Schmidt basis of u's columns instead (PEFT's ``apply_GS``). Columns that depend
            on those before them make the map arbitrary: on the CPU that is warned of.

    Returns:
        [..., n] in x's dtype (autocast's under autocast). Sums in float32 (float64 when x or u are), rounded once;
        factors come from float64 for float32 u, and may be rounded to the 16 bits that u shares with x. Differentiable
        once in x and u; each gradient has its tensor's dtype.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; names it.
    """
    n = check_input(x)
    check_reflections(u, n, orthogonalize)
    if u.device != x.device:
        raise ValueError(f"u is on {u.device} but x is on {x.device}")
    if orthogonalize:
        warn_if_deficient(u)
    x = as_dtype(x, autocast_dtype(x) or x.dtype)
    y = Householder.apply(flattened(x), u, transpose, orthogonalize)
    return y if x.dim() == 2 else y.reshape(x.shape)


def orthogonality_penalty(u: Tensor) -> Tensor:
    """HRA's regulariser ``||Q^T Q - I||_F`` on the unit columns Q of u: 0 when the reflections are orthogonal.

    Add it to the loss, weighted, to keep directions apart (https://arxiv.org/abs/2405.17484). Plain PyTorch:
    differentiable any number of times, on any device.

    Args:
        u: [n, r] directions; a zero column makes it NaN.

    Returns:
        A scalar in float32 (float64 for float64 u).

    Raises:
        ValueError: u is not a floating-point [n, r] tensor.
    """
    check_tensor(u, "u")
    if u.dim() != 2 or u.shape[1] < 1:
        raise ValueError(f"u must be [n, r] with r >= 1, got {list(u.shape)}")
    with autocast_off(u):
        wide = u.to(accumulator(u, u))
        unit = wide / torch.linalg.vector_norm(wide, dim=0)
        gram = unit.t() @ unit
        return torch.linalg.matrix_norm(gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device))
