# SPDX-License-Identifier: Apache-2.0
"""The constants of the path cost model, and how often it chooses well: ``python -m bench.calibrate``.

First SPARSE_COST of ``frodkernels/functional/frod_path.py``: per dtype, the GEMM multiply-adds in the time of one
sparse multiply-add, (product alone, fused backward), over layer sizes; what to write there is the geometric mean.
Then, per layer and number of tokens, the path measured as the fastest, the one the model chooses, and the loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterable, Sequence

import torch

from bench import frod
from bench._case import Case, make_case
from bench._interleave import Contestant, Settings, rounds_of
from bench._machine import describe, find_device, load_warning
from bench._timing import Clock, make_clock
from bench.report import table
from bench.shapes import ATTENTION, DOWN, LLAMA_1B, LLAMA_3B, OPT, UP, Shape
from bench.suites import DTYPES
from frodkernels.functional.frod_path import PATHS, SPARSE_COST, choose
from frodkernels.ops import sparse_core as ops

COST_SHAPES = (OPT, DOWN, LLAMA_1B, LLAMA_3B)
CHOICE_SHAPES = (ATTENTION, UP, DOWN, LLAMA_1B, LLAMA_3B)
TOKENS = (64, 256, 1024, 2048, 4096, 8192)


def sparse_cost(case: Case, clock: Clock, settings: Settings) -> tuple[float, float]:
    """(product, fused backward) in GEMM multiply-adds per sparse multiply-add."""
    n = case.shape.n
    x, V, z, u, lam, values = case.x, case.V, case.z, case.u, case.lam, case.values
    csr, csc = case.pattern.csr, case.pattern.csc
    needs = [True, True, True]
    runs = (
        Contestant(lambda _: V.t() @ x.t()),
        Contestant(lambda _: ops.sparse_core(z, lam, values, *csr)),
        Contestant(lambda _: ops.sparse_core_backward(u, z, lam, values, *csc, needs)),
    )
    gemm, product, backward = rounds_of(runs, clock, settings)
    scale = n * n / (case.rows.numel() + n)  # both per token
    return (
        scale * statistics.median(s / g for s, g in zip(product, gemm, strict=True)),
        scale * statistics.median(s / g for s, g in zip(backward, gemm, strict=True)),
    )


def _chosen(case: Case, mode: str) -> str:
    step = mode == "step"
    with torch.set_grad_enabled(step):
        x = case.x.detach().requires_grad_(step)
        return choose(x, case.shape.m, case.rows.numel(), step)


def choice(case: Case, mode: str, clock: Clock, settings: Settings) -> tuple[str, str, float, dict[str, float]]:
    """(measured best, chosen by the model, time lost, milliseconds of each path)."""
    contestants = [frod.ours(case, mode, path) for path in PATHS]
    samples = dict(zip(PATHS, rounds_of(contestants, clock, settings), strict=True))
    medians = {path: 1e3 * statistics.median(times) for path, times in samples.items()}
    best, chosen = min(medians, key=medians.__getitem__), _chosen(case, mode)
    loss = statistics.median(a / b for a, b in zip(samples[chosen], samples[best], strict=True)) - 1
    return best, chosen, loss, medians


def print_costs(dtypes: Iterable[str], shapes: Sequence[Shape], device: torch.device, settings: Settings) -> None:
    lines, proposals = [], []
    for dtype in dtypes:
        pairs = []
        for shape in shapes:
            pair = sparse_cost(make_case(shape, DTYPES[dtype], device), make_clock(device), settings)
            pairs.append(pair)
            lines.append([str(shape), dtype, *(f"{cost:.2f}" for cost in pair)])
        means = tuple(statistics.geometric_mean(column) for column in zip(*pairs, strict=True))
        proposals.append(f"    torch.{dtype}: ({means[0]:.1f}, {means[1]:.1f}),  # now {SPARSE_COST[DTYPES[dtype]]}")
    print("GEMM multiply-adds in the time of one sparse multiply-add\n")
    print(table(["shape", "dtype", "product", "fused backward"], lines))
    print("SPARSE_COST = {\n" + "\n".join(proposals) + "\n}\n", flush=True)


def print_choices(
    dtypes: Iterable[str], shapes: Sequence[Shape], tokens: Sequence[int], device: torch.device, settings: Settings
) -> None:
    lines, losses = [], []
    for dtype in dtypes:
        for shape in shapes:
            for T in tokens:
                case = make_case(dataclasses.replace(shape, T=T), DTYPES[dtype], device)
                for mode in ("forward", "step"):
                    best, chosen, loss, medians = choice(case, mode, make_clock(device), settings)
                    losses.append(loss)
                    times = [f"{medians[path]:.2f}" for path in PATHS]
                    lost = f"{100 * loss:.0f} %" if chosen != best else ""
                    lines.append([f"{shape.n}→{shape.m}", str(T), dtype, mode, *times, best, chosen, lost])
    print("The path that is measured as the fastest and the one the model chooses; milliseconds\n")
    header = ["layer", "T", "dtype", "mode", *PATHS, "fastest", "chosen", "loss"]
    print(table(header, lines))
    ordered = sorted(losses)
    print(f"loss: median {100 * statistics.median(ordered):.1f} %, largest {100 * ordered[-1]:.1f} %")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.calibrate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", default="float32,bfloat16", help=f"comma-separated, of {', '.join(DTYPES)}")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=1.5, help="per measurement")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated numbers of tokens")
    parser.add_argument("--costs-only", action="store_true", help="leave the table of choices out")
    options = parser.parse_args(arguments)
    dtypes = options.dtype.split(",")
    tokens = [int(T) for T in options.tokens.split(",")]
    if options.threads:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    machine, noise = describe(device), load_warning()
    print(f"{machine.name}, torch {machine.torch}, {machine.threads} threads, commit {machine.commit}")
    if noise:
        print(f"warning: {noise}")
    settings = Settings(options.seconds, min_rounds=5, max_rounds=40)
    print_costs(dtypes, COST_SHAPES, device, settings)
    if not options.costs_only:
        print_choices(dtypes, CHOICE_SHAPES, tokens, device, settings)


if __name__ == "__main__":
    main()
