# SPDX-License-Identifier: Apache-2.0
"""SHiRA's linear layer ``y = x (W + scale S)^T + bias``: a frozen weight with a sparse, trainable change.

W is read where it is and S multiplies tokens by itself: no copy of W in the forward, no dense gradient of W in the
backward. Source: SHiRA, https://arxiv.org/abs/2406.13175.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frodkernels.functional._common import (
    as_dtype,
    autocast_dtype,
    check_pattern,
    check_tensor,
    first_order,
    without_autocast,
)
from frodkernels.functional._gemm import linear, times
from frodkernels.functional._views import both_views, columns_view, gradients, product, rows_view
from frodkernels.ops import sparse_core as ops
from frodkernels.pattern import SparsePattern
from frodkernels.reference.sparse_core import accumulator


def _scaled(values: Tensor, scale: float, features: Tensor) -> Tensor:
    return values if scale == 1.0 else values.to(accumulator(features, values)) * scale


def _unscaled(dscaled: Tensor, values: Tensor, scale: float) -> Tensor:
    """dvalues from the gradient of the scaled values."""
    return (dscaled if scale == 1.0 else dscaled * scale).to(values.dtype)


def _delta_gradients(
    ctx: Any, g: Tensor, x: Tensor | None, values: Tensor, columns: list[Tensor], need_x: bool, need_values: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(scale g S [T, n], dvalues) from one pass over g and x."""
    if not (need_x or need_values):
        return None, None
    z = g.new_empty(columns[0].numel() - 1, g.shape[0]) if x is None else x.t()  # not read without dvalues
    needs = [need_x, False, need_values]
    dx, _, dvalues = gradients(g.t(), z, None, _scaled(values, ctx.scale, g), columns, needs, True)
    return None if dx is None else dx.t(), None if dvalues is None else _unscaled(dvalues, values, ctx.scale)


class SparseDelta(torch.autograd.Function):
    """y = scale x S^T;  dx = scale g S;  dvalues[k] = scale sum_t g[t, row_k] x[t, col_k]. Saves x."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: float, *views: Tensor) -> Tensor:
        ctx.scale, ctx.dtype = scale, x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, *columns_view(views))
        y = product(x.t(), None, _scaled(values, scale, x), rows_view(views), True).t()
        return torch.ops.aten._unsafe_view(y, y.shape)  # no view to autograd: it may be changed in place

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *columns = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, dvalues = _delta_gradients(ctx, as_dtype(g, ctx.dtype), x, values, columns, needs[0], needs[1])
        return dx, dvalues, *(None,) * (len(needs) - 2)


class SparseDeltaLinear(torch.autograd.Function):
    """y = x W^T + bias + scale x S^T;  dx = g W + scale g S;  dvalues as above;  dW = g^T x, where W is trained.

    Saves x, and W and the values, which live anyway.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, values: Tensor, bias: Tensor | None, scale: float, *views: Tensor
    ) -> Tensor:
        ctx.scale, ctx.dtype = scale, x.dtype
        _, need_weight, need_values = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if need_weight or need_values else None, weight, values, *columns_view(views))
        y = linear(x, as_dtype(weight, x.dtype), bias)
        rows, scaled = rows_view(views), _scaled(values, scale, x)
        if ops.adds_in_place(x, scaled):
            ops.sparse_core_add_(y.t(), x.t(), scaled, rows[:3])
        else:
            y += product(x.t(), None, scaled, rows, True).t()
        return y

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, *columns = ctx.saved_tensors
        needs = ctx.needs_input_grad
        need_x, need_weight, need_values, need_bias = needs[:4]
        g = as_dtype(g, ctx.dtype)
        dx = times(g, as_dtype(weight, g.dtype)) if need_x else None
        dvalues = dweight = None
        scaled = _scaled(values, ctx.scale, g)
        if dx is not None and ops.adds_in_place(g, scaled):
            z = dx.t() if x is None else x.t()  # not read without dvalues
            dvalues = ops.sparse_core_backward_add_(dx.t(), g.t(), z, scaled, columns[:3], need_values)
            dvalues = _unscaled(dvalues, values, ctx.scale) if need_values else None
        elif need_x or need_values:
            delta, dvalues = _delta_gradients(ctx, g, x, values, columns, need_x, need_values)
            dx = dx if dx is None or delta is None else dx.add_(delta)
        if need_weight:
            assert x is not None
            dweight = (g.t() @ x).to(weight.dtype)
        return dx, dweight, dvalues, g.sum(0) if need_bias else None, *(None,) * (len(needs) - 4)


def _check(x: Tensor, values: Tensor, pattern: SparsePattern, scale: float) -> None:
    check_tensor(x, "x")
    check_pattern(pattern)
    check_tensor(values, "values", x.device)
    m, n = pattern.shape
    if x.dim() < 1 or x.shape[-1] != n:
        raise ValueError(f"x must be [..., {n}] to match the pattern {m} x {n}, got {list(x.shape)}")
    if values.shape != (pattern.nnz,):
        raise ValueError(f"values must be [{pattern.nnz}], got {list(values.shape)}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"scale must be a number, got {type(scale).__name__}")


def _flat(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in the dtype of the product, and that as [T, n]."""
    x = as_dtype(x, autocast_dtype(x) or x.dtype)
    return x, x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def sparse_delta(x: Tensor, values: Tensor, pattern: SparsePattern, *, scale: float = 1.0) -> Tensor:
    """``scale x S^T`` for a sparse S [m, n]: what SHiRA adds to the output of a base layer that must be called.

    Arguments, result and errors as for :func:`sparse_delta_linear`.
    """
    _check(x, values, pattern, scale)
    x, flat = _flat(x)
    y = SparseDelta.apply(flat, values, float(scale), *both_views(pattern.to(x.device), flat))
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], pattern.shape[0])


def sparse_delta_linear(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    pattern: SparsePattern,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """SHiRA's adapted linear layer: ``x (W + scale S)^T + bias`` with a fixed sparse pattern of S.

    Args:
        x: [..., n] input; float32, float64, bfloat16 or float16, any strides. Under autocast it is cast as
            ``torch.nn.functional.linear`` would cast it.
        weight: [m, n] the layer's own weight W, usually frozen. weight and bias are cast to x's dtype where they
            differ.
        values: [nnz] trainable entries of S in the pattern's COO order, any floating dtype (float32 beside a 16-bit x
            is the usual case).
        pattern: [m, n] pattern of S.
        bias: [m] or None.
        scale: a number that multiplies S.

    Returns:
        [..., m] in x's dtype (autocast's under autocast). W is not copied and no dense gradient of it is formed unless
        it requires one. Differentiable once in x, weight, values and bias; each gradient has its tensor's dtype.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; names it.
    """
    _check(x, values, pattern, scale)
    m, n = pattern.shape
    check_tensor(weight, "weight", x.device)
    if weight.shape != (m, n):
        raise ValueError(f"weight must be [{m}, {n}] to match the pattern, got {list(weight.shape)}")
    if bias is not None:
        check_tensor(bias, "bias", x.device)
        if bias.shape != (m,):
            raise ValueError(f"bias must be [{m}], got {list(bias.shape)}")
    x, flat = _flat(x)
    bias = None if bias is None else as_dtype(bias, x.dtype)
    y = SparseDeltaLinear.apply(flat, weight, values, bias, float(scale), *both_views(pattern.to(x.device), flat))
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], m)
