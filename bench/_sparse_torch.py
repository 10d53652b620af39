# SPDX-License-Identifier: Apache-2.0
"""A sparse change of a weight in plain torch, as well as it can be written.

csr     the frozen layer's product, plus a ``torch.sparse`` CSR product; ``sampled_addmm`` for the gradient of the
        entries. 16-bit operands go through float32: torch has no 16-bit CSR product on the CPU.
weight  W + S formed for each call by ``index_put``, then one product. Its backward forms the dense gradient of W + S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bench import _plain_torch as square  # it also keeps torch from announcing that its CSR tensors are new
from bench._delta_case import DeltaCase

Layer = Callable[[Tensor, Tensor], Tensor]

FORMS = ("csr", "weight")


class Positions:
    """Fixed positions of an [m, n] matrix, given in row-major order: CSR of it and of its transpose."""

    def __init__(self, rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> None:
        m, n = self.shape = shape
        self.crow, self.col = self._compress(rows, m), cols.to(torch.int32)
        self.order = torch.argsort(cols * m + rows)
        self.ccol, self.row = self._compress(cols, n), rows[self.order].to(torch.int32)
        self.pattern_only = self.matrix(torch.zeros(rows.numel(), device=rows.device))

    @staticmethod
    def _compress(groups: Tensor, count: int) -> Tensor:
        pointers = torch.zeros(count + 1, dtype=torch.int32, device=groups.device)
        pointers[1:] = torch.bincount(groups, minlength=count).cumsum(0)
        return pointers

    def matrix(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(self.crow, self.col, values, self.shape, check_invariants=False)

    def transposed(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(
            self.ccol, self.row, values[self.order], self.shape[::-1], check_invariants=False
        )

    def sample(self, a: Tensor, b: Tensor) -> Tensor:
        """(a^T b) at the positions, float32, for a [T, m] and b [T, n]."""
        return torch.sparse.sampled_addmm(self.pattern_only, a.t().float(), b.float(), beta=0.0).values()


class _Csr(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, values: Tensor, bias: Any, plan: Positions) -> Tensor:
        ctx.save_for_backward(x, W, values)
        ctx.plan = plan
        change = plan.matrix(values.float()) @ x.t().float()
        return F.linear(x, W, bias).add_(change.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, values = ctx.saved_tensors
        dx = (g @ W).add_((ctx.plan.transposed(values.float()) @ g.t().float()).t())
        return dx, None, ctx.plan.sample(g, x).to(values.dtype), None, None


def linear(form: str, case: DeltaCase) -> Layer:
    """``f(x, values)`` in one of FORMS."""
    W, bias, index = case.weight, case.bias, (case.rows, case.cols)
    if form == "csr":
        plan = Positions(*index, (case.shape.m, case.shape.n))
        return lambda x, values: _Csr.apply(x, W, values, bias, plan)
    return lambda x, values: F.linear(x, W.index_put(index, values.to(W.dtype), accumulate=True), bias)


compiled = square.compiled
