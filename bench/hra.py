# SPDX-License-Identifier: Apache-2.0
"""The HRA layer against PEFT's, plain torch, torch.compile, LoRA of the same rank and the bare frozen layer.

Modes
  forward  no gradients, parameters just changed: nothing may be cached between calls
  step     forward and backward: dx and du (dA, dB for LoRA)
  eval     no gradients, parameters unchanged since the last call; PEFT's layers in eval mode
Floor      the frozen linear layer without an adapter; in a step its dx, too
Dtypes     one for all, or a 16-bit one beside u (A, B) in float32, which is what PEFT trains in
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import frodkernels as fk
from bench import _hra_torch as plain
from bench import _peft_layers as peft_layers
from bench._hra_case import HRACase, make_case, truth
from bench._interleave import FLOOR, Contestant, Entry, Group
from bench._layer import contestant
from bench._plain_torch import compiled
from bench._timing import Clock
from bench.shapes import RANKED, RankShape
from frodkernels.functional.hra_side import SIDES

OP = "hra_linear"
MODES = ("forward", "step", "eval")
PEFT_EVERY = 3  # it takes as long as the others together, or longer


def shapes(size: str) -> Sequence[RankShape]:
    return RANKED[size]


def with_u(function: plain.Layer, case: HRACase, mode: str, detail: str = "") -> Contestant:
    """``function(x, u)`` with u trained in a step."""
    u = case.u.clone().requires_grad_(mode == "step")
    made = contestant(lambda x: function(x, u), case, mode, {"du": u})
    made.detail = detail
    return made


def ours(case: HRACase, mode: str, side: str) -> Contestant:
    """``fk.hra_linear`` from one side of the weight, or from the one it chooses."""

    def layer(x: Tensor, u: Tensor) -> Tensor:
        return fk.hra_linear(x, case.weight, u, case.bias, side=side)

    return with_u(layer, case, mode)


def peft(case: HRACase, mode: str, accelerated: bool) -> Contestant:
    layer = peft_layers.hra(case, accelerated=accelerated, eval_cache=mode == "eval").train(mode != "eval")
    made = contestant(layer, case, mode, {"du": peft_layers.hra_parameter(layer)})
    made.detail = "swapped in" if accelerated else ""
    made.every = 1 if accelerated else PEFT_EVERY
    return made


def _lora(case: HRACase, mode: str) -> Contestant:
    layer = peft_layers.lora(case, case.shape.rank, case.u.dtype).train(mode != "eval")
    made = contestant(layer, case, mode, peft_layers.lora_parameters(layer))
    made.truth = peft_layers.lora_truth(layer, case, mode)
    return made


def floor(case: HRACase, mode: str) -> Contestant:
    """Timed, not judged: it has no adapter."""
    return Contestant(contestant(lambda x: case.layer(x, case.weight, case.bias), case, mode, {}).run)


def implementations(mode: str, compile: bool = True) -> tuple[str, ...]:
    """The contestants of a mode, in the order of the tables."""
    if mode == "eval":
        return (FLOOR, "peft", "accelerated", "lora")
    compiled = ["compile"] if compile else []
    return (FLOOR, "peft", "torch", "torch:factor", *compiled, "auto", *SIDES, "accelerated", "lora")


def group(
    shape: RankShape,
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
        "peft": lambda: peft(case, mode, accelerated=False),
        "torch": lambda: with_u(plain.linear("tokens", case), case, mode, "tokens"),
        "torch:factor": lambda: with_u(plain.linear("factor", case), case, mode, "factor"),
        "compile": lambda: with_u(compiled(plain.linear("tokens", case)), case, mode, "tokens"),
        **{side: lambda side=side: ours(case, mode, side) for side in ("auto", *SIDES)},
        "accelerated": lambda: peft(case, mode, accelerated=True),
        "lora": lambda: _lora(case, mode),
    }
    entries = tuple(Entry(impl, makers[impl]) for impl in implementations(mode, compile))
    return Group(OP, mode, shape, dtype, truth(case, mode), entries, parameters=parameters)
