# SPDX-License-Identifier: Apache-2.0
"""A product sampled at fixed positions, ``out[k] = sum_t a[t, row_k] b[t, col_k]``, over densities.

Mode       forward: no gradients; a [T, m] and b [T, n] token-major, as activations and their gradients are.
Yardstick  what ratios refer to: ``(a.T @ b)[rows, cols]``, the way without a kernel.
Context    ``product``: a.T @ b alone, nothing sampled. ``onednn``: the yardstick with a product by oneDNN, where
           torch's own float32 product is slow (AMD CPUs). ``torch:csr``: ``torch.sparse.sampled_addmm``, 16-bit
           operands through float32. ``stream``: a copy of a and of b, what has to be moved at least.
Positions  random, in row-major order, as SHiRA has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import frodkernels as fk
from bench._delta_case import positions
from bench._interleave import FLOOR, Contestant, Entry, Group, Unavailable
from bench._sparse_torch import Positions
from bench._timing import Clock
from bench._truth import Answers, Truth
from bench.shapes import SAMPLED, SampledShape
from frodkernels.functional import _gemm
from frodkernels.ops import sampled as ops

OP = "sampled_product"
MODES = ("forward",)
WAYS = {"entries": False, "blocks": True}  # an inner product for every entry; dense blocks of which entries are kept


@dataclass
class SampledCase:
    """a [T, m] and b [T, n] in one dtype, and the positions."""

    shape: SampledShape
    a: Tensor
    b: Tensor
    rows: Tensor
    cols: Tensor


def shapes(size: str) -> Sequence[SampledShape]:
    return SAMPLED[size]


def make_case(shape: SampledShape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> SampledCase:
    """Repeatable, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = positions(shape.m, shape.n, shape.nnz, generator)
    a, b = (torch.randn(shape.T, features, generator=generator).to(device, dtype) for features in (shape.m, shape.n))
    return SampledCase(shape, a, b, rows.to(device), cols.to(device))


def truth(case: SampledCase) -> Truth:
    """The entries of the dense product; summed in float32 (float64) and rounded once."""

    def answers(dtype: torch.dtype) -> Answers:
        a, b = case.a.to(dtype), case.b.to(dtype)
        return {"out": (a.t() @ b)[case.rows, case.cols]}

    return answers


def contestant(run: Callable[[], Any], detail: str = "", judged: bool = True) -> Contestant:
    def timed(_: Any = None) -> Any:
        with torch.no_grad():
            return run()

    return Contestant(timed, answers=(lambda: {"out": timed()}) if judged else None, detail=detail)


def way(case: SampledCase, tiled: bool) -> Callable[[], Tensor]:
    """One of the two algorithms, asked for by name in the op that ``fk.sampled_product`` leaves the choice to."""
    pattern = fk.SparsePattern(case.rows, case.cols, (case.shape.m, case.shape.n))
    return lambda: ops.sampled_product(case.a.t(), case.b.t(), *pattern.csc, case.a.dtype, tiled)


def _ours(case: SampledCase) -> Contestant:
    pattern = fk.SparsePattern(case.rows, case.cols, (case.shape.m, case.shape.n))
    return contestant(lambda: fk.sampled_product(case.a, case.b, pattern))


def _onednn(case: SampledCase) -> Contestant:
    if case.a.dtype != torch.float32 or not _gemm._onednn_is_faster():
        raise Unavailable("torch's own product is that of oneDNN already, or as fast")
    return contestant(lambda: _gemm.times(case.a.t(), case.b)[case.rows, case.cols])


def _csr(case: SampledCase) -> Contestant:
    plan = Positions(case.rows, case.cols, (case.shape.m, case.shape.n))
    return contestant(lambda: plan.sample(case.a, case.b).to(case.a.dtype), "sampled_addmm")


def implementations(mode: str, compile: bool = True) -> tuple[str, ...]:
    """The contestants, in the order of the tables. torch.compile has nothing to fuse here: product and selection."""
    return (FLOOR, "product", "onednn", "torch:csr", "frodkernels", *WAYS, "stream")


def group(
    shape: SampledShape, mode: str, dtype: torch.dtype, clock: Clock, device: torch.device, compile: bool
) -> Group:
    """All contestants for one size, density and dtype."""
    case = make_case(shape, dtype, device)
    a, b, index = case.a, case.b, (case.rows, case.cols)
    makers: dict[str, Callable[[], Contestant]] = {
        FLOOR: lambda: contestant(lambda: (a.t() @ b)[index]),
        "product": lambda: contestant(lambda: a.t() @ b, judged=False),
        "onednn": lambda: _onednn(case),
        "torch:csr": lambda: _csr(case),
        "frodkernels": lambda: _ours(case),
        **{name: lambda tiled=tiled: contestant(way(case, tiled)) for name, tiled in WAYS.items()},
        "stream": lambda: contestant(lambda: (a.clone(), b.clone()), judged=False),
    }
    entries = tuple(Entry(impl, makers[impl]) for impl in implementations(mode, compile))
    moved = a.nbytes + b.nbytes + shape.nnz * (a.itemsize + (2 if max(shape.m, shape.n) <= 65536 else 4))
    return Group(OP, mode, shape, dtype, truth(case), entries, min_bytes=moved)
