# SPDX-License-Identifier: Apache-2.0
"""SHiRA's layer, a sparse change of a frozen weight, against PEFT's, plain torch, LoRA and the bare frozen layer.

Modes
  forward  no gradients, values just changed: nothing may be cached between calls
  step     forward and backward: dx and dvalues (dA, dB for LoRA)
  eval     no gradients, values unchanged since the last call; modules in eval mode
Floor      the frozen linear layer without an adapter; in a step its dx, too
Dtypes     one for all, or a 16-bit one beside values (A, B) in float32, which is what PEFT trains in
Rank r     stands for r (m + n) entries: as many as LoRA's parameters at that rank
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import frodkernels as fk
from bench import _peft_layers as peft_layers
from bench import _sparse_torch as plain
from bench._delta_case import DeltaCase, make_case, truth
from bench._interleave import FLOOR, Contestant, Entry, Group
from bench._layer import contestant
from bench._timing import Clock
from bench.hra import floor
from bench.shapes import DELTAS, DeltaShape

OP = "sparse_delta_linear"
MODES = ("forward", "step", "eval")


def shapes(size: str) -> Sequence[DeltaShape]:
    return DELTAS[size]


def with_values(function: plain.Layer, case: DeltaCase, mode: str, detail: str = "") -> Contestant:
    """``function(x, values)`` with the values trained in a step."""
    values = case.values.clone().requires_grad_(mode == "step")
    made = contestant(lambda x: function(x, values), case, mode, {"dvalues": values})
    made.detail = detail
    return made


def _ours(case: DeltaCase, mode: str) -> Contestant:
    def layer(x: Tensor, values: Tensor) -> Tensor:
        return fk.sparse_delta_linear(x, case.weight, values, case.pattern, case.bias)

    return with_values(layer, case, mode)


def module(case: DeltaCase) -> fk.nn.SparseDeltaLinear:
    """``fk.nn.SparseDeltaLinear`` around a layer with a copy of the case's weight."""
    base = nn.Linear(case.shape.n, case.shape.m, bias=case.bias is not None, device="meta")
    base.weight = nn.Parameter(case.weight.clone(), requires_grad=False)
    if case.bias is not None:
        base.bias = nn.Parameter(case.bias.clone(), requires_grad=False)
    return fk.nn.SparseDeltaLinear(base, case.values, case.pattern)


def _module(case: DeltaCase, mode: str) -> Contestant:
    layer = module(case).train(mode != "eval")
    return contestant(layer, case, mode, {"dvalues": layer.values})


def _peft(case: DeltaCase, mode: str, accelerated: bool) -> Contestant:
    layer = peft_layers.shira(case, accelerated=accelerated, eval_cache=mode == "eval").train(mode != "eval")
    made = contestant(layer, case, mode, {"dvalues": peft_layers.shira_parameter(layer)})
    made.detail = "swapped in" if accelerated else ""
    return made


def _lora(case: DeltaCase, mode: str) -> Contestant:
    layer = peft_layers.lora(case, case.shape.rank, case.values.dtype).train(mode != "eval")
    made = contestant(layer, case, mode, peft_layers.lora_parameters(layer))
    made.truth = peft_layers.lora_truth(layer, case, mode)
    return made


def implementations(mode: str, compile: bool = True) -> tuple[str, ...]:
    """The contestants of a mode, in the order of the tables."""
    if mode == "eval":
        return (FLOOR, "peft", "frodkernels", "accelerated", "lora")
    compiled = ["compile"] if compile else []
    return (FLOOR, "peft", "torch:csr", "torch:weight", *compiled, "auto", "accelerated", "lora")


def group(
    shape: DeltaShape,
    mode: str,
    dtype: torch.dtype,
    clock: Clock,
    device: torch.device,
    compile: bool,
    parameters: torch.dtype | None = None,
) -> Group:
    """All contestants for one layer, mode and dtypes: of x and the layer, and of ``parameters``."""
    case = make_case(shape, dtype, device, parameters)
    makers: dict[str, Callable[[], Contestant]] = {
        FLOOR: lambda: floor(case, mode),
        "peft": lambda: _peft(case, mode, accelerated=False),
        "torch:csr": lambda: with_values(plain.linear("csr", case), case, mode, "csr"),
        "torch:weight": lambda: with_values(plain.linear("weight", case), case, mode, "weight"),
        "compile": lambda: with_values(plain.compiled(plain.linear("weight", case)), case, mode, "weight"),
        "auto": lambda: _ours(case, mode),
        "frodkernels": lambda: _module(case, mode),
        "accelerated": lambda: _peft(case, mode, accelerated=True),
        "lora": lambda: _lora(case, mode),
    }
    entries = tuple(Entry(impl, makers[impl]) for impl in implementations(mode, compile))
    return Group(OP, mode, shape, dtype, truth(case, mode), entries, parameters=parameters)
