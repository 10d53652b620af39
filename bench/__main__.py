# SPDX-License-Identifier: Apache-2.0
"""Measure, write the CSV and generate the page: ``python -m bench`` (``make bench BENCH_ARGS=...``)."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import report, results
from bench._interleave import Settings, measure, percentiles
from bench._machine import describe, find_device, load_warning
from bench._timing import make_clock
from bench.suites import DTYPES, specs

SECONDS = {"quick": 2.0, "default": 8.0, "full": 15.0}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure frodkernels against PEFT, plain torch, torch.compile and the floor.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few shapes, few rounds, no torch.compile (minutes)")
    size.add_argument("--full", action="store_true", help="large shapes too (an hour, 16 GB)")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only groups whose name matches; see --list")
    parser.add_argument("--list", action="store_true", help="print the groups' names and stop")
    parser.add_argument("--dtype", default="float32,bfloat16", help=f"comma-separated, of {', '.join(DTYPES)}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, help="of rounds per group (default: 8; quick 2, full 15)")
    parser.add_argument("--rounds", type=int, help="exactly so many rounds per group")
    parser.add_argument("--cold", action="store_true", help="flush the processor's caches before every call")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder for CSV and figures")
    parser.add_argument("--page", type=Path, default=report.PAGE, help="Markdown page to generate")
    parser.add_argument("--no-page", action="store_true", help="write the CSV only")
    options = parser.parse_args(arguments)
    options.dtypes = [name.strip() for name in options.dtype.split(",")]
    unknown = [name for name in options.dtypes if name not in DTYPES]
    if unknown:
        parser.error(f"unknown dtype {unknown[0]!r}; choose from {', '.join(DTYPES)}")
    options.size = "quick" if options.quick else "full" if options.full else "default"
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    seconds = options.seconds if options.seconds is not None else SECONDS[options.size]
    if options.rounds is not None:
        return Settings(seconds, max(options.rounds, 1), max(options.rounds, 1))
    return Settings(seconds, min_rounds=5 if options.quick else 7)


def _line(result) -> str:  # type: ignore[no-untyped-def]
    name = f"  {result.impl:<12} {result.detail:<22}"
    if not result.seconds:
        return name + result.status
    ms = 1e3 * percentiles(result.seconds)[0]
    saved = "" if result.saved is None else f"  saved {result.saved / 2**20:8.1f} MiB"
    if not result.ratios:
        return f"{name}{ms:10.3f} ms{saved}"
    ratio, low, high = percentiles(result.ratios)
    return f"{name}{ms:10.3f} ms  {ratio:6.2f} x floor ({low:.2f}-{high:.2f}){saved}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    todo = specs(options.size, options.dtypes, options.filter)
    if options.list:
        print("\n".join(spec.id for spec in todo))
        return 0
    if not todo:
        print("no group matches; see --list", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    machine, clock, settings = describe(device), make_clock(device, options.cold), settings_of(options)
    path = options.results / f"{machine.slug}.csv"
    print(f"{machine.name}, torch {machine.torch}, {machine.threads} threads, commit {machine.commit}")
    wrong = 0
    began = time.perf_counter()
    for i, spec in enumerate(todo, 1):
        print(f"[{i}/{len(todo)}, {time.perf_counter() - began:.0f} s] {spec.id}", flush=True)
        noise = load_warning() if i == 1 else None
        if noise:
            print(f"  warning: {noise}", file=sys.stderr)
        group = spec.build(clock, device, compile=not (options.quick or options.no_compile))
        measured = measure(group, clock, settings)
        results.write(path, results.make_rows(group, measured, machine, clock.cache))
        for result in measured:
            print(_line(result), flush=True)
            wrong += result.status.startswith("wrong")
        del group, measured
        gc.collect()
    print(f"wrote {path}")
    if not options.no_page:
        print(f"wrote {report.generate(options.results, options.page)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
