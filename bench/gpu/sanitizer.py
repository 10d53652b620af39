# SPDX-License-Identifier: Apache-2.0
"""Stage "sanitizer": NVIDIA's compute-sanitizer over a script that launches every native kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from bench._machine import ROOT
from bench.gpu.launches import declared_kernels
from bench.gpu.stage import FAILED, OK, UNAVAILABLE, Item, Mark, Options, Record, Unavailable, not_ok, record, table

NAME, TITLE = "sanitizer", "compute-sanitizer"

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 77  # the exit status that we ask the tool for when it found something
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")


def find_tool() -> str | None:
    roots = [
        os.path.join(os.environ[name], "bin", "compute-sanitizer")
        for name in ("CUDA_HOME", "CUDA_PATH")
        if name in os.environ
    ]
    for place in (shutil.which("compute-sanitizer"), *roots, *PLACES):
        if place and os.access(place, os.X_OK):
            return place
    return None


def script(device: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu.launches", device, *more]


def command(tool: str, name: str, filtered: bool = True) -> list[str]:
    """racecheck and synccheck look at our kernels only: they are slow, and the libraries' are not ours to mend.

    Our kernels live in a namespace, so their mangled names hold "frodkernels".
    """
    line = [tool, "--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    if filtered and name in ("racecheck", "synccheck"):
        line += ["--kernel-name", "kns=frodkernels"]
    return [*line, *script("cuda")]


def parse(text: str) -> tuple[int | None, list[str]]:
    """(errors that the tool counted, None where it printed no summary; its lines about them)"""
    total = None
    for pattern in (r"ERROR SUMMARY: (\d+) error", r"RACECHECK SUMMARY: (\d+) hazard"):
        for number in re.findall(pattern, text):
            total = (total or 0) + int(number)
    lines = [line for line in text.splitlines() if line.startswith("=========") and line.strip("= ")]
    return total, lines


def items(options: Options) -> list[Item]:
    names = TOOLS[:1] if options.quick else TOOLS
    return [Item("launches", 600, alone=True), *(Item(name, 1800, alone=True) for name in names)]


def budget(options: Options) -> float:
    return 2.5 * 3600.0


def _launches(options: Options) -> Record:
    """The script without a tool, under the profiler: are the kernels that the sources declare the ones that ran?"""
    line = script(options.device, "--names", *(["--few"] if options.dry_run else []))
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=options.scale * 500)
    print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
    if done.returncode:
        return record(FAILED, f"the launch script ended with status {done.returncode}")
    ran = re.findall(r"^kernel (.*)$", done.stdout, re.MULTILINE)
    calls = int(re.findall(r"^calls (\d+)$", done.stdout, re.MULTILINE)[0])
    uncovered = re.findall(r"^uncovered ?(.*)$", done.stdout, re.MULTILINE)[0].split()
    declared = sorted(declared_kernels())
    ours = [one for one in ran if "frodkernels" in one]  # what the filter of racecheck and synccheck sees
    missed = [name for name in declared if not any(re.search(rf"\b{name}\b", one) for one in ours)]
    data = {"declared": declared, "missed": missed, "calls": calls, "uncovered": uncovered, "ran": ran}
    if options.device == "cpu":
        return record(OK, f"{calls} calls on the CPU; {len(declared)} kernels declared, none can run here", **data)
    if uncovered or missed:
        return record(FAILED, f"not launched: {', '.join(uncovered + missed)}", **data)
    return record(OK, f"{calls} calls launched all {len(declared)} kernels", **data)


def run(item: str, options: Options, mark: Mark) -> Record:
    if item == "launches":
        return _launches(options)
    tool = find_tool()
    if options.device == "cpu":
        return record(OK, f"would run: {' '.join(command(tool or 'compute-sanitizer', item))}", tool=tool)
    if tool is None:
        raise Unavailable(
            "no compute-sanitizer on PATH, in CUDA_HOME or in /usr/local/cuda: it comes with the CUDA toolkit"
        )
    env = dict(os.environ)
    if item in ("memcheck", "initcheck"):
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # one allocation per tensor, so that its end is a real end
    for filtered in (True, False):  # releases differ in how the filter is spelled
        mark(" ".join(command(tool, item, filtered)))
        done = subprocess.run(
            command(tool, item, filtered),
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=options.scale * 1700,
        )
        errors, lines = parse(done.stdout)
        if errors is not None:
            break
    print(done.stdout[-5000:])
    data = {"lines": lines[:200], "errors": errors, "exit_status": done.returncode}
    if errors is None:
        return record(UNAVAILABLE, f"the tool ended with status {done.returncode} and no summary", **data)
    if errors or done.returncode:
        return record(FAILED, f"{errors} errors (exit status {done.returncode})", **data)
    return record(OK, "0 errors", **data)


def verdict(records: dict[str, Record]) -> str:
    return ", ".join(f"{name} {one['status']}" for name, one in records.items())


def render(records: dict[str, Record]) -> str:
    parts = [
        table(["", "", "finding"], [[name, one["status"], one["summary"]] for name, one in records.items()], text=True)
    ]
    for name, one in records.items():
        lines = one.get("data", {}).get("lines", [])
        if lines and one["status"] != OK:
            text = "\n".join(lines[:80])
            parts.append(f"What {name} said:\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def expected(records: dict[str, Record]) -> list[str]:
    return not_ok(records)
