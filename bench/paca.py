# SPDX-License-Identifier: Apache-2.0
"""PaCA's layer, k columns of the weight trained, against LoRA, plain torch and the bare frozen layer.

Modes
  forward  no gradients
  step     forward and backward: dx and dcolumns (dA, dB for LoRA)
Floor      the frozen linear layer without an adapter; in a step its dx, too
Plain      ``torch:clone``: the columns copied into a clone of W for each call, autograd does the rest.
           ``torch:partial``: the paper's own form, an autograd Function on a W that holds the columns.
LoRA       of rank 8 and 16, whatever k is: k columns have k m parameters, rank r has r (m + n)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import frodkernels as fk
from bench import _peft_layers as peft_layers
from bench._interleave import FLOOR, Contestant, Entry, Group
from bench._layer import contestant
from bench._plain_torch import compiled
from bench._timing import Clock
from bench._truth import Answers, Truth
from bench.shapes import COLUMNS, RankShape

OP = "paca_linear"
MODES = ("forward", "step")
LORAS = {"lora8": 8, "lora16": 16}

Layer = Callable[[Tensor, Tensor], Tensor]


@dataclass
class PaCACase:
    """A layer of which some columns are trained, and one batch for it; g = dL/dy.

    x [T, n], W [m, n], bias and g in ``dtype``; column_weight [m, k] in its own, not what W holds there: whoever
    forgets to use it is wrong.
    """

    shape: RankShape
    dtype: torch.dtype
    x: Tensor
    weight: Tensor
    columns: Tensor
    column_weight: Tensor
    bias: Tensor | None
    g: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device


def shapes(size: str) -> Sequence[RankShape]:
    return COLUMNS[size]


def make_case(
    shape: RankShape, dtype: torch.dtype, device: torch.device, parameters: torch.dtype | None = None, seed: int = 0
) -> PaCACase:
    """Repeatable, the same numbers on every device; column_weight in ``parameters``, or in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * std).to(device)

    m, n, T = shape.m, shape.n, shape.T
    return PaCACase(
        shape=shape,
        dtype=dtype,
        x=normal(T, n).to(dtype),
        weight=normal(m, n, std=n**-0.5).to(dtype),
        columns=torch.randperm(n, generator=generator)[: shape.rank].sort().values.to(device),
        column_weight=normal(m, shape.rank, std=shape.rank**-0.5).to(parameters or dtype),
        bias=normal(m).to(dtype) if shape.bias else None,
        g=normal(T, m).to(dtype),
    )


def truth(case: PaCACase, mode: str) -> Truth:
    """y, and for a step dx and dcolumns."""

    def answers(dtype: torch.dtype) -> Answers:
        x, g = case.x.to(dtype), case.g.to(dtype)
        weight = case.weight.to(dtype).index_copy(1, case.columns, case.column_weight.detach().to(dtype))
        out = {"y": F.linear(x, weight, None if case.bias is None else case.bias.to(dtype))}
        if mode == "step":
            kept = torch.float64 if dtype == torch.float64 else case.column_weight.dtype
            out |= {"dx": g @ weight, "dcolumns": (g.t() @ x[:, case.columns]).to(kept)}
        return out

    return answers


class _Partial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, columns: Tensor, column_weight: Tensor, bias: Any) -> Tensor:
        ctx.save_for_backward(x[:, columns], W)
        ctx.kept = column_weight.dtype
        return F.linear(x, W, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        chosen, W = ctx.saved_tensors
        return g @ W, None, None, (g.t() @ chosen).to(ctx.kept), None


def plain(form: str, case: PaCACase) -> Layer:
    """``f(x, column_weight)`` in the form "clone" or "partial"."""
    W, columns, bias = case.weight, case.columns, case.bias
    if form == "clone":
        return lambda x, C: F.linear(x, W.index_copy(1, columns, C.to(W.dtype)), bias)
    placed = W.clone()

    def partial(x: Tensor, C: Tensor) -> Tensor:
        with torch.no_grad():
            placed[:, columns] = C.to(placed.dtype)
        return _Partial.apply(x, placed, columns, C, bias)

    return partial


def with_columns(function: Layer, case: PaCACase, mode: str, detail: str = "") -> Contestant:
    """``function(x, column_weight)`` with the columns trained in a step."""
    column_weight = case.column_weight.clone().requires_grad_(mode == "step")
    made = contestant(lambda x: function(x, column_weight), case, mode, {"dcolumns": column_weight})
    made.detail = detail
    return made


def _function(case: PaCACase, mode: str) -> Contestant:
    def layer(x: Tensor, column_weight: Tensor) -> Tensor:
        return fk.paca_linear(x, case.weight, case.columns, column_weight, case.bias)

    return with_columns(layer, case, mode, "fk.paca_linear")


def _module(case: PaCACase, mode: str) -> Contestant:
    layer = fk.nn.PaCALinear(case.weight.clone(), case.columns, case.bias)
    layer.column_weight = nn.Parameter(case.column_weight.clone())
    made = contestant(layer, case, mode, {"dcolumns": layer.column_weight})
    made.detail = "fk.nn.PaCALinear"
    return made


def _lora(case: PaCACase, mode: str, rank: int) -> Contestant:
    layer = peft_layers.lora(case, rank, case.column_weight.dtype)
    made = contestant(layer, case, mode, peft_layers.lora_parameters(layer))
    made.truth = peft_layers.lora_truth(layer, case, mode)
    return made


def _floor(case: PaCACase, mode: str) -> Contestant:
    """Timed, not judged: it has no adapter."""
    return Contestant(contestant(lambda x: F.linear(x, case.weight, case.bias), case, mode, {}).run)


def implementations(mode: str, compile: bool = True) -> tuple[str, ...]:
    """The contestants, in the order of the tables; the same in every mode."""
    compiled = ["compile"] if compile else []
    return (FLOOR, "torch:clone", *compiled, "torch:partial", "frodkernels", "function", *LORAS)


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
        FLOOR: lambda: _floor(case, mode),
        "torch:clone": lambda: with_columns(plain("clone", case), case, mode, "clone"),
        "compile": lambda: with_columns(compiled(plain("clone", case)), case, mode, "clone"),
        "torch:partial": lambda: with_columns(plain("partial", case), case, mode, "partial"),
        "frodkernels": lambda: _module(case, mode),
        "function": lambda: _function(case, mode),
        **{name: lambda rank=rank: _lora(case, mode, rank) for name, rank in LORAS.items()},
    }
    entries = tuple(Entry(impl, makers[impl]) for impl in implementations(mode, compile))
    return Group(OP, mode, shape, dtype, truth(case, mode), entries, parameters=parameters)
