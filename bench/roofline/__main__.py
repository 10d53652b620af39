# SPDX-License-Identifier: Apache-2.0
"""Modelled times, none measured.

``python -m bench.roofline [--json | --summary | --dispatch] [--householder | --sampled]``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from bench.roofline import cases, dispatch, reflections, sampling
from bench.roofline.devices import BY_NAME, DEVICES, Device


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline",
        description="Modelled times of the sparse core beside floors and a dense product. Nothing is measured.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="records instead of tables")
    what.add_argument("--summary", action="store_true", help="one table: a row for each shape and op")
    what.add_argument("--dispatch", action="store_true", help="where the dense product and the plain kernels win")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--householder", action="store_true", help="chained reflections instead: a table, or --json")
    other.add_argument(
        "--sampled", action="store_true", help="where sampled products go by blocks (minutes), or --json"
    )
    parser.add_argument("--device", default="", help=f"comma-separated, of {', '.join(BY_NAME)} (default: all)")
    parser.add_argument("--reach", action="store_true", help="only the two shapes with a goal")
    parser.add_argument("--op", default="", help=f"comma-separated, of {', '.join(cases.OPS)} (default: all)")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.device.split(",") if name.strip()]
    ops = [name.strip() for name in options.op.split(",") if name.strip()]
    for given, known in ((names, BY_NAME), (ops, cases.OPS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{unknown[0]!r} is unknown: choose from {', '.join(known)}")
    options.devices = [BY_NAME[name] for name in names] or list(DEVICES)
    options.ops = ops or list(cases.OPS)
    options.shapes = cases.REACH if options.reach else cases.SHAPES
    return options


def times_table(records: Sequence[cases.Record]) -> str:
    head = "| device | op | modelled us | at 85 % | bound by | largest floor us | x floor | densify+GEMM us | x dense |"
    lines = [head, "|---|---|--:|--:|---|--:|--:|--:|--:|"]
    for r in records:
        floor = max(r["floors_us"], key=lambda name: r["floors_us"][name])
        lines.append(
            f"| {r['device']} | {r['op']} | {r['modelled_us']:.0f} | {r['modelled_us_at_85']:.0f} | {r['bound']} |"
            f" {r['floor_us']:.0f} ({floor}) | {r['over_floor']:.2f} | {r['dense_us']:.0f} | {r['over_dense']:.2f} |"
        )
    return "\n".join(lines)


def print_times(options: argparse.Namespace) -> None:
    print("Modelled, bfloat16, parameters in float32; nothing here was measured.")
    for shape in options.shapes:
        print(f"\n{shape.name}: T {shape.T}, n {shape.n}, nnz {shape.nnz}\n", flush=True)
        print(times_table(list(cases.records([shape], options.devices, options.ops))), flush=True)


def print_summary(options: argparse.Namespace) -> None:
    print("Modelled us (x largest floor, x densify+GEMM), bfloat16; nothing here was measured\n")
    print("| shape | op |" + "".join(f" {device.name} |" for device in options.devices))
    print("|---|---|" + "--:|" * len(options.devices))
    for shape in options.shapes:
        for op in options.ops:
            found = [cases.record(op, shape, device) for device in options.devices]
            cells = [f" {r['modelled_us']:.0f} ({r['over_floor']:.2f}, {r['over_dense']:.2f}) |" for r in found]
            print(f"| T {shape.T}, n {shape.n}, nnz {shape.nnz} | {op} |" + "".join(cells), flush=True)


def print_dispatch(devices: Sequence[Device]) -> None:
    print("Modelled: the dense product is faster above this density of S (forward, bfloat16; 1.00: never)\n")
    print("| device | n |" + "".join(f" T {T} |" for T in dispatch.TOKENS))
    print("|---|--:|" + "--:|" * len(dispatch.TOKENS))
    for device in devices:
        for n in dispatch.SIZES:
            found = [dispatch.break_even(n, T, device).density for T in dispatch.TOKENS]
            print(f"| {device.name} | {n} |" + "".join(f" {density:.3f} |" for density in found), flush=True)
    print("\nModelled: below T tokens the kernels without tensor cores are faster, at 1 % (forward, bfloat16)\n")
    print("| device |" + "".join(f" n {n} |" for n in dispatch.SIZES))
    print("|---|" + "--:|" * len(dispatch.SIZES))
    for device in devices:
        found = [dispatch.fma_below(list(dispatch.few_tokens(n, device))) for n in dispatch.SIZES]
        print(f"| {device.name} |" + "".join(f" {T} |" for T in found), flush=True)


def print_householder(devices: Sequence[Device]) -> None:
    print("Modelled us (x the least HBM traffic; plain torch with float32 sums, all in 16 bits), bfloat16 tokens\n")
    print(reflections.table(list(reflections.records(devices))))


def print_sampled(devices: Sequence[Device]) -> None:
    print("Modelled: dense blocks are faster above this density (us entry by entry at 1 %; by blocks at 10 %)\n")
    print(sampling.table(list(sampling.records(devices))))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.json:
        made = cases.records(options.shapes, options.devices, options.ops)
        if options.householder or options.sampled:
            made = (reflections if options.householder else sampling).records(options.devices)
        found = list(made)
        print("[\n" + ",\n".join(json.dumps(r) for r in found) + "\n]")
    elif options.householder:
        print_householder(options.devices)
    elif options.sampled:
        print_sampled(options.devices)
    elif options.summary:
        print_summary(options)
    elif options.dispatch:
        print_dispatch(options.devices)
    else:
        print_times(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
