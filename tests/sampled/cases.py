# SPDX-License-Identifier: Apache-2.0
"""Products to sample and matrices to scatter into, with exact answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import frodkernels as fk
from tests.support import LAYOUTS, coo

# features' dtype, the result's: what the ops are asked for by functions (the same) and by layers (the parameters')
SAMPLED_DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.float64),
    (torch.float64, torch.float32),
]


@dataclass
class Sampling:
    """(a b^T) at a pattern's positions, for features a [m, T] and b [n, T]."""

    a: Tensor
    b: Tensor
    rows: Tensor
    cols: Tensor
    pattern: fk.SparsePattern
    dtype: torch.dtype

    @property
    def by_columns(self) -> tuple:
        return self.a, self.b, *self.pattern.csc, self.dtype

    @property
    def by_rows(self) -> tuple:
        return self.b, self.a, *self.pattern.csr, self.dtype

    def exact(self) -> Tensor:
        """In float64; summed wider where that is what is tested."""
        wide = np.longdouble if torch.float64 in (self.a.dtype, self.dtype) else np.float64
        a, b = (x.double().numpy().astype(wide) for x in (self.a[self.rows], self.b[self.cols]))
        return torch.from_numpy((a * b).sum(1).astype(np.float64))

    def laid_out(self, first: str, second: str | None = None) -> Sampling:
        a, b = LAYOUTS[first](self.a), LAYOUTS[second or first](self.b)
        return Sampling(a, b, self.rows, self.cols, self.pattern, self.dtype)


def make_sampling(
    m: int,
    n: int,
    T: int,
    kind: str = "random",
    features: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Sampling:
    g = torch.Generator().manual_seed(seed)
    rows, cols = coo(kind, m, n, seed)
    a, b = (torch.randn(k, T, generator=g, dtype=torch.float64).to(features) for k in (m, n))
    return Sampling(a, b, rows, cols, fk.SparsePattern(rows, cols, (m, n)), dtype)
