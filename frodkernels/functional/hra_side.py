# SPDX-License-Identifier: Apache-2.0
"""Which side of the weight HRA's reflections go to: a cost model of both."""

from __future__ import annotations

import torch
from torch import Tensor

SIDES = ("input", "output")
NOMINAL_TOKENS = 1024  # what a compiled graph, which must serve any T, is planned for


def costs(T: int, m: int, n: int, r: int, needs_x: bool, needs_u: bool) -> dict[str, float]:
    """Multiply-adds of the tall-skinny products of each side, forward and backward.

    Input: x left, C q^T; backward g' left, Q q^T (dx) and two sums (u).  Output: the same with m features where tokens
    meet the layer's output, and W q and W^T dB, which do not depend on T.
    """
    into = 2 * T * n * r
    out = T * (n + m) * r + m * n * r
    if needs_x or needs_u:
        into += T * n * r
        out += T * m * r
    if needs_x or needs_u:  # reflecting x means that the gradient of what is reflected is needed for u as well
        into += T * n * r if needs_x else 0
        out += T * n * r if needs_x else 0
    if needs_u:
        into += 2 * T * n * r
        out += T * (n + m) * r + m * n * r
    return {"input": float(into), "output": float(out)}


def choose(x: Tensor, m: int, u: Tensor) -> str:
    """The cheaper side for x [T, n] and u [n, r]."""
    n, r = u.shape
    T = NOMINAL_TOKENS if torch.compiler.is_compiling() else x.shape[0]
    grad = torch.is_grad_enabled()
    cost = costs(T, m, n, r, grad and x.requires_grad, grad and u.requires_grad)
    return min(SIDES, key=cost.__getitem__)
