# SPDX-License-Identifier: Apache-2.0
"""The FRoD layer against PEFT's, plain torch, torch.compile, LoRA and the GEMM floor.

Modes
  forward  no gradients, parameters just changed: nothing may be cached between calls
  step     forward and backward: dx, dlam, dvalues (dA, dB for LoRA)
  eval     no gradients, parameters unchanged since the last call; PEFT's layers in eval mode
Floors     forward, step: the GEMMs alone, allocations included, of the association order and operand layout that is
           fastest here; eval: one product with a ready weight
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import frodkernels as fk
from bench import _peft_layers as peft_layers
from bench import _plain_torch as plain
from bench import _truth
from bench._case import Case, make_case
from bench._interleave import FLOOR, Contestant, Entry, Group, fastest
from bench._layer import contestant
from bench._timing import Clock
from bench.shapes import SIZES, Shape
from frodkernels.functional.frod_path import PATHS

OP = "frod_linear"
MODES = ("forward", "step", "eval")


def shapes(size: str) -> Sequence[Shape]:
    return SIZES[size]


def _trainable(case: Case, mode: str) -> tuple[Tensor, Tensor]:
    on = mode == "step"
    return case.lam.clone().requires_grad_(on), case.values.clone().requires_grad_(on)


def ours(case: Case, mode: str, path: str) -> Contestant:
    """``fk.frod_linear`` on one of its paths, or on the one it chooses."""
    lam, values = _trainable(case, mode)

    def forward(x: Tensor) -> Tensor:
        return fk.frod_linear(x, case.U, case.V, lam, values, case.pattern, case.bias, path=path)

    return contestant(forward, case, mode, {"dlam": lam, "dvalues": values})


def _module(layer: nn.Module, case: Case, mode: str, parameters: dict[str, Tensor]) -> Contestant:
    layer.train(mode != "eval")
    return contestant(layer, case, mode, parameters)


def _peft(case: Case, mode: str, accelerated: bool) -> Contestant:
    layer = peft_layers.frod(case, accelerated=accelerated, eval_cache=mode == "eval")
    made = _module(layer, case, mode, peft_layers.frod_parameters(layer))
    made.detail = "swapped in" if accelerated else ""
    return made


def _lora(case: Case, mode: str) -> Contestant:
    layer = peft_layers.lora(case)
    made = _module(layer, case, mode, peft_layers.lora_parameters(layer))
    made.truth = peft_layers.lora_truth(layer, case, mode)
    return made


def _plain(case: Case, mode: str, clock: Clock) -> Contestant:
    """The fastest of the plain forms that work here."""
    plan = plain.Plan(case)
    made = []
    for form in plain.FORMS:
        lam, values = _trainable(case, mode)
        function = plain.layer(form, case, plan)
        leaves = {"dlam": lam, "dvalues": values}
        one = contestant(lambda x, f=function, a=lam, b=values: f(x, a, b), case, mode, leaves)
        one.detail = form
        try:
            one.run(None)
        except RuntimeError:  # a product that this torch lacks for this dtype and device
            continue
        made.append(one)
    return fastest(made, clock)


def _compiled(case: Case, mode: str, clock: Clock) -> Contestant:
    """torch.compile of the form that is the faster one before it is compiled."""
    plan = plain.Plan(case)
    made = {}
    for form in ("dense", "weight"):
        lam, values = _trainable(case, mode)
        function = plain.compilable(form, case, plan)
        leaves = {"dlam": lam, "dvalues": values}
        made[form] = contestant(lambda x, f=function, a=lam, b=values: f(x, a, b), case, mode, leaves)
        made[form].detail = form
    form = fastest(list(made.values()), clock).detail
    lam, values = _trainable(case, mode)
    function = plain.compiled(plain.compilable(form, case, plan))
    one = contestant(lambda x: function(x, lam, values), case, mode, {"dlam": lam, "dvalues": values})
    one.detail = form
    return one


def gemms(case: Case, mode: str, order: str, layout: str) -> Contestant:
    """The dense products of an association order, with nothing between them.

    ``layout`` "features" keeps z, u and dz as [n, T], "tokens" as [T, n]: GEMM libraries differ in which they like.
    """
    x, U, V, g, bias = case.x, case.U, case.V, case.g, case.bias
    m, n = U.shape
    step = mode == "step"

    def linear(a: Tensor, b: Tensor) -> Tensor:
        return a @ b if bias is None else torch.addmm(bias, a, b)

    def tokens(_: Any) -> object:
        z = x @ V
        y = linear(z, U.t())
        return (y, (g @ U) @ V.t()) if step else y

    def features(_: Any) -> object:
        z = V.t() @ x.t()
        y = linear(z.t(), U.t())
        return (y, (U.t() @ g.t()).t() @ V.t()) if step else y

    def weight(_: Any) -> object:
        W = U @ V.t()
        y = linear(x, W.t())
        return (y, g @ W, (g.t() @ x) @ V) if step else y

    def transposed(_: Any) -> object:
        W = V @ U.t()  # [n, m]
        y = linear(x, W)
        return (y, g @ W.t(), V.t() @ (x.t() @ g)) if step else y

    run = {
        ("activation", "tokens"): tokens,
        ("activation", "features"): features,
        ("materialize", "tokens"): weight,
        ("materialize", "features"): transposed,
    }[order, layout]

    def no_grad(state: Any) -> object:
        with torch.no_grad():
            return run(state)

    return Contestant(no_grad, detail=f"{order}, {layout}")


def _floor(case: Case, mode: str, clock: Clock) -> Contestant:
    if mode == "eval":
        weight = case.weight.to(case.dtype)
        linear = contestant(lambda x: nn.functional.linear(x, weight, case.bias), case, mode, {})
        return Contestant(linear.run, detail="one product")
    orders = [(order, layout) for order in ("activation", "materialize") for layout in ("tokens", "features")]
    return fastest([gemms(case, mode, *order) for order in orders], clock)


def implementations(mode: str, compile: bool = True) -> tuple[str, ...]:
    """The contestants of a mode, in the order of the tables."""
    if mode == "eval":
        return (FLOOR, "peft", "accelerated", "lora8")
    return (FLOOR, "peft", "torch", *(["compile"] if compile else []), "auto", *PATHS, "accelerated", "lora8")


def group(shape: Shape, mode: str, dtype: torch.dtype, clock: Clock, device: torch.device, compile: bool) -> Group:
    """All contestants for one layer, mode and dtype."""
    case = make_case(shape, dtype, device)
    makers: dict[str, Callable[[], Contestant]] = {
        FLOOR: lambda: _floor(case, mode, clock),
        "peft": lambda: _peft(case, mode, accelerated=False),
        "torch": lambda: _plain(case, mode, clock),
        "compile": lambda: _compiled(case, mode, clock),
        **{path: lambda path=path: ours(case, mode, path) for path in ("auto", *PATHS)},
        "accelerated": lambda: _peft(case, mode, accelerated=True),
        "lora8": lambda: _lora(case, mode),
    }
    entries = tuple(Entry(impl, makers[impl]) for impl in implementations(mode, compile))
    return Group(OP, mode, shape, dtype, _truth.layer(case, mode), entries)
