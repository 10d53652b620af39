# SPDX-License-Identifier: Apache-2.0
"""HRA in plain torch, as well as it can be written: compact WY, autograd through ``solve_triangular``.

With unit columns q and S of ``frodkernels.householder``, a layer is the base layer on ``x - ((x q) S^-T) q^T``: two
tall-skinny products. What is r x r is made in float32, the products are in x's dtype, as a GEMM library likes them.

tokens   as written: the small system solved for [T, r]
factor   x - (x (q S^-T)) q^T: solved for [n, r]

A convolution has no features to reflect:

weight   the adapted weight W - (W q S^-1) q^T, formed for each call
filters  conv(x, W) - conv1x1(conv(x, q), W q S^-1): r more filters
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._hra_case import HRACase

Layer = Callable[[Tensor, Tensor], Tensor]


def small(u: Tensor) -> tuple[Tensor, Tensor]:
    """(q, S) in float32."""
    u = u.float()
    q = u / torch.linalg.vector_norm(u, dim=0)
    return q, torch.triu(q.t() @ q, 1) + 0.5 * torch.eye(u.shape[1], device=u.device)


def solved(S: Tensor, rows: Tensor, transpose: bool) -> Tensor:
    """rows S^-1, or rows S^-T."""
    return torch.linalg.solve_triangular(S.t() if transpose else S, rows, upper=not transpose, left=False)


def reflected(form: str, x: Tensor, u: Tensor) -> Tensor:
    """x H_r ... H_1 in the form "tokens" or "factor"."""
    q, S = small(u)
    narrow = q.to(x.dtype)
    if form == "tokens":
        c = solved(S, (x @ narrow).float(), True).to(x.dtype)
    else:
        c = x @ solved(S, q, True).to(x.dtype)
    return x - c @ narrow.t()


def linear(form: str, case: HRACase) -> Layer:
    """``f(x, u)`` in the form "tokens" or "factor"."""
    W, bias = case.weight, case.bias
    return lambda x, u: F.linear(reflected(form, x, u), W, bias)


def conv2d(form: str, case: HRACase) -> Layer:
    """``f(x, u)`` in the form "weight" or "filters"."""
    W, bias = case.weight, case.bias

    def weight(x: Tensor, u: Tensor) -> Tensor:
        q, S = small(u)
        b = solved(S, W.float() @ q, False)
        return case.layer(x, (W - b @ q.t()).to(x.dtype), bias)

    def filters(x: Tensor, u: Tensor) -> Tensor:
        q, S = small(u)
        b = solved(S, W.float() @ q, False).to(x.dtype)
        more = q.t().reshape(-1, *case.weight_shape[1:]).to(x.dtype)
        c = F.conv2d(x, more, padding=more.shape[-1] // 2)
        return case.layer(x, W, bias) - F.conv2d(c, b[:, :, None, None])

    return {"weight": weight, "filters": filters}[form]
