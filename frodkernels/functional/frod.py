# SPDX-License-Identifier: Apache-2.0
"""FRoD's linear map ``y = x V (S + diag lam)^T U^T + bias`` in three association orders.

Shapes: x [T, n], U [m, n], V [n, n], lam [n], values [nnz]; D = diag lam; g = dL/dy [T, m]. z, u and dz are kept
feature-major, [n, T]: the GEMM library writes and reads them for free and each nonzero then touches contiguous tokens.
U and V arrive in their own dtype and are cast to x's where they are used.
Source: FRoD, https://doi.org/10.1609/aaai.v40i31.39813.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frodkernels.functional._common import autocast_dtype, check_pattern, check_tensor, first_order, without_autocast
from frodkernels.functional._views import both_views, columns_view, gradients, product, rows_view
from frodkernels.functional.frod_path import PATHS, choose
from frodkernels.ops import sparse_core as ops
from frodkernels.pattern import SparsePattern

Grads = tuple[Tensor | None, ...]


def _addmm(bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _with_views(ctx: Any, *grads: Tensor | None) -> Grads:
    """``grads``, and None for each tensor of the views."""
    return *grads, *(None,) * (len(ctx.needs_input_grad) - len(grads))


class FrodActivation(torch.autograd.Function):
    """z = x V;  w = z (S + D)^T;  y = w U^T + bias.

    u = g U;  dz = u (S + D);  dx = dz V^T;  dvalues[k] = sum_t u[t, row_k] z[t, col_k];  dlam = sum_t u * z.
    Saves z, not x: one [n, T] matrix, and dx is cheaper from dz.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, U: Tensor, V: Tensor, lam: Tensor, values: Tensor, bias: Tensor | None, *views: Tensor
    ) -> Tensor:
        z = V.to(x.dtype).t() @ x.t()
        w = product(z, lam, values, rows_view(views))
        ctx.save_for_backward(z, U, V, lam, values, *columns_view(views))
        return _addmm(bias, w.t(), U.to(x.dtype).t())

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Grads:
        z, U, V, lam, values, *columns = ctx.saved_tensors
        U, V = U.to(z.dtype), V.to(z.dtype)
        need_x, _, _, need_lam, need_values, need_bias = ctx.needs_input_grad[:6]
        g = g.to(z.dtype)
        dx = dlam = dvalues = None
        if need_x or need_lam or need_values:
            dz, dlam, dvalues = gradients(U.t() @ g.t(), z, lam, values, columns, [need_x, need_lam, need_values])
            dx = None if dz is None else dz.t() @ V.t()
        return _with_views(ctx, dx, None, None, dlam, dvalues, g.sum(0) if need_bias else None)


class FrodFold(torch.autograd.Function):
    """F = U (S + D);  y = (x V) F^T + bias: the sparse product runs on the m rows of U instead of the T tokens.

    dz = g F;  dx = dz V^T;  u = g U for dvalues and dlam as in FrodActivation. Saves z and F.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, U: Tensor, V: Tensor, lam: Tensor, values: Tensor, bias: Tensor | None, *views: Tensor
    ) -> Tensor:
        folded = product(U.to(x.dtype).t(), lam, values, columns_view(views))  # [n, m]
        z = V.to(x.dtype).t() @ x.t()
        ctx.save_for_backward(z, folded, U, V, lam, values, *columns_view(views))
        return _addmm(bias, z.t(), folded)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Grads:
        z, folded, U, V, lam, values, *columns = ctx.saved_tensors
        U, V = U.to(z.dtype), V.to(z.dtype)
        need_x, _, _, need_lam, need_values, need_bias = ctx.needs_input_grad[:6]
        g = g.to(z.dtype)
        dx = (g @ folded.t()) @ V.t() if need_x else None
        dlam = dvalues = None
        if need_lam or need_values:
            _, dlam, dvalues = gradients(U.t() @ g.t(), z, lam, values, columns, [False, need_lam, need_values])
        return _with_views(ctx, dx, None, None, dlam, dvalues, g.sum(0) if need_bias else None)


class FrodMaterialize(torch.autograd.Function):
    """W = U (S + D) V^T;  y = x W^T + bias.

    dx = g W;  Q = (g^T x) V [m, n];  dvalues[k] = U[:, row_k] . Q[:, col_k];  dlam = sum_j U[j] * Q[j].
    Saves x and W; no product with S ever sees a token, so it wins once T exceeds about 2 m n / (2 n - m).
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, U: Tensor, V: Tensor, lam: Tensor, values: Tensor, bias: Tensor | None, *views: Tensor
    ) -> Tensor:
        W = _dense(U.to(x.dtype), V.to(x.dtype), lam, values, views)
        ctx.save_for_backward(x, W, U, V, lam, values, *columns_view(views))
        return _addmm(bias, x, W.t())

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Grads:
        x, W, U, V, lam, values, *columns = ctx.saved_tensors
        U, V = U.to(x.dtype), V.to(x.dtype)
        need_x, _, _, need_lam, need_values, need_bias = ctx.needs_input_grad[:6]
        g = g.to(x.dtype)
        dx = g @ W if need_x else None
        dlam, dvalues = _dense_grads(g.t() @ x, U, V, lam, values, columns, need_lam, need_values)
        return _with_views(ctx, dx, None, None, dlam, dvalues, g.sum(0) if need_bias else None)


def _dense(U: Tensor, V: Tensor, lam: Tensor, values: Tensor, views: tuple[Tensor, ...]) -> Tensor:
    """U (S + D) V^T, [m, n]."""
    folded = product(U.t(), lam, values, columns_view(views))  # [n, m]
    return folded.t() @ V.t()


def _dense_grads(
    G: Tensor,
    U: Tensor,
    V: Tensor,
    lam: Tensor,
    values: Tensor,
    columns: list[Tensor],
    need_lam: bool,
    need_values: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dlam, dvalues) from G = dL/dW: with Q = G V, the same sums as over tokens, over the m rows of U and Q."""
    if not (need_lam or need_values):
        return None, None
    Q = V.t() @ G.t()  # [n, m]
    _, dlam, dvalues = gradients(U.t(), Q, lam, values, columns, [False, need_lam, need_values])
    return dlam, dvalues


class FrodWeight(torch.autograd.Function):
    """W = U (S + D) V^T, with the parameter gradients of FrodMaterialize for G = dL/dW."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, U: Tensor, V: Tensor, lam: Tensor, values: Tensor, *views: Tensor) -> Tensor:
        ctx.save_for_backward(U, V, lam, values, *columns_view(views))
        return _dense(U, V, lam, values, views)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, G: Tensor) -> Grads:
        U, V, lam, values, *columns = ctx.saved_tensors
        _, _, need_lam, need_values = ctx.needs_input_grad[:4]
        dlam, dvalues = _dense_grads(G.to(U.dtype), U, V, lam, values, columns, need_lam, need_values)
        return _with_views(ctx, None, None, dlam, dvalues)


_FUNCTIONS = {"activation": FrodActivation, "fold": FrodFold, "materialize": FrodMaterialize}


def _check_factors(U: Tensor, V: Tensor, lam: Tensor, values: Tensor, pattern: SparsePattern) -> tuple[int, int]:
    for name, tensor in (("U", U), ("V", V), ("lam", lam), ("values", values)):
        check_tensor(tensor, name)
    if U.dim() != 2:
        raise ValueError(f"U must be [m, n], got {list(U.shape)}")
    m, n = U.shape
    if V.shape != (n, n):
        raise ValueError(f"V must be [{n}, {n}] to match U {list(U.shape)}, got {list(V.shape)}")
    check_pattern(pattern, (n, n))
    ops.check_entries(lam, values, pattern.nnz, n)
    for name, tensor in (("U", U), ("V", V)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires grad, but U and V are frozen in FRoD: no gradient is computed")
    return m, n


def frod_linear(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    lam: Tensor,
    values: Tensor,
    pattern: SparsePattern,
    bias: Tensor | None = None,
    *,
    path: str = "auto",
) -> Tensor:
    """FRoD's adapted linear layer: ``x V (S + diag lam)^T U^T + bias``.

    Args:
        x: [..., n] input; float32, float64, bfloat16 or float16, any strides. Under autocast it is cast as
            ``torch.nn.functional.linear`` would cast it.
        U: [m, n] frozen left factor of the layer. U, V and bias are cast to x's dtype where they differ.
        V: [n, n] frozen basis shared by a module category.
        lam: [n] trainable diagonal, any floating dtype (float32 beside a 16-bit x is the usual case).
        values: [nnz] trainable entries of S, in the pattern's COO order, any floating dtype.
        pattern: [n, n] pattern of S.
        bias: [m] or None.
        path: the association order. "activation" multiplies tokens by each factor in turn; "fold" forms U (S + diag
            lam) first; "materialize" forms the whole [m, n] weight first; "auto" takes the cheapest by a measured
            cost model. All give the same map; nothing is cached between calls.

    Returns:
        [..., m] in x's dtype (autocast's under autocast). Differentiable once in x, lam, values and bias; each
        gradient has its tensor's dtype.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; names it.
        NotImplementedError: U or V requires grad.
    """
    check_tensor(x, "x")
    m, n = _check_factors(U, V, lam, values, pattern)
    if x.dim() < 1 or x.shape[-1] != n:
        raise ValueError(f"x must be [..., {n}] to match V {list(V.shape)}, got {list(x.shape)}")
    if bias is not None:
        check_tensor(bias, "bias")
        if bias.shape != (m,):
            raise ValueError(f"bias must be [{m}], got {list(bias.shape)}")
    for name, tensor in (("U", U), ("V", V), ("lam", lam), ("values", values), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")
    if path not in ("auto", *PATHS):
        raise ValueError(f"path must be 'auto', 'activation', 'fold' or 'materialize', got {path!r}")
    dtype = autocast_dtype(x) or x.dtype
    x = x.to(dtype)  # U and V are cast inside, so that what is kept for the backward is the one frozen copy
    bias = None if bias is None else bias.to(dtype)
    flat = x.reshape(-1 if n else x.shape[:-1].numel(), n)
    if path == "auto":
        path = choose(flat, m, pattern.nnz, lam.requires_grad or values.requires_grad)
    pattern = pattern.to(x.device)
    y = _FUNCTIONS[path].apply(flat, U, V, lam, values, bias, *both_views(pattern, flat))
    return y.reshape(*x.shape[:-1], m)


def frod_weight(U: Tensor, V: Tensor, lam: Tensor, values: Tensor, pattern: SparsePattern) -> Tensor:
    """FRoD's effective weight ``U (S + diag lam) V^T``, dense.

    Args:
        U, V, lam, values, pattern: as for :func:`frod_linear`; V is cast to U's dtype where they differ.

    Returns:
        [m, n] in U's dtype. Differentiable once in lam and values.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; names it.
        NotImplementedError: U or V requires grad.
    """
    _check_factors(U, V, lam, values, pattern)
    for name, tensor in (("V", V), ("lam", lam), ("values", values)):
        if tensor.device != U.device:
            raise ValueError(f"{name} is on {tensor.device} but U is on {U.device}")
    pattern = pattern.to(U.device)
    return FrodWeight.apply(U, V.to(U.dtype), lam, values, *both_views(pattern, U))
