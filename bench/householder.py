# SPDX-License-Identifier: Apache-2.0
"""The chain of reflections alone, ``x H_r ... H_1``, at the sizes that layers call it with.

Modes   forward: no gradients.  step: forward and backward, dx and du.
Floors  streaming what has to be read and written at least: a copy of x; in a step g + x, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import frodkernels as fk
from bench import _hra_torch as plain
from bench._hra_case import HRACase, make_case, truth
from bench._interleave import FLOOR, Contestant, Entry, Group
from bench._plain_torch import compiled
from bench._timing import Clock
from bench.hra import with_u
from bench.shapes import RANKED, RankShape, without_outputs

OP = "householder"
MODES = ("forward", "step")


def shapes(size: str) -> Sequence[RankShape]:
    """Square: the op does not know m."""
    distinct = without_outputs(RANKED[size])
    return [dataclasses.replace(s, m=s.n, bias=False) for s in distinct if isinstance(s, RankShape)]


def _ours(x: Tensor, u: Tensor) -> Tensor:
    return fk.householder(x, u, transpose=True)


def _floor(case: HRACase, mode: str) -> Contestant:
    def stream(_: Any) -> object:
        with torch.no_grad():
            return (case.x.clone(), case.g + case.x) if mode == "step" else case.x.clone()

    return Contestant(stream, detail="streaming")


def implementations(mode: str, compile: bool = True) -> tuple[str, ...]:
    """The contestants, in the order of the tables; the same in every mode."""
    return (FLOOR, "torch", "torch:factor", *(["compile"] if compile else []), "frodkernels")


def group(
    shape: RankShape,
    mode: str,
    dtype: torch.dtype,
    clock: Clock,
    device: torch.device,
    compile: bool,
    parameters: torch.dtype | None = None,
) -> Group:
    """All contestants for one size, mode and dtypes: of x, and of ``parameters``."""
    case = make_case(shape, dtype, device, parameters)
    case.weight = torch.eye(shape.n, dtype=dtype, device=device)  # the layer that is the chain alone, for the truth

    def tokens(x: Tensor, u: Tensor) -> Tensor:
        return plain.reflected("tokens", x, u)

    def factor(x: Tensor, u: Tensor) -> Tensor:
        return plain.reflected("factor", x, u)

    makers: dict[str, Callable[[], Contestant]] = {
        FLOOR: lambda: _floor(case, mode),
        "torch": lambda: with_u(tokens, case, mode, "tokens"),
        "torch:factor": lambda: with_u(factor, case, mode, "factor"),
        "compile": lambda: with_u(compiled(tokens), case, mode, "tokens"),
        "frodkernels": lambda: with_u(_ours, case, mode),
    }
    entries = tuple(Entry(impl, makers[impl]) for impl in implementations(mode, compile))
    streams, each = (5, 2) if mode == "step" else (2, 1)  # x, out; g, x, dx
    return Group(
        OP,
        mode,
        shape,
        dtype,
        truth(case, mode),
        entries,
        min_bytes=streams * case.x.nbytes + each * case.u.nbytes,
        parameters=parameters,
    )
