# SPDX-License-Identifier: Apache-2.0
"""``frodkernels::reflect`` and ``reflect_backward``: tokens through a chain of reflections, factors and all.

What ``reflections`` forms and ``householder`` applies, as one op each way: on the CPU one native call, which forms and
packs the factors block by block; elsewhere the ops it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frodkernels import _ops
from frodkernels.ops import householder, reflections
from frodkernels.reference.reflections import kept_dtype, sums_dtype


def rounds(x: Tensor, u: Tensor) -> bool:
    """Whether u has x's own 16 bits: then products may round the factors to these, as plain PyTorch would."""
    return x.dtype == u.dtype and x.element_size() == 2


def _native(op: str, x: Tensor, u: Tensor) -> Callable[..., Any] | None:
    """The native op, where it serves tokens and directions like these."""
    if u.dtype == torch.float64 and x.dtype != torch.float64:
        return None
    return _ops.native(op) if reflections.native_serves(x) else None


def _direct(op: str, x: Tensor, u: Tensor) -> Callable[..., Any] | None:
    """Likewise where nothing watches the call. Python's registration would cost as much as a small product."""
    return _native(op, x, u) if _ops.unwatched(x, u) else None


def check(tokens: Tensor, u: Tensor, name: str) -> None:
    """tokens [T, n] and u [n, r] on one device; ValueError names the argument."""
    householder.check_tokens(tokens, name)
    householder.check_tokens(u, "u", tokens=tokens.shape[1])
    if u.shape[1] < 1:
        raise ValueError(f"u must be [{tokens.shape[1]}, r] with r >= 1, got {list(u.shape)}")


def _forward_fake(x, u, transpose):
    check(x, u, "x")
    wide, r = x.dtype == torch.float64, u.shape[1]
    kept = kept_dtype(u, wide)
    coefficients = x.new_empty(x.shape[0], r, dtype=sums_dtype(u, wide))
    return x.new_empty(x.shape), coefficients, u.new_empty(r, r, dtype=kept), u.new_empty(r, dtype=kept)


def _forward_kernel(x, u, transpose):
    native = _native("reflect", x, u)
    if native is not None:
        return native(x, u, transpose, rounds(x, u))
    unit, left, inverse, norms = reflections.reflections(u, x.dtype == torch.float64, transpose)
    out, coefficients = householder.householder(x, left, unit, None, rounds(x, u))
    return out, coefficients, inverse, norms


def _check_backward(g: Tensor, x: Tensor, u: Tensor) -> None:
    check(g, u, "g")
    householder.check_tokens(x, "x", g.shape[1], g.shape[0])
    if x.dtype != g.dtype:
        raise ValueError(f"x must have g's dtype, {g.dtype}, got {x.dtype}")


def _backward_fake(g, x, u, coefficients, inverse, norms, transpose, needs):
    _check_backward(g, x, u)
    return g.new_empty(g.shape if needs[0] else 0), u.new_empty(u.shape if needs[1] else 0)


def _backward_kernel(g, x, u, coefficients, inverse, norms, transpose, needs):
    native = _native("reflect_backward", g, u)
    if native is not None:
        dx = g.new_empty(g.shape if needs[0] else 0)
        return dx, native(g, x, u, coefficients, inverse, norms, dx, transpose, needs, rounds(g, u))
    unit, left = reflections.reflections_again(u, inverse, norms, g.dtype == torch.float64, not transpose)
    if not needs[1]:
        dx = householder.householder(g, left, unit, None, rounds(g, u))[0] if needs[0] else g.new_empty(0)
        return dx, u.new_empty(0)
    dx, q, sums, _ = householder.householder_backward(g, x, coefficients, left, unit, None, needs, rounds(g, u))
    a, b = (q, coefficients) if transpose else (coefficients, q)
    return dx, reflections.reflections_gradient(u, unit, norms, sums, a, b)


_ops.register(
    "reflect",
    "(Tensor x, Tensor u, bool transpose) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_forward_kernel,
    fake=_forward_fake,
)
_ops.register(
    "reflect_backward",
    "(Tensor g, Tensor x, Tensor u, Tensor coefficients, Tensor inverse, Tensor norms, bool transpose, bool[2] needs)"
    " -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)


def reflect(x: Tensor, u: Tensor, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x H_1 ... H_r, coefficients x q S^-1 [T, r], S^-1, norms |u_i|); the reverse order with ``transpose``.

    x [T, n] of any strides, u [n, r]; not differentiable. What ``reflect_backward`` takes comes back besides.
    """
    native = _direct("reflect", x, u)
    if native is None:
        return torch.ops.frodkernels.reflect(x, u, transpose)
    return native(x, u, transpose, rounds(x, u))


def reflect_backward(
    g: Tensor,
    x: Tensor,
    u: Tensor,
    kept: Sequence[Tensor],
    transpose: bool,
    needs: list[bool],
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """(dx, du) of ``reflect``'s first result from its gradient g; either is empty where ``needs`` says so.

    kept is the rest of what ``reflect`` gave; x and coefficients may be anything [T, n] and [T, r] where only dx is
    needed. With ``overwrite`` g is the caller's to lose: dx may be written over it.
    """
    native = _direct("reflect_backward", g, u)
    if native is None:
        return torch.ops.frodkernels.reflect_backward(g, x, u, *kept, transpose, needs)
    in_place = overwrite and needs[0] and g.is_contiguous() and not g.is_neg()
    dx = g if in_place else g.new_empty(g.shape if needs[0] else 0)
    return dx, native(g, x, u, *kept, dx, transpose, needs, rounds(g, u))
