# SPDX-License-Identifier: Apache-2.0
"""``frodkernels::reflections``, ``reflections_again`` and ``reflections_gradient``: what is r-sized in a chain.

With unit columns q = u / |u|, G = q^T q and the upper triangular S = striu(G) + diag(G) / 2 the chain of reflections is
``I - q S^-1 q^T``. dS gives dG = striu(dS) + diag(dS) / 2, and q gains q (dG + dG^T). Everything here is [n, r] or
[r, r]; on the CPU each op is one native call, elsewhere a few of torch's and of the householder ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frodkernels import _backends, _ops
from frodkernels.ops import householder
from frodkernels.reference import reflections as reference


def native_serves(like: Tensor) -> bool:
    """Whether native calls do what is r-sized for tensors like this: on the CPU, where the native products serve."""
    return like.device.type == "cpu" and _backends.select(householder.FORWARD, "cpu") == "native"


def _implementation(op: str, like: Tensor) -> Callable[..., Any]:
    return _ops.native(op) if native_serves(like) else getattr(reference, op)


def _reflections_fake(u, wide, transpose):
    (n, r), sums, kind = u.shape, reference.sums_dtype(u, wide), reference.kept_dtype(u, wide)
    sizes = ((n, r), sums), ((n, r), sums), ((r, r), kind), ((r,), kind)
    return tuple(u.new_empty(size, dtype=dtype) for size, dtype in sizes)


def _again_fake(u, inverse, norms, wide, transpose):
    sums = reference.sums_dtype(u, wide)
    return u.new_empty(u.shape, dtype=sums), u.new_empty(u.shape, dtype=sums)


def _gradient_fake(u, unit, norms, sums, a, b):
    return u.new_empty(u.shape)


_ops.register(
    "reflections",
    "(Tensor u, bool wide, bool transpose) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=lambda u, *rest: _implementation("reflections", u)(u, *rest),
    fake=_reflections_fake,
)
_ops.register(
    "reflections_again",
    "(Tensor u, Tensor inverse, Tensor norms, bool wide, bool transpose) -> (Tensor, Tensor)",
    kernel=lambda u, *rest: _implementation("reflections_again", u)(u, *rest),
    fake=_again_fake,
)
_ops.register(
    "reflections_gradient",
    "(Tensor u, Tensor unit, Tensor norms, Tensor sums, Tensor a, Tensor b) -> Tensor",
    kernel=lambda u, *rest: _implementation("reflections_gradient", u)(u, *rest),
    fake=_gradient_fake,
)

reflections = torch.ops.frodkernels.reflections.default
reflections_again = torch.ops.frodkernels.reflections_again.default
reflections_gradient = torch.ops.frodkernels.reflections_gradient.default
