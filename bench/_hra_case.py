# SPDX-License-Identifier: Apache-2.0
"""The operands of one HRA benchmark, and the truth about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._truth import Answers, Truth
from bench.shapes import ConvShape, RankShape


@dataclass
class HRACase:
    """A frozen layer with reflections and one batch for it: ``y = x (W H_1 ... H_r)^T + bias``, and g = dL/dy.

    x [T, n], W, bias and g in ``dtype``; u [n, r] in its own. A convolution has x [1, C, size, size], W as the matrix
    [m, C kernel^2] all the same, and g like its output. u is drawn at random: nothing cancels.
    """

    shape: RankShape
    dtype: torch.dtype
    x: Tensor
    weight: Tensor
    u: Tensor
    bias: Tensor | None
    g: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the layer's own weight."""
        s = self.shape
        if isinstance(s, ConvShape):
            return (s.m, s.channels, s.kernel, s.kernel)
        return (s.m, s.n)

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another input, or another weight as a matrix [m, n]."""
        if isinstance(self.shape, ConvShape):
            return F.conv2d(x, weight.view(self.weight_shape), bias, padding=self.shape.kernel // 2)
        return F.linear(x, weight, bias)


def make_case(
    shape: RankShape, dtype: torch.dtype, device: torch.device, parameters: torch.dtype | None = None, seed: int = 0
) -> HRACase:
    """Repeatable, the same numbers on every device; u in ``parameters``, or in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * std).to(device)

    m, n, T = shape.m, shape.n, shape.T
    inputs, outputs = (T, n), (T, m)
    if isinstance(shape, ConvShape):
        inputs, outputs = ((1, features, shape.size, shape.size) for features in (shape.channels, m))
    return HRACase(
        shape=shape,
        dtype=dtype,
        x=normal(*inputs).to(dtype),
        weight=normal(m, n, std=n**-0.5).to(dtype),
        u=normal(n, shape.rank).to(parameters or dtype),
        bias=normal(m).to(dtype) if shape.bias else None,
        g=normal(*outputs).to(dtype),
    )


def compact(W: Tensor, u: Tensor) -> Tensor:
    """W H_1 ... H_r = W - (W q S^-1) q^T."""
    q = u / torch.linalg.vector_norm(u, dim=0)
    S = torch.triu(q.t() @ q, 1) + 0.5 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    return W - torch.linalg.solve_triangular(S, W @ q, upper=True, left=False) @ q.t()


def dense(u: Tensor) -> Tensor:
    """H_1 ... H_r [n, n], one reflection after the other, as the definition says and PEFT does it."""
    q = u / torch.linalg.vector_norm(u, dim=0)
    H = torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
    for i in range(u.shape[1]):
        column = q[:, i : i + 1]
        H = H - 2 * (H @ column) @ column.t()
    return H


def truth(case: HRACase, mode: str) -> Truth:
    """y, and for a step dx and du.

    The yardstick is the dense chain: H in u's dtype, and from W H on everything in x's. In float64, where they are the
    same (tests/bench), the compact form takes its place: it takes no r updates of a matrix.
    """

    def answers(dtype: torch.dtype) -> Answers:
        exact, step = dtype == torch.float64, mode == "step"
        x, W, g = (t.to(dtype) for t in (case.x, case.weight, case.g))
        u = case.u.detach().to(dtype if exact else case.u.dtype, copy=True)
        bias = None if case.bias is None else case.bias.to(dtype)
        with torch.set_grad_enabled(step):
            x, u = x.detach().requires_grad_(step), u.requires_grad_(step)
            rotated = compact(W, u) if exact else (W.to(u.dtype) @ dense(u)).to(dtype)
            y = case.layer(x, rotated, bias)
        if not step:
            return {"y": y}
        return {"y": y.detach(), **dict(zip(("dx", "du"), torch.autograd.grad(y, (x, u), g), strict=True))}

    return answers
