# SPDX-License-Identifier: Apache-2.0
"""Chained Householder reflections in compact form: the factors that the products with tokens need.

With unit columns q_i = u_i / |u_i|, G = q^T q and the upper triangular S = striu(G) + diag(G) / 2:
``H_1 ... H_r = I - q S^-1 q^T`` exactly (the WY form; S + S^T = G is what makes it orthogonal). So x H is two
tall-skinny products, ``x - (x q S^-1) q^T``, and S^-1, small and well conditioned whatever u, is formed once per call.
With ``orthogonalize`` q is the Gram-Schmidt basis of u and S = I / 2.

Derivatives, for Q and C [T, r] as in the functions that use this: dS = Q^T C, dG = striu(dS) + diag(dS) / 2, and q
gains q (dG + dG^T). H does not change with the length of a column, so dq is orthogonal to q column by column and
du = dq / |u|. Source: HRA, https://arxiv.org/abs/2405.17484; C. Bischof and C. Van Loan, The WY representation, 1987.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from frodkernels.functional._common import check_tensor
from frodkernels.ops import householder
from frodkernels.ops import reflect as chains
from frodkernels.ops import reflections as ops
from frodkernels.reference.reflections import inner, product
from frodkernels.reference.sparse_core import accumulator


class Reflections:
    """The factors of one chain in the accumulator's dtype.

    unit     q [n, r]
    left     q S^-1, or q S^-T for the transposed chain [n, r]
    matrix   S^-1 [r, r]; with orthogonalize: R of the unit columns' QR decomposition
    norms    |u_i| [r]; both of them in float64 for float32 u
    """

    def __init__(self, unit: Tensor, left: Tensor, matrix: Tensor, norms: Tensor, orthogonalize: bool = False) -> None:
        self.unit, self.left, self.matrix, self.norms = unit, left, matrix, norms
        self.orthogonalize = orthogonalize

    @classmethod
    def of(cls, u: Tensor, x: Tensor, transpose: bool, orthogonalize: bool) -> Reflections:
        """For u [n, r], to be applied to x."""
        if not orthogonalize:
            return cls(*ops.reflections(u, x.dtype == torch.float64, transpose))
        acc = accumulator(x, u)
        wide = u.to(torch.float64)
        norms = torch.linalg.vector_norm(wide, dim=0)
        basis, R = torch.linalg.qr(wide / norms)  # of a zero column NaN, as it has no direction
        unit = basis.to(acc)
        return cls(unit, 2 * unit, R.to(acc), norms.to(acc), True)

    @classmethod
    def again(cls, u: Tensor, x: Tensor, kept: Sequence[Tensor], transpose: bool) -> Reflections:
        """From what ``saved`` kept, to be applied to x or its like."""
        unit, matrix, norms = kept
        if unit is not None:
            return cls(unit, 2 * unit, matrix, norms, True)
        return cls(*ops.reflections_again(u, matrix, norms, x.dtype == torch.float64, transpose), matrix, norms)

    def saved(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """(unit, matrix, norms) for the backward; unit is cheaper to form again than to keep where it is u / |u|."""
        return self.unit if self.orthogonalize else None, self.matrix, self.norms

    def solved(self, rows: Tensor, transpose: bool) -> Tensor:
        """rows S^-1, or rows S^-T; rows [_, r]."""
        if self.orthogonalize:
            return 2 * rows
        matrix = self.matrix.to(rows.dtype)
        return product(rows, matrix.t() if transpose else matrix)

    def gradient(self, u: Tensor, sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """du from -dunit, what the products with unit gave, and dS = a^T b."""
        if not self.orthogonalize:
            return ops.reflections_gradient(u, self.unit, self.norms, sums, a, b)
        # the map depends on the span alone, and S is constant
        inside = product(self.unit, inner(self.unit, sums)) - sums
        dunit = torch.linalg.solve_triangular(self.matrix.t(), inside, upper=False, left=False)
        return (dunit / self.norms).to(u.dtype)


def reflect(x: Tensor, u: Tensor, transpose: bool, orthogonalize: bool) -> tuple[Tensor, list[Tensor]]:
    """x H_1 ... H_r, or in reverse order, and what its backward needs besides x and u: C [T, r] first."""
    if not orthogonalize:
        out, *kept = chains.reflect(x, u, transpose)
        return out, kept
    chain = Reflections.of(u, x, transpose, True)
    out, c = householder.householder(x, chain.left, chain.unit, None, chains.rounds(x, u))
    return out, [c, chain.matrix, chain.norms, chain.unit]


def reflect_backward(
    g: Tensor,
    x: Tensor | None,
    u: Tensor,
    kept: Sequence[Tensor | None],
    transpose: bool,
    needs: list[bool],
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """(dx, du) from the gradient g of ``reflect``'s result; g's memory may become dx's with ``overwrite``.

    x and C may be None where only dx is needed.
    """
    x = g if x is None else x
    c, matrix, norms, *unit = [g if t is None else t for t in kept]
    if not unit:
        return chains.reflect_backward(g, x, u, (c, matrix, norms), transpose, needs, overwrite)
    chain = Reflections(unit[0], 2 * unit[0], matrix, norms, True)
    if not needs[1]:
        return householder.householder(g, chain.left, chain.unit, None, chains.rounds(g, u))[0], u.new_empty(0)
    factors = chain.left, chain.unit, None
    dx, q, sums, _ = householder.householder_backward(g, x, c, *factors, needs, chains.rounds(g, u))
    return dx, chain.gradient(u, sums, *((q, c) if transpose else (c, q)))


def check_reflections(u: Tensor, n: int, orthogonalize: bool, name: str = "u") -> None:
    """``u`` must be [n, r] with r >= 1; ValueError names it."""
    check_tensor(u, name)
    if u.dim() != 2 or u.shape[0] != n or u.shape[1] < 1:
        raise ValueError(f"{name} must be [{n}, r] with r >= 1, got {list(u.shape)}")
    if orthogonalize and u.shape[1] > n:
        raise ValueError(f"{name} has {u.shape[1]} columns of {n} entries: orthogonalize needs r <= n")


def dependent_columns(u: Tensor) -> int:
    """How many columns of u [n, r] lie in the span of those before them, to u's precision. Synchronises."""
    wide = u.detach().to(torch.float64)
    unit = wide / torch.linalg.vector_norm(wide, dim=0)
    if u.numel() == 0 or not torch.isfinite(unit).all():
        return 0
    remainder = torch.linalg.qr(unit, mode="r").R.diagonal().abs()
    precision = torch.finfo(torch.float64 if u.dtype == torch.float64 else torch.float32).eps
    return int((remainder < 64 * precision).sum())


def deficiency(count: int, r: int) -> str:
    """What is wrong with orthogonalising u, in a sentence."""
    return (
        f"u is rank-deficient: {count} of its {r} columns depend on those before them (as PEFT's default symmetric "
        "initialisation makes every second one). Gram-Schmidt then turns rounding errors into directions, and the map "
        "is arbitrary in them; initialise u at random for orthogonalize (apply_GS)"
    )


def warn_if_deficient(u: Tensor) -> None:
    """Warn a public function's caller of an u that Gram-Schmidt cannot handle.

    Only in eager CPU calls, where asking costs no synchronisation.
    """
    if torch.compiler.is_compiling() or u.device.type != "cpu" or isinstance(u, FakeTensor):
        return
    count = dependent_columns(u)
    if count:
        warnings.warn(deficiency(count, u.shape[1]), UserWarning, stacklevel=3)
