# SPDX-License-Identifier: Apache-2.0
"""Rapid switching: an adapter is merged into the weight it adapts, taken out again, or exchanged for another one.

Modes
  merge    W becomes W + S (LoRA: W + s B A), in place
  unmerge  the way back
  switch   one adapter out, another one in
Floor      a copy of the whole weight over the present one: what keeping W aside would cost on the way back
Rank r     r (m + n) parameters in every adapter: LoRA's at that rank, as many entries for SHiRA

What stands in W is set up before each timed call. The way back is judged too: frodkernels has to restore W bit for
bit, or it gets no time; for the others the detail says which share of the weights one round trip left changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import frodkernels as fk
from bench import _peft_layers as peft_layers
from bench._delta_case import DeltaCase, changed, make_case
from bench._interleave import FLOOR, Contestant, Entry, Group
from bench._timing import Clock
from bench._truth import Answers, Truth
from bench.shapes import MERGED, DeltaShape

OP = "adapter_switching"
MODES = ("merge", "unmerge", "switch")


def shapes(size: str) -> Sequence[DeltaShape]:
    return MERGED[size]


@dataclass
class Switch:
    """An adapter of ``weight``, which changes in place: how it goes in and out, and what W is with it."""

    weight: Tensor
    merge: Callable[[], Any]
    unmerge: Callable[[], Any]
    merged: Callable[[torch.dtype], Tensor]


def _bits(weight: Tensor) -> Tensor:
    return weight.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])


def round_trip(switch: Switch) -> float:
    """The share of the weights that merging and unmerging once leaves with other bits; W is put right again."""
    before = switch.weight.detach().clone()
    switch.merge()
    switch.unmerge()
    share = float((_bits(switch.weight) != _bits(before)).double().mean())
    with torch.no_grad():
        switch.weight.copy_(before)
    return share


def contestant(mode: str, first: Switch, second: Switch, exact: bool) -> Contestant:
    """Time one of the MODES of two adapters of one weight. ``exact``: any bit that does not come back is an error."""
    share = round_trip(first)
    if exact and share:
        raise RuntimeError(f"{share:.2%} of the weights have other bits after merging and unmerging")
    weight, clean = first.weight, first.weight.detach().clone()
    state: dict[str, Switch | None] = {"in": None}

    def put(wanted: Switch | None) -> None:
        if state["in"] is not None:
            state["in"].unmerge()
        if not exact:  # what does not come back exactly would pile up from call to call
            with torch.no_grad():
                weight.copy_(clean)
        if wanted is not None:
            wanted.merge()
        state["in"] = wanted

    def prepare() -> None:
        put(None if mode == "merge" else first)

    def run(_: Any = None) -> None:
        if mode != "merge":
            first.unmerge()
        if mode != "unmerge":
            (first if mode == "merge" else second).merge()
        state["in"] = {"merge": first, "unmerge": None, "switch": second}[mode]

    def answers() -> Answers:
        prepare()
        run()
        return {"weight": weight.detach().clone()}

    def truth(dtype: torch.dtype) -> Answers:
        if mode == "unmerge" and dtype != torch.float64:  # the yardstick rounds on both ways
            change = first.merged(torch.float64) - clean.double()
            return {"weight": first.merged(dtype) - change.to(dtype)}
        if mode == "unmerge":
            return {"weight": clean.double()}
        return {"weight": (first if mode == "merge" else second).merged(dtype)}

    detail = "all are back" if exact else f"{100 * share:.3g} % of the weights differ"
    return Contestant(run, prepare, answers, truth=truth, detail=detail)


def _ours(case: DeltaCase, other: DeltaCase, mode: str) -> Contestant:
    """Two ``fk.nn.SparseDeltaLinear`` around one base layer."""
    base = nn.Linear(case.shape.n, case.shape.m, bias=False, device="meta")
    base.weight = nn.Parameter(case.weight.clone(), requires_grad=False)

    def switch(case: DeltaCase) -> Switch:
        layer = fk.nn.SparseDeltaLinear(base, case.values, case.pattern)
        return Switch(base.weight, layer.merge_, layer.unmerge_, lambda dtype: changed(case, dtype))

    return contestant(mode, switch(case), switch(other), exact=True)


def _torch(case: DeltaCase, other: DeltaCase, mode: str) -> Contestant:
    """The same in plain torch: the entries are read, kept and written by their flat positions."""
    weight = case.weight.clone()
    flat = weight.view(-1)

    def switch(case: DeltaCase) -> Switch:
        index, kept = case.rows * case.shape.n + case.cols, case.values.new_empty(0)

        def merge() -> None:
            nonlocal kept
            kept = flat[index]
            flat[index] = kept + case.values.to(kept.dtype)

        def unmerge() -> None:
            flat[index] = kept

        return Switch(weight, merge, unmerge, lambda dtype: changed(case, dtype))

    return contestant(mode, switch(case), switch(other), exact=True)


def _peft(case: DeltaCase, other: DeltaCase, mode: str, accelerated: bool) -> Contestant:
    """``merge`` and ``unmerge`` of PEFT's SHiRA layers, or of those that ``fk.peft.accelerate`` makes of them."""
    weight = case.weight.clone()

    def switch(case: DeltaCase) -> Switch:
        layer: Any = peft_layers.shira(case, accelerated=accelerated)
        layer.get_base_layer().weight = nn.Parameter(weight, requires_grad=False)
        return Switch(weight, layer.merge, layer.unmerge, lambda dtype: changed(case, dtype))

    return contestant(mode, switch(case), switch(other), exact=accelerated)


def _lora(case: DeltaCase, other: DeltaCase, mode: str) -> Contestant:
    """W += B A and W -= B A, each one call of the GEMM library; A and B in the values' dtype, at the values' scale."""
    m, n, rank = case.shape.m, case.shape.n, case.shape.rank
    weight = case.weight.clone()

    def switch(seed: int) -> Switch:
        generator = torch.Generator().manual_seed(seed)
        A, B = (
            (torch.randn(*size, generator=generator) * (rank * n) ** -0.25).to(weight)
            for size in ((rank, n), (m, rank))
        )

        def merged(dtype: torch.dtype) -> Tensor:
            return torch.addmm(case.weight.to(dtype), B.to(dtype), A.to(dtype))

        return Switch(weight, lambda: weight.addmm_(B, A), lambda: weight.addmm_(B, A, alpha=-1), merged)

    return contestant(mode, switch(1), switch(2), exact=False)


def _floor(case: DeltaCase) -> Contestant:
    kept, weight = case.weight, case.weight.clone()
    return Contestant(lambda _: weight.copy_(kept), detail="the whole weight")


def truth(case: DeltaCase, mode: str) -> Truth:
    """Of SHiRA's merge alone, for whoever asks the group; each contestant brings its own."""

    def answers(dtype: torch.dtype) -> Answers:
        return {"weight": case.weight.to(dtype) if mode == "unmerge" else changed(case, dtype)}

    return answers


def implementations(mode: str, compile: bool = True) -> tuple[str, ...]:
    """The contestants, in the order of the tables; the same in every mode."""
    return (FLOOR, "peft", "torch", "frodkernels", "accelerated", "lora")


def group(shape: DeltaShape, mode: str, dtype: torch.dtype, clock: Clock, device: torch.device, compile: bool) -> Group:
    """All contestants for one weight, number of parameters and dtype, which is the adapters' too."""
    case = make_case(shape, dtype, device)
    other = dataclasses.replace(make_case(shape, dtype, device, seed=1), weight=case.weight)
    makers: dict[str, Callable[[], Contestant]] = {
        FLOOR: lambda: _floor(case),
        "peft": lambda: _peft(case, other, mode, accelerated=False),
        "torch": lambda: _torch(case, other, mode),
        "frodkernels": lambda: _ours(case, other, mode),
        "accelerated": lambda: _peft(case, other, mode, accelerated=True),
        "lora": lambda: _lora(case, other, mode),
    }
    entries = tuple(Entry(impl, makers[impl]) for impl in implementations(mode, compile))
    return Group(OP, mode, shape, dtype, truth(case, mode), entries)
