# SPDX-License-Identifier: Apache-2.0
"""The dense products around the kernels, by the faster of the GEMM libraries that torch brings.

On AMD CPUs torch's float32 products go through MKL, which does not use AVX-512 there; oneDNN, in the same torch, does,
and was 1.6 to 2.2 times faster on a Zen 5. Its sums are single chains of up to 512 terms, less accurate than MKL's, so
it is handed a product in parts. Which library serves follows from the machine, dtype and shapes alone, so that equal
calls keep giving equal bits. Elsewhere, in traced calls and in other dtypes, torch decides.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_FEWEST_ROWS = 64
_LEAST_WORK = 2**24  # multiply-adds; below, cutting costs what the library gains
_PART, _SMALL_PART = 256, 128  # terms of a sum at a time; the small one for sums of up to 512


@functools.cache
def _onednn_is_faster() -> bool:
    """An AMD CPU with AVX-512, and a torch whose float32 products would go through MKL."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def _through_onednn(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    large = x.shape[0] >= _FEWEST_ROWS and x.shape[0] * weight.numel() >= _LEAST_WORK
    return large and bool(torch.backends.mkldnn.enabled) and _onednn_is_faster()


def _in_parts(xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """sum_i x_i W_i^T + bias; oneDNN is slow on anything but whole matrices, so parts are copied."""
    op = torch.ops.mkldnn._linear_pointwise
    y = None
    for x, weight in zip(xs, weights, strict=True):
        x = x.contiguous()
        y = op(x, weight, bias, "none", [], "") if y is None else op.binary(x, y, weight, None, "add")
    assert y is not None
    return y


def _parts(terms: int) -> int:
    return max(1, round(terms / (_SMALL_PART if terms <= 2 * _PART else _PART)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x [T, n], W [m, n]. For use inside autograd Functions: not differentiable."""
    if _through_onednn(x, weight):
        parts = _parts(x.shape[1])
        return _in_parts(x.chunk(parts, 1), [w.contiguous() for w in weight.chunk(parts, 1)], bias)
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def times(g: Tensor, weight: Tensor) -> Tensor:
    """g W for g [T, m], W [m, n]; likewise."""
    if _through_onednn(g, weight):
        parts = _parts(g.shape[1])
        return _in_parts(g.chunk(parts, 1), [w.contiguous().t() for w in weight.chunk(parts, 0)], None)
    return g @ weight
