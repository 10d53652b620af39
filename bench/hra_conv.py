# SPDX-License-Identifier: Apache-2.0
"""HRA's convolution against PEFT's, plain torch and the bare frozen convolution; modes and dtypes as for the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import frodkernels as fk
from bench import _hra_torch as plain
from bench._hra_case import HRACase, make_case, truth
from bench._interleave import FLOOR, Contestant, Entry, Group, fastest
from bench._plain_torch import compiled
from bench._timing import Clock
from bench.hra import floor, peft, with_u
from bench.shapes import CONVOLUTIONS, ConvShape

OP = "hra_conv2d"
MODES = ("forward", "step")
FORMS = ("weight", "filters")


def shapes(size: str) -> Sequence[ConvShape]:
    return CONVOLUTIONS[size]


def _ours(case: HRACase, mode: str) -> Contestant:
    weight, padding = case.weight.view(case.weight_shape), case.weight_shape[-1] // 2

    def layer(x: Tensor, u: Tensor) -> Tensor:
        return fk.hra_conv2d(x, weight, u, case.bias, padding=padding)

    return with_u(layer, case, mode)


def _plain(case: HRACase, mode: str, clock: Clock) -> Contestant:
    """The faster of the two forms."""
    return fastest([with_u(plain.conv2d(form, case), case, mode, form) for form in FORMS], clock)


def _compiled(case: HRACase, mode: str, clock: Clock) -> Contestant:
    """torch.compile of the form that is the faster one before it is compiled."""
    form = _plain(case, mode, clock).detail
    return with_u(compiled(plain.conv2d(form, case)), case, mode, form)


def implementations(mode: str, compile: bool = True) -> tuple[str, ...]:
    """The contestants, in the order of the tables; the same in every mode."""
    return (FLOOR, "peft", "torch", *(["compile"] if compile else []), "auto", "accelerated")


def group(
    shape: ConvShape,
    mode: str,
    dtype: torch.dtype,
    clock: Clock,
    device: torch.device,
    compile: bool,
    parameters: torch.dtype | None = None,
) -> Group:
    """All contestants for one convolution, mode and dtypes: of x and the layer, and of ``parameters``."""
    case = make_case(shape, dtype, device, parameters)
    makers: dict[str, Callable[[], Contestant]] = {
        FLOOR: lambda: floor(case, mode),
        "peft": lambda: peft(case, mode, accelerated=False),
        "torch": lambda: _plain(case, mode, clock),
        "compile": lambda: _compiled(case, mode, clock),
        "auto": lambda: _ours(case, mode),
        "accelerated": lambda: peft(case, mode, accelerated=True),
    }
    entries = tuple(Entry(impl, makers[impl]) for impl in implementations(mode, compile))
    return Group(OP, mode, shape, dtype, truth(case, mode), entries, parameters=parameters)
