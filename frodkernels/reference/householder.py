# SPDX-License-Identifier: Apache-2.0
"""What HRA means, in plain PyTorch: chained Householder reflections, and the tall-skinny products that compute them.

``reflect`` is the definition: one reflection after another, differentiable any number of times. The three functions
below it are what the kernels do: token-major matrices [T, features], sums in float32 (float64 when an operand is).
"""

from __future__ import annotations

import torch
from torch import Tensor

from frodkernels.reference.sparse_core import accumulator


def gram_schmidt(u: Tensor) -> Tensor:
    """Orthonormal columns that span u [n, r] column by column, by modified Gram-Schmidt."""
    basis: list[Tensor] = []
    for column in u.unbind(1):
        for q in basis:
            column = column - q * (q @ column)
        basis.append(column / torch.linalg.vector_norm(column))
    return torch.stack(basis, 1)


def reflect(x: Tensor, u: Tensor, transpose: bool = False, orthogonalize: bool = False) -> Tensor:
    """x H_1 ... H_r, or x H_r ... H_1 (``transpose``), with H_i = I - 2 u_i u_i^T / |u_i|^2.

    ``x`` [..., n], ``u`` [n, r]; ``orthogonalize`` replaces u by its Gram-Schmidt basis first. A zero column of u is no
    reflection: the result is NaN. Source: HRA, https://arxiv.org/abs/2405.17484.
    """
    if orthogonalize:
        u = gram_schmidt(u)
    columns = u.unbind(1)
    for column in reversed(columns) if transpose else columns:
        unit = column / torch.linalg.vector_norm(column)
        x = x - 2 * (x @ unit).unsqueeze(-1) * unit
    return x


def householder(x: Tensor, left: Tensor, right: Tensor | None, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """coefficients = x left;  out = base - coefficients right^T.

    ``x`` [T, n], ``left`` [n, r], ``right`` [m, r], ``base`` [T, m] (x where None) -> (out [T, m] in x's dtype, rounded
    once; coefficients [T, r] in the accumulator's dtype). Without ``right``, ``out`` is empty.
    """
    acc = accumulator(x, left)
    coefficients = x.to(acc) @ left.to(acc)
    if right is None:
        return x.new_empty(0), coefficients
    start = (x if base is None else base).to(acc)
    return (start - coefficients @ right.to(acc).t()).to(x.dtype).contiguous(), coefficients


def householder_backward(
    g: Tensor, x: Tensor, coefficients: Tensor, left: Tensor, right: Tensor, base: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q = g left;  dx = base - q right^T;  sum_x = x^T q,  sum_g = g^T coefficients, added up where ``base`` is None.

    ``g`` [T, m], ``x`` [T, n], ``coefficients`` [T, r], ``left`` [m, r], ``right`` [n, r], ``base`` [T, n] (g where
    None) -> (dx [T, n] in x's dtype, q [T, r], sum_x [n, r], sum_g [m, r] or empty). ``needs``: dx, the sums.
    """
    dx, q = householder(g, left, right if needs[0] else None, base)
    if not needs[1]:
        return dx, q, q.new_empty(0), q.new_empty(0)
    sum_x, sum_g = householder_gradient(x, q), householder_gradient(g, coefficients)
    return (dx, q, sum_x + sum_g, q.new_empty(0)) if base is None else (dx, q, sum_x, sum_g)


def householder_gradient(x: Tensor, q: Tensor) -> Tensor:
    """x^T q: ``x`` [T, n], ``q`` [T, r] -> [n, r] in q's dtype."""
    return x.to(q.dtype).t() @ q
