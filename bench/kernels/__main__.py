# SPDX-License-Identifier: Apache-2.0
"""Figures of every GPU kernel as JSON, one record a line in a list: ``python -m bench.kernels`` (``make kernels``)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from bench.kernels import records
from bench.kernels.architectures import LIMITS
from bench.kernels.counts import DTYPES, Case


def _shape(text: str) -> tuple[int, int, int]:
    try:
        n, nnz, T = (int(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is n:nnz:T, got {text!r}") from None
    return n, nnz, T


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description="Static figures and counts of every GPU kernel, no GPU needed. Times are modelled, not measured.",
    )
    parser.add_argument("--arch", default="80,90", help="compute capabilities, comma-separated (default: 80,90)")
    parser.add_argument("--all", action="store_true", help="every architecture of the library")
    parser.add_argument("--device", help="a device of bench.roofline, instead of an architecture")
    parser.add_argument("--shape", type=_shape, metavar="N:NNZ:T", help="one shape instead of the standard calls")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the features of --shape")
    parser.add_argument("--table", action="store_true", help="a Markdown table instead of JSON")
    parser.add_argument("--output", help="file to write instead of standard output")
    options = parser.parse_args(arguments)
    try:
        options.arches = sorted(LIMITS) if options.all else [int(a) for a in options.arch.split(",")]
    except ValueError:
        parser.error(f"--arch takes numbers like 80,90, got {options.arch!r}")
    unknown = [a for a in options.arches if a not in LIMITS]
    if unknown:
        parser.error(f"unknown architecture {unknown[0]}: choose from {', '.join(map(str, LIMITS))}")
    if options.device:
        names = {device.name.lower(): device for device in records.DEVICES}
        if options.device.lower() not in names:
            parser.error(f"unknown device {options.device!r}: choose from {', '.join(d.name for d in records.DEVICES)}")
        options.device = names[options.device.lower()]
    return options


def _over(record: records.Record, name: str) -> str:
    got, least = record[name], record[f"{name}_least"]
    return f"{got / least:.2f}" if least else "-"


def table(found: Sequence[records.Record]) -> str:
    """The launched kernels' figures; "x" is over the least possible."""
    lines = [
        "| kernel | call | arch | registers | shared | blocks/SM, occupancy (limiter) | sectors x | wavefronts x |"
        " gather x | L2 MB | modelled us |",
        "|---|---|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for r in found:
        call, l2, us = "-", "-", "-"
        if r["launches"]:
            tokens = "" if r["T"] is None else f" T {r['T']}"
            call = f"{r['op']} n {r['n']}{tokens} {r['dtype']}"
            l2 = f"{r['l2_bytes'] / 1e6:.2f}"
            us = "-" if r["modelled_us"] is None else f"{r['modelled_us']:.1f}"
        elif r["language"] == "CUDA":
            continue
        figures = [_over(r, n) if r["launches"] else "-" for n in ("sectors", "wavefronts", "gather_wavefronts")]
        name = r["instance"].split("::")[-1]
        lines.append(
            f"| {name} | {call} | {r['arch']} | {r['registers']} | {r['smem']} | {r['blocks_per_sm']},"
            f" {100 * r['occupancy']:.0f} % ({r['limiter']}) | {' | '.join(figures)} | {l2} | {us} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    cases: Sequence[Case] = records.STANDARD
    if options.shape:
        n, nnz, T = options.shape
        cases = [Case(op, n, nnz, T, options.dtype) for op in ("forward", "transpose", "gradient")]
    devices = [options.device] if options.device else [records.device_of(arch) for arch in options.arches]
    found = []
    for device in devices:
        found += [*records.cuda(device, cases), *records.triton(device.arch, options.dtype)]
    text = table(found) if options.table else "[\n" + ",\n".join(json.dumps(r) for r in found) + "\n]\n"
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            file.write(text)
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
