# SPDX-License-Identifier: Apache-2.0
"""PaCA's linear layer: k chosen input columns of the weight are trained, the others are frozen.

``y = x W'^T + bias`` with W' = W but for W'[:, J] = C. The gradient of C needs x[:, J] alone, k numbers a token, where
that of an added adapter needs x and products with it. Source: PaCA, https://arxiv.org/abs/2503.01905.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from frodkernels.functional._common import as_dtype, autocast_dtype, check_tensor, first_order, without_autocast
from frodkernels.functional._gemm import linear, times
from frodkernels.ops import householder as skinny


def _hold(weight: Tensor, columns: Tensor, column_weight: Tensor) -> bool:
    """Whether the columns are in W, where the host can tell without waiting for a device."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(weight, FakeTensor):
        return False
    return torch.equal(weight.index_select(1, columns), column_weight.to(weight.dtype))


class PaCA(torch.autograd.Function):
    """y = x W^T + x_J (C - W_J)^T + bias;  dx = g W, dx_J = g C;  dC = g^T x_J. Saves x_J [T, k].

    Where W holds C already (``placed``), y is one product, and so is dx if it still does (on the CPU; elsewhere nobody
    asks, and dx_J is always a product of its own).
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, columns: Tensor, column_weight: Tensor, bias: Tensor | None, placed: bool
    ) -> Tensor:
        chosen = x.index_select(1, columns)
        need_columns = ctx.needs_input_grad[3]
        ctx.placed, ctx.dtype = placed, x.dtype
        ctx.save_for_backward(chosen if need_columns else None, weight, columns, column_weight)
        W = as_dtype(weight, x.dtype)
        y = linear(x, W, bias)
        if not placed and columns.numel():
            wide = torch.promote_types(torch.promote_types(column_weight.dtype, weight.dtype), x.dtype)
            change = column_weight.to(wide) - weight.index_select(1, columns).to(wide)
            y.addmm_(chosen, change.to(x.dtype).t())
        return y

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        chosen, weight, columns, column_weight = ctx.saved_tensors
        need_x, need_weight, _, need_columns, need_bias = ctx.needs_input_grad[:5]
        g = as_dtype(g, ctx.dtype)
        sums = torch.float64 if torch.float64 in (g.dtype, column_weight.dtype) else torch.float32
        dx = dcolumns = None
        if need_x:
            dx = times(g, as_dtype(weight, g.dtype))
            # what was placed may have made room for another forward's columns since
            if columns.numel() and not (ctx.placed and _hold(weight, columns, column_weight)):
                _, into = skinny.householder(g, column_weight.to(sums), None)  # g C
                dx.index_copy_(1, columns, into.to(g.dtype))
        if need_columns:
            dcolumns = skinny.householder_gradient(g, chosen.to(sums)).to(column_weight.dtype)
        return dx, None, None, dcolumns, g.sum(0) if need_bias else None, None


_checked: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # id -> tensor, its version, the size it was good for


def check_columns(columns: object, n: int) -> Tensor:
    """``columns`` as distinct int64 positions below n; ValueError names the first bad entry."""
    if not isinstance(columns, Tensor):
        raise ValueError(f"columns must be a 1-D integer tensor, got {type(columns).__name__}")
    if columns.dim() != 1 or columns.dtype == torch.bool or columns.is_floating_point() or columns.is_complex():
        raise ValueError(f"columns must be a 1-D integer tensor, got {columns.dtype} {list(columns.shape)}")
    if torch.compiler.is_compiling() or isinstance(columns, FakeTensor) or columns.is_meta:
        return columns.to(torch.int64)
    version = -1 if columns.is_inference() else columns._version
    known = _checked.get(id(columns))
    # reading a tensor waits for its device; on the CPU it costs less than a doubt would
    if columns.device.type != "cpu" and known is not None and known[0]() is columns and known[1:] == (version, n):
        return columns.to(torch.int64)
    wide = columns.to(torch.int64)
    bad = ((wide < 0) | (wide >= n)).nonzero()
    if bad.numel():
        k = int(bad[0])
        raise ValueError(f"columns[{k}] = {int(wide[k])} is out of range for {n} inputs")
    order, place = wide.sort()
    twin = (order[1:] == order[:-1]).nonzero()
    if twin.numel():
        raise ValueError(f"columns[{int(place[twin[0] + 1])}] = {int(order[twin[0]])} is there twice")
    if columns.device.type != "cpu" and version >= 0:
        key = id(columns)
        _checked[key] = weakref.ref(columns, lambda _: _checked.pop(key, None)), version, n
    return wide


def adapted(
    x: Tensor, weight: Tensor, columns: Tensor, column_weight: Tensor, bias: Tensor | None, *, placed: bool
) -> Tensor:
    """:func:`paca_linear` of checked arguments; ``placed``: weight's columns hold column_weight."""
    x = as_dtype(x, autocast_dtype(x) or x.dtype)
    bias = None if bias is None else as_dtype(bias, x.dtype)
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = PaCA.apply(flat, weight, columns, column_weight, bias, placed)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def paca_linear(
    x: Tensor, weight: Tensor, columns: Tensor, column_weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """PaCA's adapted linear layer: ``x W'^T + bias``, W' being W with some of its columns replaced by trainable ones.

    Args:
        x: [..., n] input; float32, float64, bfloat16 or float16, any strides. Under autocast it is cast as
            ``torch.nn.functional.linear`` would cast it.
        weight: [m, n] the layer's own weight W, frozen; what its chosen columns hold cancels, where it is finite.
            weight, column_weight and bias are cast to x's dtype where they differ.
        columns: [k] integer tensor, distinct positions below n.
        column_weight: [m, k] trainable columns, any floating dtype.
        bias: [m] or None.

    Returns:
        [..., m] in x's dtype (autocast's under autocast). Besides one product with W each way there are products with
        k columns; :class:`frodkernels.nn.PaCALinear`, which keeps the columns in W, does without. Saves x[:, columns],
        k numbers a token, for the backward. Differentiable once in x, column_weight and bias; each gradient has its
        tensor's dtype.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device, or bad columns; names it.
        NotImplementedError: weight requires grad.
    """
    check_tensor(x, "x")
    check_tensor(weight, "weight", x.device)
    check_tensor(column_weight, "column_weight", x.device)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight must be [m, n] for x [..., n], got {list(weight.shape)} for {list(x.shape)}")
    m, n = weight.shape
    columns = check_columns(columns, n)
    if columns.device != x.device:
        raise ValueError(f"columns is on {columns.device} but x is on {x.device}")
    if column_weight.shape != (m, columns.numel()):
        raise ValueError(f"column_weight must be [{m}, {columns.numel()}], got {list(column_weight.shape)}")
    if bias is not None:
        check_tensor(bias, "bias", x.device)
        if bias.shape != (m,):
            raise ValueError(f"bias must be [{m}], got {list(bias.shape)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("weight requires grad, but it is frozen in PaCA: train column_weight instead")
    return adapted(x, weight, columns, column_weight, bias, placed=False)
