# SPDX-License-Identifier: Apache-2.0
"""The operands of one benchmark of a sparse change of a weight, and the truth about them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import frodkernels as fk
from bench._truth import Answers, Truth
from bench.shapes import DeltaShape


@dataclass
class DeltaCase:
    """A frozen layer with a sparse change S and one batch for it: ``y = x (W + S)^T + bias``, and g = dL/dy.

    x, W, bias and g in ``dtype``; values [nnz] in their own, in row-major order, as PEFT has them. S carries as much of
    the result as W: an error in either shows.
    """

    shape: DeltaShape
    dtype: torch.dtype
    x: Tensor
    weight: Tensor
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
        return fk.SparsePattern(self.rows, self.cols, (self.shape.m, self.shape.n))

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


def positions(m: int, n: int, nnz: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct positions of an [m, n] matrix, in row-major order."""
    flat = torch.randperm(m * n, generator=generator)[:nnz].sort().values
    return flat // n, flat % n


def make_case(
    shape: DeltaShape, dtype: torch.dtype, device: torch.device, parameters: torch.dtype | None = None, seed: int = 0
) -> DeltaCase:
    """Repeatable, the same numbers on every device; values in ``parameters``, or in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * std).to(device)

    m, n, T = shape.m, shape.n, shape.T
    rows, cols = positions(m, n, shape.nnz, generator)
    return DeltaCase(
        shape=shape,
        dtype=dtype,
        x=normal(T, n).to(dtype),
        weight=normal(m, n, std=n**-0.5).to(dtype),
        values=normal(shape.nnz, std=(m / shape.nnz) ** 0.5).to(parameters or dtype),
        rows=rows.to(device),
        cols=cols.to(device),
        bias=normal(m).to(dtype) if shape.bias else None,
        g=normal(T, m).to(dtype),
    )


def changed(case: DeltaCase, dtype: torch.dtype) -> Tensor:
    """W + S [m, n], added in float32 (float64) and rounded once."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weight = case.weight.to(acc, copy=True)
    weight[case.rows, case.cols] += case.values.detach().to(acc)
    return weight.to(dtype)


def truth(case: DeltaCase, mode: str) -> Truth:
    """y, and for a step dx and dvalues. The yardstick goes through the dense weight, as PEFT does."""

    def answers(dtype: torch.dtype) -> Answers:
        kept = torch.float64 if dtype == torch.float64 else case.values.dtype
        x, g, weight = case.x.to(dtype), case.g.to(dtype), changed(case, dtype)
        out = {"y": F.linear(x, weight, None if case.bias is None else case.bias.to(dtype))}
        if mode == "step":
            out |= {"dx": g @ weight, "dvalues": (g.t() @ x)[case.rows, case.cols].to(kept)}
        return out

    return answers
