# SPDX-License-Identifier: Apache-2.0
"""The operands of one benchmark: made once per group, the same for every contestant."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import frodkernels as fk
from bench.shapes import Shape


@dataclass
class Case:
    """A FRoD layer and one batch for it. x, U, V, bias and g in ``dtype``; lam and values in float32, as PEFT trains.

    The map is ``y = x V (S + diag lam)^T U^T + bias``, and g = dL/dy. Entries are scaled so that no factor grows or
    shrinks its input and the nonzeros of S carry as much of the result as the diagonal: an error in either shows.
    """

    shape: Shape
    dtype: torch.dtype
    x: Tensor
    U: Tensor
    V: Tensor
    lam: Tensor
    values: Tensor
    rows: Tensor
    cols: Tensor
    bias: Tensor | None
    g: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device

    @functools.cached_property
    def pattern(self) -> fk.SparsePattern:
        n = self.shape.n
        return fk.SparsePattern(self.rows, self.cols, (n, n))

    @functools.cached_property
    def z(self) -> Tensor:
        """x V, feature-major [n, T]: what the sparse core meets in a layer."""
        return (self.x @ self.V).t().contiguous()

    @functools.cached_property
    def u(self) -> Tensor:
        """g U, feature-major [n, T]: the gradient that the core's backward meets."""
        return (self.g @ self.U).t().contiguous()

    @functools.cached_property
    def weight(self) -> Tensor:
        """A base weight that belongs to these factors: what the untrained adapter, S = 0, stands for."""
        return (self.U.float() * self.lam) @ self.V.float().t()


def sample_pattern(n: int, nnz: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct off-diagonal positions in random order, without listing all n^2 of them."""
    nnz = min(nnz, n * (n - 1))
    flat = torch.empty(0, dtype=torch.int64)
    while flat.numel() < nnz:
        more = torch.randint(n * n, (2 * nnz + 16,), generator=generator)
        flat = torch.unique(torch.cat([flat, more[more // n != more % n]]))
    flat = flat[torch.randperm(flat.numel(), generator=generator)[:nnz]]
    return flat // n, flat % n


def make_case(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    """Nonzero everywhere, repeatable, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    m, n, T = shape.m, shape.n, shape.T
    rows, cols = sample_pattern(n, shape.nnz, generator)
    factors = (
        normal(T, n),
        normal(m, n, std=m**-0.5),
        normal(n, n, std=n**-0.5),
        1 + normal(n, std=0.1),
        normal(rows.numel(), std=(n / rows.numel()) ** 0.5),
    )
    x, U, V, lam, values = (t.to(device) for t in factors)
    bias = normal(m).to(device, dtype) if shape.bias else None
    return Case(
        shape=shape,
        dtype=dtype,
        x=x.to(dtype),
        U=U.to(dtype),
        V=V.to(dtype),
        lam=lam,
        values=values,
        rows=rows.to(device),
        cols=cols.to(device),
        bias=bias,
        g=normal(T, m).to(device, dtype),
    )
