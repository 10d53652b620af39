# SPDX-License-Identifier: Apache-2.0
"""What is r-sized in a chain of Householder reflections, in plain PyTorch; ``ops/reflections.py`` has the formulas.

Products of [n, r] matrices come from the householder ops: in float32 or float64, whatever precision
``torch.set_float32_matmul_precision`` allows to matrix products, for they decide how orthogonal the chain is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frodkernels.ops import householder as ops


def product(rows: Tensor, square: Tensor) -> Tensor:
    """rows [n, k] times square [k, r]."""
    return ops.householder(rows, square, None)[1]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: a, b [n, r]."""
    return ops.householder_gradient(a, b)


def sums_dtype(u: Tensor, wide: bool) -> torch.dtype:
    """float64 where u or, ``wide``, what it is applied to is; float32 otherwise."""
    return torch.float64 if wide or u.dtype == torch.float64 else torch.float32


def kept_dtype(u: Tensor, wide: bool) -> torch.dtype:
    """Of inverse and norms: float64 for float32 u too, since an error in them is an error of every token."""
    return torch.float64 if u.dtype == torch.float32 else sums_dtype(u, wide)


def unit_columns(u: Tensor, norms: Tensor) -> Tensor:
    """u [n, r] over its columns' lengths, in the lengths' dtype."""
    return (u.double() / norms).to(norms.dtype)


def reflections(u: Tensor, wide: bool, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(unit, left, inverse, norms): u / |u|, unit S^-1 (S^-T with ``transpose``), S^-1 and |u|.

    Factors of float32 directions come from float64: an error in them is an error of every token. inverse and norms stay
    in it.
    """
    sums = sums_dtype(u, wide)
    kind = kept_dtype(u, wide)
    norms = torch.linalg.vector_norm(u, dim=0, dtype=torch.float64).to(kind)
    unit = unit_columns(u, norms)
    half = torch.triu(inner(unit, unit))
    half.diagonal().mul_(0.5)
    eye = torch.eye(half.shape[0], dtype=kind, device=u.device)
    inverse = torch.linalg.solve_triangular(half, eye, upper=True)
    left = product(unit, inverse.t() if transpose else inverse)
    return unit.to(sums), left.to(sums), inverse.contiguous(), norms


def reflections_again(u: Tensor, inverse: Tensor, norms: Tensor, wide: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    """(unit, left) from what was kept."""
    sums = sums_dtype(u, wide)
    unit = unit_columns(u, norms)
    return unit.to(sums), product(unit, inverse.t() if transpose else inverse).to(sums)


def reflections_gradient(u: Tensor, unit: Tensor, norms: Tensor, sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """du = (unit (dG + dG^T) - sums) / |u| with dS = a^T b, in u's dtype."""
    dgram = torch.triu(inner(a, b))
    dgram.diagonal().mul_(0.5)
    return ((product(unit, dgram + dgram.t()) - sums) / norms).to(u.dtype)
