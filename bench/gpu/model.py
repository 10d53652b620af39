# SPDX-License-Identifier: Apache-2.0
"""Stage "model": what bench/roofline modelled, beside what stage "micro" measured.

Modelled numbers are labelled as such wherever they stand. The model's records come from ``python -m bench.roofline
--json``: each has a device, the op or kernel, n, T, nnz, perhaps mode and dtype, and ``modelled_us``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from bench._machine import ROOT
from bench.gpu.stage import OK, Item, Mark, Options, Record, Unavailable, not_ok, record, table

NAME, TITLE = "model", "Model against measurement"
AGAIN = True

Pair = dict[str, Any]
SHORT = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16", "f32": "float32", "fp32": "float32"}


def items(options: Options) -> list[Item]:
    return [Item("comparison", 600, alone=True)]


def budget(options: Options) -> float:
    return 700.0


def inputs(report: dict[str, Any]) -> dict[str, Any]:
    """The sparse core's rows of stage "micro" and the machine's name."""
    records = report["stages"].get("micro", {})
    rows = [
        row for one in records.values() for row in one.get("data", {}).get("rows", []) if row["op"] == "sparse_core"
    ]
    return {"rows": rows, "machine": report["header"].get("machine", "")}


def read_records(text: str) -> list[dict[str, Any]]:
    """The model's records: a JSON list, an object that holds one, or one object a line."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip().startswith("{")]
    if isinstance(found, dict):
        found = next((value for value in found.values() if isinstance(value, list)), [])
    return [one for one in found if isinstance(one, dict)]


def mode_of(one: dict[str, Any]) -> str | None:
    """forward, backward or transpose; from the record's mode, else from the name of its kernel or op."""
    text = " ".join(str(one.get(key, "")) for key in ("mode", "op", "kernel", "name")).lower()
    if "backward" in text or "gradient" in text:
        return "backward"
    if "transpose" in text:
        return "transpose"
    return "forward" if any(word in text for word in ("forward", "product", "sparse_core")) else None


def is_this(device: str, machine: str) -> bool:
    """Whether the model's device ("A100", "RTX 4090", "H100 SXM") is the machine's ("NVIDIA A100-SXM4-80GB")."""
    words = device.lower().replace("-", " ").split()
    here = machine.lower().replace("-", " ").split()
    return bool(words) and all(word in here for word in words if any(c.isdigit() for c in word))


def serves(one: dict[str, Any], impl: str) -> bool:
    """Whether the model's record is of this implementation: named, told by its tiles, or else the native kernel."""
    named = one.get("implementation", one.get("impl"))
    if named is not None:
        return named == impl
    if "tiles" in one:
        return impl == ("native" if one["tiles"] else "native:fma")
    return impl == "native"


def same_work(one: dict[str, Any], row: dict[str, Any]) -> bool:
    """Mode, n, T, dtype; nnz up to rounding."""
    try:
        sizes = all(int(one[key]) == int(row[key]) for key in ("n", "T"))
        close = abs(int(one["nnz"]) - int(row["nnz"])) <= 2
    except (KeyError, TypeError, ValueError):
        return False
    dtype = str(one.get("dtype", row["dtype"]))
    return sizes and close and SHORT.get(dtype, dtype) == row["dtype"] and mode_of(one) == row["mode"]


def join(records: list[dict[str, Any]], rows: list[dict[str, Any]], machine: str) -> list[Pair]:
    """Measured rows with the model's time for the same work on this device."""
    found: list[Pair] = []
    for row in rows:
        if not row["ms"]:
            continue
        for one in records:
            if "modelled_us" not in one or not is_this(str(one.get("device", "")), machine):
                continue
            if not same_work(one, row) or not serves(one, row["impl"]):
                continue
            measured, modelled = 1e3 * float(row["ms"]), float(one["modelled_us"])
            found.append({
                "kernel": str(one.get("kernel", one.get("op", ""))), "impl": row["impl"], "mode": row["mode"],
                "n": row["n"], "T": row["T"], "nnz": row["nnz"], "dtype": row["dtype"], "measured_us": measured,
                "modelled_us": modelled, "ratio": measured / modelled if modelled else None,
            })  # fmt: skip
    return found


def run(item: str, options: Options, mark: Mark) -> Record:
    if not any((ROOT / "bench" / name).exists() for name in ("roofline.py", "roofline/__main__.py")):
        raise Unavailable("there is no bench.roofline in this tree")
    mark("python -m bench.roofline --json")
    done = subprocess.run(
        [sys.executable, "-m", "bench.roofline", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    if done.returncode:
        raise RuntimeError(f"bench.roofline ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    records = read_records(done.stdout)
    rows = options.inputs.get("rows", [])
    pairs = join(records, rows, options.inputs.get("machine", ""))
    devices = sorted({str(one.get("device", "?")) for one in records})
    data = {"pairs": pairs, "modelled": len(records), "measured": len(rows), "devices": devices}
    if not pairs:
        return record(
            OK, f"{len(records)} modelled times ({', '.join(devices)}), none for what was measured here", **data
        )
    middle = statistics.median(pair["ratio"] for pair in pairs if pair["ratio"])
    return record(OK, f"{len(pairs)} pairs; measured / modelled: median {middle:.2f}", **data)


def verdict(records: dict[str, Record]) -> str:
    return "; ".join(one["summary"] for one in records.values())


def render(records: dict[str, Record]) -> str:
    parts = ["Times in the column “modelled” come from a model and were not measured.\n"]
    for one in records.values():
        parts.append(f"{one['summary']}.\n")
        pairs = one.get("data", {}).get("pairs", [])
        if pairs:
            head = ["", "measured, us", "modelled, us", "measured / modelled"]
            lines = [
                [
                    f"{p['impl']} {p['mode']}, n={p['n']}, T={p['T']}, nnz={p['nnz']}, {p['dtype']} ({p['kernel']})",
                    f"{p['measured_us']:.0f}", f"{p['modelled_us']:.0f}", "" if not p["ratio"] else f"{p['ratio']:.2f}",
                ]
                for p in pairs
            ]  # fmt: skip
            parts.append(table(head, lines))
    return "\n".join(parts)


def expected(records: dict[str, Record]) -> list[str]:
    return not_ok(records, (OK, "unavailable"))
