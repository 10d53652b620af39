# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu``: every check and measurement that needs a GPU, one report to send back."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench._machine import describe
from bench.gpu import report as reports
from bench.gpu.runner import run_stage
from bench.gpu.stage import KEPT, NOT_RUN, Options, Record, record

# In this order: what is short and tells most comes first.
STAGES = ("machine", "tests", "sanitizer", "micro", "training", "model")
OUTPUT = "frodkernels-gpu-report.md"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), metavar="FILE", help=f"the report ({OUTPUT})")
    parser.add_argument("--only", action="append", default=[], choices=STAGES, help="this stage (repeatable)")
    parser.add_argument("--skip", action="append", default=[], choices=STAGES, help="not this stage (repeatable)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, rounds and steps")
    parser.add_argument("--models", default="", metavar="DIR", help="folder of local models and data sets; see docs")
    parser.add_argument("--steps", type=int, default=0, help="training steps per method (30; quick 10)")
    parser.add_argument("--dry-run", action="store_true", help="every stage on the CPU with tiny sizes; no results")
    parser.add_argument("--fresh", action="store_true", help="do not go on from an existing report")
    parser.add_argument("--time-scale", type=float, default=1.0, metavar="X", help="multiply every time limit")
    return parser.parse_args(arguments)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def header(options: Options) -> dict[str, Any]:
    machine = describe(torch.device(options.device))
    return {
        "machine": machine.name,
        "commit": machine.commit,
        "torch": machine.torch,
        "started": _now(),
        "dry_run": options.dry_run,
        "quick": options.quick,
        "command": shlex.join([Path(sys.executable).name, "-m", "bench.gpu", *sys.argv[1:]]),
    }


def open_report(path: Path, options: Options, fresh: bool) -> reports.Report:
    """A new report, or the existing one where it is of this very machine and code; another is moved aside."""
    made = reports.empty(header(options))
    if not path.exists():
        return made
    if not fresh:
        try:
            found = reports.load(path)
        except (ValueError, OSError) as why:
            print(f"starting afresh: {why}", flush=True)
        else:
            differ = [
                name
                for name in ("machine", "commit", "torch", "dry_run", "quick")
                if found["header"].get(name) != made["header"][name]
            ]
            if not differ:
                print(f"going on from {path}; --fresh starts again", flush=True)
                return found
            print(f"starting afresh: {path} has another {', '.join(differ)}", flush=True)
    aside = path.with_name(path.name + ".previous")
    path.replace(aside)
    print(f"the report that was there is now {aside}", flush=True)
    return made


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: children stopped, report written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def drive(
    modules: Sequence[ModuleType], wanted: Sequence[str], options: Options, path: Path, fresh: bool
) -> reports.Report:
    """Run the ``wanted`` ones of ``modules``, writing the report after every item."""
    report = open_report(path, options, fresh)

    def save() -> None:
        report["header"]["updated"] = _now()
        reports.write(path, report, modules)

    save()
    try:
        for module in modules:
            if module.NAME in wanted:
                _drive_stage(module, report, options, save)
    finally:
        save()
    return report


def _drive_stage(module: ModuleType, report: reports.Report, options: Options, save: Any) -> None:
    before = report["stages"].get(module.NAME, {})
    records = report["stages"][module.NAME] = {}
    try:
        gather = getattr(module, "inputs", None)
        options.inputs = gather(report) if gather else {}
        items = module.items(options)
    except Exception as fault:  # a stage that cannot even be planned is a finding as well
        records["plan"] = record("crashed", f"the stage could not be planned: {type(fault).__name__}: {fault}")
        save()
        return
    for item in items:
        records[item.id] = before.get(item.id, record(NOT_RUN, "its turn has not come"))
    again = getattr(module, "AGAIN", False)
    todo = [item for item in items if again or records[item.id]["status"] not in KEPT]
    print(f"== {module.NAME}: {len(todo)} of {len(items)} to do", flush=True)
    save()

    def on_record(item: str, done: Record) -> None:
        records[item] = done
        print(f"  {done['status']:<11} {item} ({done.get('seconds', 0):.1f} s)  {done['summary']}", flush=True)
        save()

    run_stage(module, todo, options, on_record)


def shortcomings(report: reports.Report, modules: Sequence[ModuleType]) -> list[str]:
    """For a dry run: what did not go as it should."""
    found = []
    for module in modules:
        records = report["stages"].get(module.NAME, {})
        if not records:
            found.append(f"{module.NAME}: nothing was run")
            continue
        found += [f"{module.NAME}: {problem}" for problem in module.expected(records)]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    options = Options(
        dry_run=chosen.dry_run,
        quick=chosen.quick,
        device="cpu" if chosen.dry_run else "cuda",
        models=str(Path(chosen.models).resolve()) if chosen.models else "",
        steps=chosen.steps,
        scale=chosen.time_scale,
    )
    if not chosen.dry_run and not torch.cuda.is_available():
        built = torch.version.cuda or "none: this is a CPU build of torch"
        print(f"no CUDA device: torch {torch.__version__}, its CUDA: {built}.", file=sys.stderr)
        print(
            "`python -m frodkernels` says more; --dry-run walks through everything without a device.", file=sys.stderr
        )
        return 2
    modules = [importlib.import_module(f"bench.gpu.{name}") for name in STAGES]
    wanted = [name for name in STAGES if name not in chosen.skip and (not chosen.only or name in chosen.only)]
    path = chosen.output.resolve()
    with _terminable():
        try:
            report = drive(modules, wanted, options, path, chosen.fresh)
        except KeyboardInterrupt:
            print(f"interrupted; {path} holds what there is, the same command goes on from it", file=sys.stderr)
            return 130
    print(f"wrote {path}")
    ran = [module for module in modules if module.NAME in wanted]
    if chosen.dry_run:
        problems = shortcomings(report, ran)
        for problem in problems:
            print(f"dry run: {problem}", file=sys.stderr)
        return 1 if problems else 0
    bad = [
        name
        for name in wanted
        for one in report["stages"].get(name, {}).values()
        if one["status"] in ("failed", "crashed", "timeout")
    ]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
