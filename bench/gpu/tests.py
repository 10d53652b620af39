# SPDX-License-Identifier: Apache-2.0
"""Stage "tests": the test suite on this machine, and the device tests on its GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench._machine import ROOT
from bench.gpu.stage import FAILED, OK, Item, Mark, Options, Record, not_ok, record, table

NAME, TITLE = "tests", "Tests"

# name -> (pytest's arguments, variables, time limit). The device tests with FRODKERNELS_TEST_DEVICE=cuda take CUDA only
# and fail where it is missing; the interpreter run is the one of `make test`.
RUNS: dict[str, tuple[tuple[str, ...], dict[str, str], float]] = {
    "ops on the GPU": (("tests/device/test_ops_on_device.py",), {"FRODKERNELS_TEST_DEVICE": "cuda"}, 2400),
    "ways on the GPU": (("tests/device/test_ways_on_device.py",), {"FRODKERNELS_TEST_DEVICE": "cuda"}, 2400),
    "layers on the GPU": (("tests/device/test_layers_on_device.py",), {"FRODKERNELS_TEST_DEVICE": "cuda"}, 2400),
    "reflections on the GPU": (
        ("tests/device/test_householder_on_device.py", "tests/device/test_hra_on_device.py"),
        {"FRODKERNELS_TEST_DEVICE": "cuda"},
        2400,
    ),
    "whole suite": (("tests", "--ignore=tests/bench/test_gpu.py"), {}, 3600),
    "Triton interpreter": (("tests", "-k", "test_triton"), {"TRITON_INTERPRET": "1"}, 2400),
}
# For a dry run: a handful of the same device tests, on the CPU.
DRY_RUNS: dict[str, tuple[tuple[str, ...], dict[str, str], float]] = {
    "a few, on the CPU": (
        ("tests/device", "-k", "cpu and (captured or current_stream or serves_cuda or square or waits)"),
        {},
        120,
    ),
}


def _runs(options: Options) -> dict[str, tuple[tuple[str, ...], dict[str, str], float]]:
    return DRY_RUNS if options.dry_run else RUNS


def items(options: Options) -> list[Item]:
    names = [name for name in _runs(options) if not (options.quick and name == "Triton interpreter")]
    return [Item(name, _runs(options)[name][2] + 60, alone=True) for name in names]


def budget(options: Options) -> float:
    return 3 * 3600.0


def read_junit(path: Path) -> dict[str, object]:
    """Counts, failures with their first lines, and skips by reason, from pytest's JUnit file."""
    root = ElementTree.parse(path).getroot()
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failures, skips = [], {}
    for suite in root.iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, "0"))
    for case in root.iter("testcase"):
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                text = (found.get("message") or found.text or "").strip()
                failures.append([f"{case.get('classname')}::{case.get('name')}", text[:600]])
        for found in case.findall("skipped"):
            reason = re.sub(r"^.*?:\d+: ", "", found.get("message") or "")[:200]
            skips[reason] = skips.get(reason, 0) + 1
    return {**counts, "failed": failures, "skips": skips}


def run(item: str, options: Options, mark: Mark) -> Record:
    arguments, variables, limit = _runs(options)[item]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junit-xml={junit}", *arguments]
        mark("pytest " + " ".join(arguments))
        done = subprocess.run(command, cwd=ROOT, env=env, timeout=options.scale * limit)
        if not junit.exists():
            return record(FAILED, f"pytest ended with status {done.returncode} and wrote no results")
        found = read_junit(junit)
    bad = int(str(found["failures"])) + int(str(found["errors"]))
    passed = int(str(found["tests"])) - bad - int(str(found["skipped"]))
    summary = f"{passed} passed, {bad} failed, {found['skipped']} skipped"
    if done.returncode != 0 or passed == 0:
        return record(FAILED, summary + (f" (status {done.returncode})" if not bad else ""), passed=passed, **found)
    return record(OK, summary, passed=passed, **found)


def verdict(records: dict[str, Record]) -> str:
    bad = [name for name, one in records.items() if one["status"] != OK]
    return "all pass" if not bad else f"not all right: {', '.join(bad)}"


def render(records: dict[str, Record]) -> str:
    parts = [
        table(["", "", "outcome"], [[name, one["status"], one["summary"]] for name, one in records.items()], text=True)
    ]
    for name, one in records.items():
        failed = one.get("data", {}).get("failed", [])
        if failed:
            lines = "\n".join(f"* `{test}`: {text.splitlines()[0] if text else ''}" for test, text in failed[:40])
            more = f"\n* and {len(failed) - 40} more" if len(failed) > 40 else ""
            parts.append(f"Failures in “{name}”:\n\n{lines}{more}\n")
        skips = one.get("data", {}).get("skips", {})
        if skips:
            ordered = sorted(skips.items(), key=lambda pair: -pair[1])
            parts.append(f"Skips in “{name}”:\n\n" + "\n".join(f"* {count}: {why}" for why, count in ordered) + "\n")
    return "\n".join(parts)


def expected(records: dict[str, Record]) -> list[str]:
    return not_ok(records)
