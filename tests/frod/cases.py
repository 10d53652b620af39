# SPDX-License-Identifier: Apache-2.0
"""FRoD layers with random factors, and their exact outputs and gradients by a dense formula."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import frodkernels as fk
from tests.support import coo

PATHS = ("activation", "fold", "materialize")


@dataclass
class Layer:
    x: Tensor
    U: Tensor
    V: Tensor
    lam: Tensor
    values: Tensor
    bias: Tensor | None
    rows: Tensor
    cols: Tensor
    pattern: fk.SparsePattern

    def __call__(self, x: Tensor | None = None, **options) -> Tensor:
        x = self.x if x is None else x
        return fk.frod_linear(x, self.U, self.V, self.lam, self.values, self.pattern, self.bias, **options)

    def weight(self) -> Tensor:
        """U (S + diag lam) V^T in float64, differentiable."""
        S = torch.zeros(self.pattern.shape, dtype=torch.float64)
        middle = S.index_put((self.rows, self.cols), self.values.double()) + torch.diag(self.lam.double())
        return self.U.double() @ middle @ self.V.double().t()

    def exact(self, x: Tensor | None = None) -> Tensor:
        y = (self.x if x is None else x).double() @ self.weight().t()
        return y if self.bias is None else y + self.bias.double()

    def leaves(self, *wanted: str) -> list[Tensor]:
        """Detached, gradient-requiring tensors put in place of the named ones (all trainable ones unless named)."""
        wanted = wanted or tuple(name for name in ("x", "lam", "values", "bias") if getattr(self, name) is not None)
        for name in wanted:
            setattr(self, name, getattr(self, name).detach().requires_grad_())
        return [getattr(self, name) for name in wanted]

    def doubled(self) -> Layer:
        """The same numbers in float64, to differentiate exactly."""
        names = ("x", "U", "V", "lam", "values", "bias")
        return replace(self, **{k: t.detach().double() for k in names if (t := getattr(self, k)) is not None})


def make_layer(
    m: int,
    n: int,
    *lead: int,
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = None,
    kind: str = "random",
    bias: bool = True,
    seed: int = 0,
) -> Layer:
    """x [*lead, n]; U and V in x's dtype and scaled so that outputs are of order one."""
    g = torch.Generator().manual_seed(seed)
    param_dtype = param_dtype or dtype
    rows, cols = coo(kind, n, n, seed)

    def draw(*size, scale=1.0):
        return torch.randn(*size, generator=g, dtype=torch.float64) * scale

    width = max(n, 1) ** -0.5
    return Layer(
        x=draw(*lead, n).to(dtype),
        U=draw(m, n, scale=width).to(dtype),
        V=draw(n, n, scale=width).to(dtype),
        lam=draw(n).to(param_dtype),
        values=draw(rows.numel(), scale=0.3).to(param_dtype),
        bias=draw(m).to(dtype) if bias else None,
        rows=rows,
        cols=cols,
        pattern=fk.SparsePattern(rows, cols, (n, n)),
    )
