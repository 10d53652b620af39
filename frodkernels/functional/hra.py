# SPDX-License-Identifier: Apache-2.0
"""HRA's adapted linear layer ``y = x (W H)^T + bias``, H = H_1 ... H_r, from either side of W.

Input side   x' = x H^T, y = x' W^T: two tall-skinny products before the layer, which may be anything.
Output side  y = x W^T - (x q S^-T) (W q)^T: shaped like LoRA, the layer's own product untouched. It reads W twice
             more, and sums that go into u's gradient see no product rounded to 16 bits.
Source: HRA, https://arxiv.org/abs/2405.17484; the notation of ``_reflections.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frodkernels.functional._common import as_dtype, autocast_dtype, check_tensor, first_order, without_autocast
from frodkernels.functional._gemm import linear, times
from frodkernels.functional._reflections import (
    Reflections,
    check_reflections,
    reflect,
    reflect_backward,
    warn_if_deficient,
)
from frodkernels.functional.householder import check_input, flattened
from frodkernels.functional.hra_side import SIDES, choose
from frodkernels.ops import householder as ops
from frodkernels.ops.reflect import rounds


class HRAInput(torch.autograd.Function):
    """C = x q S^-T;  x' = x - C q^T;  y = x' W^T + bias.

    g' = g W;  Q = g' q S^-1;  dx = g' - Q q^T;  dq = -(x^T Q + g'^T C) + q (dG + dG^T), dS = Q^T C;
    dW = g^T x', where W is trained. Saves x and C [T, r]; x' is formed again for dW.
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, u: Tensor, bias: Tensor | None, orthogonalize: bool) -> Tensor:
        reflected, (c, *kept) = reflect(x, u, True, orthogonalize)
        _, need_weight, need_u = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if need_weight or need_u else None, weight, u, c if need_u else None, *kept)
        ctx.dtype = x.dtype
        return linear(reflected, as_dtype(weight, x.dtype), bias)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, *kept = ctx.saved_tensors
        need_x, need_weight, need_u, need_bias = ctx.needs_input_grad[:4]
        g = as_dtype(g, ctx.dtype)
        dx = dweight = du = None
        if need_x or need_u:
            into = times(g, as_dtype(weight, ctx.dtype))
            dx, du = reflect_backward(into, x, u, kept, True, [need_x, need_u], overwrite=True)
        if need_weight:
            # x' by what is kept: the way back through the untransposed chain is the transposed one
            reflected, _ = reflect_backward(x, None, u, kept, False, [True, False])
            dweight = (g.t() @ reflected).to(weight.dtype)
        return dx if need_x else None, dweight, du if need_u else None, g.sum(0) if need_bias else None, None


class HRAOutput(torch.autograd.Function):
    """B = W q;  C = x q S^-T;  y = x W^T + bias - C B^T.

    Q = g B S^-1;  dx = g W - Q q^T;  dB = -g^T C;  dq = -x^T Q + W^T dB + q (dG + dG^T), dS = Q^T C;
    dW = g^T x + dB q^T, where W is trained. Saves x, C [T, r] and B [m, r].
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, u: Tensor, bias: Tensor | None, orthogonalize: bool) -> Tensor:
        W = as_dtype(weight, x.dtype)
        y = linear(x, W, bias)
        chain = Reflections.of(u, x, True, orthogonalize)
        _, b = ops.householder(W, chain.unit, None, None, rounds(x, u))
        out, c = ops.householder(x, chain.left, b, y, rounds(x, u))
        ctx.save_for_backward(x, weight, u, c, b, *chain.saved())
        return out

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, c, b, *kept = ctx.saved_tensors
        need_x, need_weight, need_u, need_bias = ctx.needs_input_grad[:4]
        chain = Reflections.again(u, x, kept, True)
        g, W = as_dtype(g, x.dtype), as_dtype(weight, x.dtype)
        dx = dweight = du = None
        if need_x or need_u or need_weight:
            # without dx, x stands for a base that is not read
            base, needs = times(g, W) if need_x else x, [need_x, need_u or need_weight]
            factors = chain.solved(b, False), chain.unit
            dx, q, sum_x, sum_g = ops.householder_backward(g, x, c, *factors, base, needs, rounds(x, u))
            if need_u:
                du = chain.gradient(u, sum_x + ops.householder_gradient(W, sum_g), q, c)
            if need_weight:
                dweight = (g.t() @ x - (sum_g @ chain.unit.t()).to(x.dtype)).to(weight.dtype)
        return dx if need_x else None, dweight, du, g.sum(0) if need_bias else None, None


def _check_layer(x: Tensor, weight: Tensor, u: Tensor, bias: Tensor | None, n: int, orthogonalize: bool) -> None:
    check_reflections(u, n, orthogonalize)
    if bias is not None:
        check_tensor(bias, "bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("u", u), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")


def hra_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    *,
    orthogonalize: bool = False,
    side: str = "auto",
) -> Tensor:
    """HRA's adapted linear layer: ``x (W H_1 ... H_r)^T + bias`` with H_i = I - 2 u_i u_i^T / |u_i|^2.

    Args:
        x: [..., n] input; float32, float64, bfloat16 or float16, any strides. Under autocast it is cast as
            ``torch.nn.functional.linear`` would cast it.
        weight: [m, n] the layer's own weight W, usually frozen. weight and bias are cast to x's dtype where they
            differ.
        u: [n, r] directions of the reflections, any floating dtype (float32 beside a 16-bit x is the usual case);
            their lengths do not matter, a zero column makes the result NaN.
        bias: [m] or None.
        orthogonalize: take the Gram-Schmidt basis of u instead (PEFT's ``apply_GS``).
        side: "input" reflects x before the product with W; "output" corrects the product after it. Both give the same
            map. With 16-bit x and float32 u, "output" gives u's gradient to float32's precision, "input" to that of
            the 16-bit product it comes from. "auto" takes the cheaper by a cost model of T, m, n and r, and the more
            precise where that costs little.

    Returns:
        [..., m] in x's dtype (autocast's under autocast). Differentiable once in x, u, weight and bias; each gradient
        has its tensor's dtype.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; names it.
    """
    n = check_input(x)
    check_tensor(weight, "weight")
    if weight.dim() != 2 or weight.shape[1] != n:
        raise ValueError(f"weight must be [m, {n}] to match x {list(x.shape)}, got {list(weight.shape)}")
    _check_layer(x, weight, u, bias, n, orthogonalize)
    if side not in ("auto", *SIDES):
        raise ValueError(f"side must be 'auto', 'input' or 'output', got {side!r}")
    if orthogonalize:
        warn_if_deficient(u)
    dtype = autocast_dtype(x) or x.dtype
    x = as_dtype(x, dtype)
    bias = None if bias is None else as_dtype(bias, dtype)
    flat, m = flattened(x), weight.shape[0]
    if side == "auto":
        side = choose(flat, m, u)
    y = (HRAInput if side == "input" else HRAOutput).apply(flat, weight, u, bias, orthogonalize)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], m)
