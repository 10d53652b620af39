# SPDX-License-Identifier: Apache-2.0
"""``frodkernels::householder``, ``householder_backward`` and ``householder_gradient``: schema, checks, shapes.

Token-major: x is [T, n] with any strides. See ``reference/householder.py`` for the formulas. The factors ``left`` and
``right`` are float32, or float64, which is then what everything is summed in. ``rounded`` says that they stand for
numbers of x's own 16 bits: kernels may then round factors and coefficients to these where they enter a product (sums
stay in float32), and on CPUs with bfloat16 instructions do, at twice the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frodkernels import _backends, _ops
from frodkernels.ops.sparse_core import FLOATS
from frodkernels.reference import householder as reference

FORWARD = "householder"
BACKWARD = "householder_backward"
GRADIENT = "householder_gradient"

# What the kernels on a GPU hold at once; larger ranks are plain matrix products there, and no longer skinny.
GPU_RANKS = 128

SUMS = (torch.float32, torch.float64)


def check_tokens(x: Tensor, name: str, features: int | None = None, tokens: int | None = None) -> None:
    """``x`` must be a [T, features] floating-point matrix."""
    wrong = x.dim() != 2 or (features is not None and x.shape[1] != features)
    if wrong or (tokens is not None and x.shape[0] != tokens):
        want = f"[{'T' if tokens is None else tokens}, {'n' if features is None else features}]"
        raise ValueError(f"{name} must be {want}, got {list(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def _check_factor(factor: Tensor, name: str, rows: int | None, rank: int | None, like: Tensor) -> None:
    wrong = factor.dim() != 2 or (rows is not None and factor.shape[0] != rows)
    if wrong or (rank is not None and factor.shape[1] != rank):
        want = f"[{'features' if rows is None else rows}, {'r' if rank is None else rank}]"
        raise ValueError(f"{name} must be {want}, got {list(factor.shape)}")
    if factor.dtype not in SUMS or (like.dtype == torch.float64 and factor.dtype != torch.float64):
        raise ValueError(f"{name} must be float32 (float64 beside float64), got {factor.dtype}")


def check_forward(x: Tensor, left: Tensor, right: Tensor | None, base: Tensor | None) -> None:
    """The shapes and dtypes of ``householder``; ValueError names the argument."""
    check_tokens(x, "x")
    T, n = x.shape
    _check_factor(left, "left", n, None, x)
    if right is not None:
        _check_factor(right, "right", n if base is None else None, left.shape[1], left)
        if right.dtype != left.dtype:
            raise ValueError(f"right must have left's dtype, {left.dtype}, got {right.dtype}")
    if base is not None:
        check_tokens(base, "base", None if right is None else right.shape[0], T)
        if base.dtype != x.dtype:
            raise ValueError(f"base must have x's dtype, {x.dtype}, got {base.dtype}")


def check_backward(
    g: Tensor, x: Tensor, coefficients: Tensor, left: Tensor, right: Tensor, base: Tensor | None
) -> None:
    """The shapes and dtypes of ``householder_backward``; ValueError names the argument."""
    check_tokens(x, "x")
    T, n = x.shape
    check_tokens(g, "g", n if base is None else None, T)
    if g.dtype != x.dtype:
        raise ValueError(f"g must have x's dtype, {x.dtype}, got {g.dtype}")
    _check_factor(left, "left", g.shape[1], None, x)
    r = left.shape[1]
    for name, factor, rows in (("coefficients", coefficients, T), ("right", right, n)):
        _check_factor(factor, name, rows, r, left)
        if factor.dtype != left.dtype:
            raise ValueError(f"{name} must have left's dtype, {left.dtype}, got {factor.dtype}")
    if base is not None:
        check_tokens(base, "base", n, T)
        if base.dtype != x.dtype:
            raise ValueError(f"base must have x's dtype, {x.dtype}, got {base.dtype}")


def check_gradient(x: Tensor, q: Tensor) -> None:
    """The shapes and dtypes of ``householder_gradient``; ValueError names the argument."""
    check_tokens(x, "x")
    _check_factor(q, "q", x.shape[0], None, x)


def _forward_fake(x, left, right, base=None, rounded=False):
    check_forward(x, left, right, base)
    out = x.new_empty(0) if right is None else x.new_empty(x.shape[0], right.shape[0])
    return out, left.new_empty(x.shape[0], left.shape[1])


def _backward_fake(g, x, coefficients, left, right, base, needs, rounded=False):
    check_backward(g, x, coefficients, left, right, base)
    (T, n), r, m = x.shape, left.shape[1], g.shape[1]
    sums = left.new_empty(n, r) if needs[1] else left.new_empty(0)
    more = left.new_empty(m, r) if needs[1] and base is not None else left.new_empty(0)
    return x.new_empty(T, n) if needs[0] else x.new_empty(0), left.new_empty(T, r), sums, more


def _gradient_fake(x, q):
    check_gradient(x, q)
    return q.new_empty(x.shape[1], q.shape[1])


def _implementation(op: str, factor: Tensor) -> tuple[bool, Callable[..., Any]]:
    """Whether the native kernels serve ``op`` for factors like ``factor`` [_, r], and the callable that does."""
    device = factor.device.type
    backend, run = _backends.implementation(op, device)
    if factor.shape[1] > GPU_RANKS and (device != "cpu" or backend == "triton"):
        return False, getattr(reference, op)
    return backend == "native", run


def _forward_kernel(x, left, right, base=None, rounded=False):
    native, run = _implementation(FORWARD, left)
    return run(x, left, right, base, rounded) if native else run(x, left, right, base)


def _backward_kernel(g, x, coefficients, left, right, base, needs, rounded=False):
    native, run = _implementation(BACKWARD, left)
    arguments = g, x, coefficients, left, right, base, needs
    return run(*arguments, rounded) if native else run(*arguments)


def _gradient_kernel(x, q):
    return _implementation(GRADIENT, q)[1](x, q)


_ops.register(
    FORWARD,
    "(Tensor x, Tensor left, Tensor? right, Tensor? base=None, bool rounded=False) -> (Tensor, Tensor)",
    kernel=_forward_kernel,
    fake=_forward_fake,
)
_ops.register(
    BACKWARD,
    "(Tensor g, Tensor x, Tensor coefficients, Tensor left, Tensor right, Tensor? base, bool[2] needs,"
    " bool rounded=False) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
_ops.register(GRADIENT, "(Tensor x, Tensor q) -> Tensor", kernel=_gradient_kernel, fake=_gradient_fake)

householder = torch.ops.frodkernels.householder.default
householder_backward = torch.ops.frodkernels.householder_backward.default
householder_gradient = torch.ops.frodkernels.householder_gradient.default
