# SPDX-License-Identifier: Apache-2.0
"""Chains of reflections and HRA layers with random numbers: exact answers in float64, plain torch's in their dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import frodkernels as fk
from frodkernels.reference import householder as reference
from tests.support import assert_no_worse_than_torch

SIDES = ("input", "output")
F64 = torch.float64


def compact(x: Tensor, u: Tensor, transpose: bool = False, orthogonalize: bool = False) -> Tensor:
    """x H as one would write it in torch: x - ((x q) S^-1) q^T in the common dtype of x and u, rounded to x's.

    What torch has no 16-bit version of, the triangular solve, is float32.
    """
    common = torch.promote_types(x.dtype, u.dtype)
    wide, u = x.to(common), u.to(common)
    if orthogonalize:
        q = reference.gram_schmidt(u)
        return (wide - 2 * (wide @ q) @ q.t()).to(x.dtype)
    q = u / torch.linalg.vector_norm(u, dim=0)
    solver = torch.promote_types(common, torch.float32)
    G = (q.t() @ q).to(solver)
    S = torch.triu(G, 1) + torch.diag(G.diagonal() / 2)
    S = S.t() if transpose else S
    c = torch.linalg.solve_triangular(S, (wide @ q).to(solver), upper=not transpose, left=False)
    return (wide - c.to(common) @ q.t()).to(x.dtype)


@dataclass
class _Tensors:
    def leaves(self, *wanted: str) -> list[Tensor]:
        """Detached, gradient-requiring tensors put in place of the named ones (of all of them unless named)."""
        wanted = wanted or tuple(self.tensors())
        for name in wanted:
            setattr(self, name, getattr(self, name).detach().requires_grad_())
        return [getattr(self, name) for name in wanted]

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}

    def to(self, *where: Any) -> Any:
        """The same numbers, detached, on another device or in another dtype."""
        return replace(self, **{name: t.detach().to(*where) for name, t in self.tensors().items()})


@dataclass
class Chain(_Tensors):
    """x H_1 ... H_r."""

    x: Tensor  # [..., n]
    u: Tensor  # [n, r]

    def __call__(self, **options: Any) -> Tensor:
        return fk.householder(self.x, self.u, **options)

    def exact(self, transpose: bool = False, orthogonalize: bool = False) -> Tensor:
        return reference.reflect(self.x.double(), self.u.double(), transpose, orthogonalize)

    def plain(self, transpose: bool = False, orthogonalize: bool = False) -> Tensor:
        return compact(self.x, self.u, transpose, orthogonalize)


@dataclass
class Layer(_Tensors):
    """x (W H_1 ... H_r)^T + bias."""

    x: Tensor  # [..., n]
    u: Tensor  # [n, r]
    weight: Tensor  # [m, n]
    bias: Tensor | None

    def __call__(self, **options: Any) -> Tensor:
        return fk.hra_linear(self.x, self.weight, self.u, self.bias, **options)

    def exact(self, orthogonalize: bool = False) -> Tensor:
        """From the adapted weight, as the layer is defined; no reflection of x."""
        weight = reference.reflect(self.weight.double(), self.u.double(), orthogonalize=orthogonalize)
        return F.linear(self.x.double(), weight, None if self.bias is None else self.bias.double())

    def plain(self, orthogonalize: bool = False) -> Tensor:
        """The compact form before the layer."""
        bias = None if self.bias is None else self.bias.to(self.x.dtype)
        return F.linear(compact(self.x, self.u, True, orthogonalize), self.weight.to(self.x.dtype), bias)


@dataclass
class Conv(_Tensors):
    """conv2d(x, W H_1 ... H_r) + bias; ``options`` are stride, padding and dilation."""

    x: Tensor  # [N, C, height, width]
    u: Tensor  # [C kh kw, r]
    weight: Tensor  # [m, C, kh, kw]
    bias: Tensor | None
    options: dict[str, Any]

    def __call__(self, **options: Any) -> Tensor:
        return fk.hra_conv2d(self.x, self.weight, self.u, self.bias, **self.options, **options)

    def _rotated(self, rotate: Callable[..., Tensor], x: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
        weight = rotate(self.weight.to(dtype).flatten(1), self.u, **options).view_as(self.weight)
        return F.conv2d(x.to(dtype), weight, None if self.bias is None else self.bias.to(dtype), **self.options)

    def exact(self, orthogonalize: bool = False) -> Tensor:
        wide = self if self.u.dtype == F64 else replace(self, u=self.u.double())
        return wide._rotated(reference.reflect, self.x, F64, orthogonalize=orthogonalize)

    def plain(self, orthogonalize: bool = False) -> Tensor:
        """The adapted weight by the compact form, and one convolution with it."""
        return self._rotated(compact, self.x, self.x.dtype, orthogonalize=orthogonalize)


def _draw(seed: int) -> Callable[..., Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=g, dtype=F64)


def make_chain(
    n: int, r: int, *lead: int, dtype: torch.dtype = F64, param_dtype: torch.dtype | None = None, seed: int = 0
) -> Chain:
    """x [*lead, n] in ``dtype``, u [n, r] in ``param_dtype`` (x's unless given)."""
    draw = _draw(seed)
    return Chain(draw(*lead, n).to(dtype), draw(n, r).to(param_dtype or dtype))


def make_layer(
    m: int,
    n: int,
    r: int,
    *lead: int,
    dtype: torch.dtype = F64,
    param_dtype: torch.dtype | None = None,
    bias: bool = True,
    seed: int = 0,
) -> Layer:
    """W scaled so that outputs are of order one."""
    draw = _draw(seed)
    x, u = draw(*lead, n).to(dtype), draw(n, r).to(param_dtype or dtype)
    weight = (draw(m, n) * max(n, 1) ** -0.5).to(dtype)
    return Layer(x, u, weight, draw(m).to(dtype) if bias else None)


def make_conv(
    m: int,
    channels: int,
    kernel: tuple[int, int],
    r: int,
    size: tuple[int, ...],
    dtype: torch.dtype = F64,
    param_dtype: torch.dtype | None = None,
    bias: bool = True,
    seed: int = 0,
    **options: Any,
) -> Conv:
    """x [N, C, height, width] where ``size`` is (N, height, width), without N where it is (height, width)."""
    draw = _draw(seed)
    n = channels * kernel[0] * kernel[1]
    x = draw(*size[:-2], channels, *size[-2:]).to(dtype)
    weight = (draw(m, channels, *kernel) * n**-0.5).to(dtype)
    return Conv(x, draw(n, r).to(param_dtype or dtype), weight, draw(m).to(dtype) if bias else None, options)


def gradient_like(y: Tensor, seed: int = 1) -> Tensor:
    """A random upstream gradient of y's shape and dtype, on the CPU."""
    return _draw(seed)(*y.shape).to(y.dtype)


def close(got: Any, want: Any) -> None:
    """Equal to float64's precision."""
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def assert_exact(case: Any, names: tuple[str, ...] = (), **options: Any) -> None:
    """Value and gradients of a float64 case against the definition. ``exact`` has no option ``side``."""
    leaves = case.leaves(*names)
    y, want = case(**options), case.exact(**{k: v for k, v in options.items() if k != "side"})
    close(y, want)
    g = gradient_like(y)
    close(torch.autograd.grad(y, leaves, g), torch.autograd.grad(want, leaves, g))


def assert_as_good_as_plain(case: Any, factor: float = 1.5, **options: Any) -> None:
    """Value and gradients: right dtypes, and no worse than plain torch's in the same ones."""
    leaves = case.leaves()
    definition = {k: v for k, v in options.items() if k != "side"}
    y, same = case(**options), case.plain(**definition)
    g = gradient_like(y)
    got = y, *torch.autograd.grad(y, leaves, g)
    torchs = same, *torch.autograd.grad(same, leaves, g)
    wide = case.to(F64)
    wide_leaves = wide.leaves()
    exact = wide.exact(**definition)
    right = exact.detach(), *torch.autograd.grad(exact, wide_leaves, g.double())
    assert [t.dtype for t in got] == [case.x.dtype, *(leaf.dtype for leaf in leaves)]
    for ours, correct, others in zip(got, right, torchs, strict=True):
        if all(leaf.dtype == F64 for leaf in leaves):  # the yardstick's own precision
            close(ours, correct)
        else:
            assert_no_worse_than_torch(ours, correct, others, factor)


# ---- operands of the ops ---------------------------------------------------------------------------------------------


@dataclass
class Operands(_Tensors):
    """Random arguments of the three ops, consistent in nothing but their shapes."""

    x: Tensor  # [T, n]
    g: Tensor  # [T, m]
    left: Tensor  # [n, r]
    right: Tensor  # [m, r]
    coefficients: Tensor  # [T, r]
    base_out: Tensor | None  # [T, m]
    base_in: Tensor | None  # [T, n]

    @property
    def forward(self) -> tuple:
        return self.x, self.left, self.right, self.base_out

    @property
    def backward(self) -> tuple:
        """The arguments of ``householder_backward``, up to ``needs``."""
        return self.g, self.x, self.coefficients, self.right, self.left, self.base_in

    @property
    def gradient(self) -> tuple:
        return self.x, self.coefficients

    def exact_forward(self) -> tuple[Tensor, Tensor]:
        x, left, right = self.x.double(), self.left.double(), self.right.double()
        base = x if self.base_out is None else self.base_out.double()
        c = torch.einsum("tn,nr->tr", x, left)
        return base - torch.einsum("tr,mr->tm", c, right), c

    def exact_backward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g, x, c, left, right = (t.double() for t in self.backward[:5])
        base = g if self.base_in is None else self.base_in.double()
        q = torch.einsum("tm,mr->tr", g, left)
        sum_x, sum_g = torch.einsum("tn,tr->nr", x, q), torch.einsum("tm,tr->mr", g, c)
        dx = base - torch.einsum("tr,nr->tn", q, right)
        return (dx, q, sum_x + sum_g, q.new_empty(0)) if self.base_in is None else (dx, q, sum_x, sum_g)


def make_operands(
    T: int,
    n: int,
    r: int,
    m: int | None = None,
    dtype: torch.dtype = F64,
    acc: torch.dtype | None = None,
    seed: int = 0,
) -> Operands:
    """Without ``m`` there is no base, and m is n."""
    draw = _draw(seed)
    acc = acc or (F64 if dtype == F64 else torch.float32)
    width = n if m is None else m
    size = max(n, width, 1) ** -0.5
    bases = None if m is None else draw(T, width).to(dtype), None if m is None else draw(T, n).to(dtype)
    factors = (draw(n, r) * size).to(acc), (draw(width, r) * size).to(acc), draw(T, r).to(acc)
    return Operands(draw(T, n).to(dtype), draw(T, width).to(dtype), *factors, *bases)
