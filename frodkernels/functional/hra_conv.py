# SPDX-License-Identifier: Apache-2.0
"""HRA's adapted convolution without its weight: ``conv(x, W H) = conv(x, W) - conv1x1(conv(x, q), W q S^-1)``.

W [m, C, kh, kw] as a matrix is [m, n] with n = C kh kw, and u is [n, r]: the r unit columns q are r more filters, with
the stride, padding and dilation of W's own. The notation of ``_reflections.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frodkernels.functional._common import autocast_dtype, autocast_off, check_tensor, first_order, without_autocast
from frodkernels.functional._reflections import Reflections, check_reflections, warn_if_deficient
from frodkernels.ops import householder as ops

Pair = int | tuple[int, int]


class Filters(torch.autograd.Function):
    """From u [n, r] and W [m, n]: the filters q [n, r] and the mixer B = W q S^-1 [m, r].

    K = W^T dB S^-T is what dq gains from B, dS = -(q S^-1)^T K, and q (dG + dG^T) comes on top.
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, W: Tensor, u: Tensor, orthogonalize: bool) -> tuple[Tensor, Tensor]:
        chain = Reflections.of(u, W, False, orthogonalize)
        mixer = chain.solved(ops.householder(W, chain.unit, None)[1], False)
        ctx.save_for_backward(W, u, *chain.saved())
        return chain.unit.clone() if orthogonalize else chain.unit, mixer

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, dunit: Tensor, dmixer: Tensor) -> tuple[Tensor | None, ...]:
        W, u, *kept = ctx.saved_tensors
        need_weight, need_u = ctx.needs_input_grad[:2]
        chain = Reflections.again(u, W, kept, False)
        dproduct = chain.solved(dmixer, True)  # of W q
        dweight = (dproduct @ chain.unit.t()).to(W.dtype) if need_weight else None
        if not need_u:
            return dweight, None, None
        k = ops.householder_gradient(W, dproduct.contiguous())
        return dweight, chain.gradient(u, -(dunit + k), -chain.left, k), None


class Coefficients(torch.autograd.Function):
    """C = conv(x, q) in q's dtype for a narrower x [N, C, height, width].

    x itself is what is kept; its widened copies live for a moment.
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, filters: Tensor, *geometry: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, filters)
        ctx.geometry = geometry
        stride, padding, dilation = geometry
        return F.conv2d(x.to(filters.dtype), filters, None, stride, padding, dilation)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
        x, filters = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:2], False]
        stride, padding, dilation = ctx.geometry
        dx, dfilters, _ = torch.ops.aten.convolution_backward(
            dc, x.to(filters.dtype), filters, None, stride, padding, dilation, False, (0, 0), 1, needs
        )
        return dx.to(x.dtype) if needs[0] else None, dfilters if needs[1] else None, None, None, None


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _padded(x: Tensor, padding: Pair | str, kernel: tuple[int, int], dilation: Pair) -> tuple[Tensor, tuple[int, int]]:
    """x and the padding as numbers; "same" with an even kernel pads one side more, which only x itself can have."""
    if not isinstance(padding, str):
        return x, _pair(padding)
    if padding == "valid":
        return x, (0, 0)
    high, wide = (d * (k - 1) for k, d in zip(kernel, _pair(dilation), strict=True))
    if high % 2 == 0 and wide % 2 == 0:
        return x, (high // 2, wide // 2)
    return F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)), (0, 0)


def hra_conv2d(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    *,
    orthogonalize: bool = False,
) -> Tensor:
    """HRA's adapted convolution: ``conv2d(x, W H_1 ... H_r) + bias`` on W as the matrix [m, C kh kw].

    The adapted weight is never formed: r more filters and a 1 x 1 convolution correct the layer's own result.

    Args:
        x: [N, C, height, width] or [C, height, width]; float32, float64, bfloat16 or float16. Under autocast it is cast
            as ``torch.nn.functional.conv2d`` would cast it.
        weight: [m, C, kh, kw] the layer's own weight, usually frozen, without groups. weight and bias are cast to x's
            dtype where they differ.
        u: [C kh kw, r] directions of the reflections, any floating dtype; a zero column makes the result NaN.
        bias: [m] or None.
        stride, padding, dilation: as for ``torch.nn.functional.conv2d``.
        orthogonalize: take the Gram-Schmidt basis of u instead (PEFT's ``apply_GS``).

    Returns:
        As ``torch.nn.functional.conv2d``, in x's dtype (autocast's under autocast). Differentiable once in x, u, weight
        and bias.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; names it. A weight of a grouped convolution
            has too few channels and is one.
    """
    check_tensor(x, "x")
    check_tensor(weight, "weight")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [m, C, kh, kw], got {list(weight.shape)}")
    m, channels = weight.shape[:2]
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(
            f"x must be [N, {channels}, height, width] to match weight {list(weight.shape)} (there are no groups), "
            f"got {list(x.shape)}"
        )
    check_reflections(u, weight[0].numel() if m else channels * weight.shape[2] * weight.shape[3], orthogonalize)
    if bias is not None:
        check_tensor(bias, "bias")
        if bias.shape != (m,):
            raise ValueError(f"bias must be [{m}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("u", u), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")
    if orthogonalize:
        warn_if_deficient(u)
    dtype = autocast_dtype(x) or x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    y = F.conv2d(x, weight, None if bias is None else bias.to(dtype), stride, padding, dilation)
    return correct_conv2d(y, x, weight, u, stride, padding, dilation, orthogonalize)


def correct_conv2d(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    orthogonalize: bool,
) -> Tensor:
    """conv(x, W H) from y = conv(x, W), whatever made y; all of one dtype but u."""
    m, r = weight.shape[0], u.shape[1]
    unit, mixer = Filters.apply(weight.flatten(1), u, orthogonalize)
    mixed = x.element_size() < u.element_size()  # then the correction is as precise as u, and rounded once with y
    filters = unit.t().reshape(r, *weight.shape[1:])
    filters = filters if mixed else filters.to(x.dtype)
    with autocast_off(x):
        if mixed:
            x, padding = _padded(x, padding, filters.shape[2:], dilation)
            batch = x if x.dim() == 4 else x.unsqueeze(0)
            coefficients = Coefficients.apply(batch, filters, _pair(stride), padding, _pair(dilation))
            coefficients = coefficients if x.dim() == 4 else coefficients.squeeze(0)
        else:
            coefficients = F.conv2d(x, filters, None, stride, padding, dilation)
        correction = F.conv2d(coefficients, mixer.to(filters.dtype).reshape(m, r, 1, 1))
        return (y - correction).to(y.dtype)
