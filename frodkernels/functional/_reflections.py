# SPDX-License-Identifier: Apache-2.0
"""Chained Householder reflections in compact form: what is r-sized, in plain torch.

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

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from frodkernels.functional._common import check_tensor
from frodkernels.ops import householder as ops
from frodkernels.reference.householder import accumulator

# These products decide how orthogonal the chain is, so they are the kernels', in float32 or float64 whatever precision
# torch.set_float32_matmul_precision allows to matrix products.


def _product(rows: Tensor, square: Tensor) -> Tensor:
    """rows [n, r] times square [r, r]."""
    return ops.householder(rows, square, None)[1]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: a, b [n, r]."""
    return ops.householder_gradient(a, b)


class Reflections:
    """The factors of one chain in the accumulator's dtype.

    unit     q [n, r]
    matrix   S^-1 [r, r]; with orthogonalize: R of the unit columns' QR decomposition
    norms    |u_i| [r]
    """

    def __init__(self, unit: Tensor, matrix: Tensor, norms: Tensor, orthogonalize: bool) -> None:
        self.unit, self.matrix, self.norms, self.orthogonalize = unit, matrix, norms, orthogonalize

    @classmethod
    def of(cls, u: Tensor, x: Tensor, orthogonalize: bool) -> Reflections:
        """For u [n, r], to be applied to x."""
        u = u.to(accumulator(x, u))
        norms = torch.linalg.vector_norm(u, dim=0)
        unit = u / norms
        if orthogonalize:
            basis, R = torch.linalg.qr(unit)
            # a zero column has no direction: NaN, where QR would make one up
            return cls(basis + (norms - norms) / norms, R, norms, True)
        half = torch.triu(_inner(unit, unit))
        half.diagonal().mul_(0.5)
        eye = torch.eye(half.shape[0], dtype=half.dtype, device=half.device)
        return cls(unit, torch.linalg.solve_triangular(half, eye, upper=True), norms, False)

    @classmethod
    def again(cls, u: Tensor, unit: Tensor | None, matrix: Tensor, norms: Tensor) -> Reflections:
        """From what ``saved`` kept."""
        return cls(u.to(matrix.dtype) / norms if unit is None else unit, matrix, norms, unit is not None)

    def saved(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """(unit, matrix, norms) for the backward; unit is cheaper to form again than to keep where it is u / |u|."""
        return self.unit if self.orthogonalize else None, self.matrix, self.norms

    def solved(self, rows: Tensor, transpose: bool) -> Tensor:
        """rows S^-1, or rows S^-T; rows [_, r]."""
        if self.orthogonalize:
            return 2 * rows
        return _product(rows, self.matrix.t() if transpose else self.matrix)

    def gradient(self, u: Tensor, dunit: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """du from dunit, what the products with unit gave, and dS = a^T b."""
        if self.orthogonalize:  # the map depends on the span alone, and S is constant
            inside = dunit - _product(self.unit, _inner(self.unit, dunit))
            dunit = torch.linalg.solve_triangular(self.matrix.t(), inside, upper=False, left=False)
        else:
            dgram = torch.triu(_inner(a, b))
            dgram.diagonal().mul_(0.5)
            dunit = dunit + _product(self.unit, dgram + dgram.t())
        return (dunit / self.norms).to(u.dtype)


def rounds(x: Tensor, u: Tensor) -> bool:
    """Whether u has x's own 16 bits: then products may round the factors to these, as plain PyTorch would."""
    return x.dtype == u.dtype and x.element_size() == 2


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
