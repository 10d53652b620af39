# SPDX-License-Identifier: Apache-2.0
"""Which side of the weight HRA's reflections go to: a cost model of both, and precision where that is cheap."""

from __future__ import annotations

import torch
from torch import Tensor

SIDES = ("input", "output")
NOMINAL_TOKENS = 1024  # what a compiled graph, which must serve any T, is planned for

# With a 16-bit x and a wider u, only the output side gives u's gradient to u's own precision. It is taken for that
# unless the two more products with W weigh: T below this share of m, in a layer of more than so many multiply-adds.
PRECISE_SHARE = 4
PRECISE_WORK = 2**25

# Time of a multiply-add, relatively. On the output side the sums and the update share no pass over the tokens, and more
# is done in calls of their own: measured at 1.4 to 1.7 times the input side's (both CPU dtypes, 768 to 2048 features).
PACE = {"input": 1.0, "output": 1.6}


def costs(T: int, m: int, n: int, r: int, needs_x: bool, needs_u: bool) -> dict[str, int]:
    """Multiply-adds of the tall-skinny products of each side, forward and backward.

    Input: x left, C q^T; backward g' left and, for x, Q q^T; for u two sums over the tokens.
    Output: likewise, with m features where tokens meet the layer's output; W q, and W^T dB for u.
    """
    into, out = 2 * T * n * r, T * (n + m) * r + m * n * r
    if needs_x or needs_u:
        into += T * n * r
        out += T * m * r
    if needs_x:
        into += T * n * r
        out += T * n * r
    if needs_u:
        into += 2 * T * n * r
        out += T * (n + m) * r + m * n * r
    return {"input": into, "output": out}


def estimates(T: int, m: int, n: int, r: int, needs_x: bool, needs_u: bool) -> dict[str, float]:
    """Relative times of the two sides."""
    return {side: PACE[side] * cost for side, cost in costs(T, m, n, r, needs_x, needs_u).items()}


def choose(x: Tensor, m: int, u: Tensor) -> str:
    """The side for x [T, n] and u [n, r]: the cheaper, or for 16-bit x the one that is as precise as u."""
    n, r = u.shape
    T = NOMINAL_TOKENS if torch.compiler.is_compiling() else x.shape[0]
    grad = torch.is_grad_enabled()
    needs_x, needs_u = grad and x.requires_grad, grad and u.requires_grad
    if needs_u and x.element_size() == 2 and u.element_size() > 2:
        if PRECISE_SHARE * T >= m or m * n * r <= PRECISE_WORK:
            return "output"
    times = estimates(T, m, n, r, needs_x, needs_u)
    return "input" if times["input"] <= times["output"] else "output"
