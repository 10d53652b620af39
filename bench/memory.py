# SPDX-License-Identifier: Apache-2.0
"""Peak of memory of a model with HRA on every layer: ``python -m bench.memory``.

OPT-125M's shape: 12 linear layers of 768, one after the other, T = 768 tokens, three forward and backward passes.
Every implementation runs in a process of its own. Its figure is the most resident memory it held, less what it held
when the frozen model and the batch were there, one frozen layer had run, and its own code on a tiny layer: adapter,
activations, what is kept for the backward, gradients, and what is in use only for a moment.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import frodkernels as fk
from bench import _hra_torch as plain
from bench import _peft_layers as peft_layers
from bench import report, results
from bench._hra_case import HRACase, make_case
from bench._interleave import FLOOR, Group, Result
from bench._machine import ROOT, describe
from bench.shapes import OPT_SHORT, RankShape, ranked
from bench.suites import DTYPES
from examples.finetuning import memory

LAYERS = 12
STEPS = 3
IMPLEMENTATIONS = (FLOOR, "peft", "torch", "torch:factor", "auto", "accelerated", "lora")
# glibc gives a tensor pages of its own and takes them back when it is freed: what it would keep for later is not in use
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
KINDS = ("float32", "bfloat16", "bfloat16+float32")

Layer = Callable[[Tensor], Tensor]


def _shape(rank: int) -> RankShape:
    (shape,) = ranked(dataclasses.replace(OPT_SHORT, layer=f"{LAYERS} layers of {OPT_SHORT.n}"), rank)
    return shape


def _layer(impl: str, case: HRACase) -> tuple[Layer, list[Tensor]]:
    """One adapted layer and what it trains. ``case`` brings the frozen weight, which is not copied."""
    if impl == FLOOR:
        return lambda x: case.layer(x, case.weight, case.bias), []
    if impl in ("peft", "accelerated", "lora"):
        if impl == "lora":
            layer = peft_layers.lora(case, case.shape.rank, case.u.dtype)
        else:
            layer = peft_layers.hra(case, accelerated=impl == "accelerated")
        return layer, [p for p in layer.parameters() if p.requires_grad]
    u = nn.Parameter(case.u.clone())
    if impl == "auto":
        return lambda x: fk.hra_linear(x, case.weight, u, case.bias), [u]
    function = plain.linear({"torch": "tokens", "torch:factor": "factor"}[impl], case)
    return lambda x: function(x, u), [u]


def peak_bytes(impl: str, rank: int, kind: str) -> int:
    """Of this process, which should be a fresh one."""
    dtype, *parameters = (DTYPES[name] for name in kind.split("+"))
    cpu = torch.device("cpu")
    cases = [make_case(_shape(rank), dtype, cpu, *parameters, seed=seed) for seed in range(LAYERS)]
    x, g = cases[0].x, cases[0].g
    for case in cases:
        case.x = case.g = x.new_empty(0)
    tiny = make_case(dataclasses.replace(_shape(rank), m=64, n=64, T=4), dtype, cpu, *parameters)
    _step([_layer(impl, tiny)], tiny.x, tiny.g)
    _step([_layer(FLOOR, cases[0])], x, g)  # the GEMM library takes its workspace
    gc.collect()
    memory.reset_peak("cpu")
    base = memory.current_mb("cpu")
    layers = [_layer(impl, case) for case in cases]
    for _ in range(STEPS):
        _step(layers, x, g)
    return int((memory.peak_mb("cpu") - base) * 1e6)


def _step(layers: Sequence[tuple[Layer, list[Tensor]]], x: Tensor, g: Tensor) -> None:
    x = y = x.detach().requires_grad_()
    for layer, _ in layers:
        y = layer(y)
    torch.autograd.grad(y, [x, *(p for _, trained in layers for p in trained)], g)


def run(impl: str, rank: int, kind: str) -> Result:
    """``peak_bytes`` in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", "--worker", json.dumps([impl, rank, kind])]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **EXACT}, capture_output=True, text=True)
    result = Result(impl)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        result.status = f"failed: {last}"[:300]
    else:
        result.peak = int(done.stdout.strip().splitlines()[-1])
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", default="8,32", help="comma-separated")
    parser.add_argument("--dtypes", default=",".join(KINDS), help=f"comma-separated, of {', '.join(KINDS)}")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder for the CSV")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(peak_bytes(*json.loads(options.worker)))
        return 0
    machine = describe(torch.device("cpu"))
    path = options.results / f"{machine.slug}.csv"
    for rank in map(int, options.ranks.split(",")):
        for kind in options.dtypes.split(","):
            measured = [run(impl, rank, kind) for impl in IMPLEMENTATIONS]
            dtype, *parameters = (DTYPES[name] for name in kind.split("+"))
            group = Group(report.MEMORY, "step", _shape(rank), dtype, lambda _: {}, (), 0, *parameters)
            results.write(path, results.make_rows(group, measured, machine, "warm"))
            print(f"r={rank} {kind}")
            for result in measured:
                told = result.status if result.peak is None else f"{result.peak / 1e6:8.1f} MB above the frozen model"
                print(f"  {result.impl:<13} {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
