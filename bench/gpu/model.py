# SPDX-License-Identifier: Apache-2.0
"""Stage "model": what bench/roofline modelled, beside what stage "micro" measured.

Modelled numbers are labelled as such wherever they stand. The model's records come from ``python -m bench.roofline
--json``: each has a device, the op or kernel, n, T, nnz, perhaps mode and dtype, and ``modelled_us``.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from typing import Any

from bench._machine import ROOT
from bench.gpu.stage import OK, Item, Mark, Options, Record, Unavailable, not_ok, record, table

NAME, TITLE = "model", "Model against measurement"
AGAIN = True

Pair = dict[str, Any]
MODES = ("forward", "transpose", "parameters", "backward")
# The parts that the model's constants describe, by their names in the driver: PCIe and NVL cards, other memories,
# mobile and cut-down chips, and slices of a card are other devices.
PARTS = {
    "A100": r"A100-SXM\d?-80GB",
    "H100": r"H100 (SXM\d? )?80GB HBM3",
    "L40S": r"L40S",
    "RTX 4090": r"RTX 4090",
    "B200": r"B200",
}
SHORT = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16", "f32": "float32", "fp32": "float32"}


def items(options: Options) -> list[Item]:
    return [Item("comparison", 600, alone=True)]


def budget(options: Options) -> float:
    return 700.0


def inputs(report: dict[str, Any]) -> dict[str, Any]:
    """The sparse core's rows of stage "micro", and the machine's name and compute capability."""
    records = report["stages"].get("micro", {})
    rows = [
        row for one in records.values() for row in one.get("data", {}).get("rows", []) if row["op"] == "sparse_core"
    ]
    gpus = report["stages"].get("machine", {}).get("gpu", {}).get("data", {}).get("devices", [])
    capability = 10 * gpus[0]["major"] + gpus[0]["minor"] if gpus else None
    return {"rows": rows, "machine": report["header"].get("machine", ""), "capability": capability}


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
    """What the record's time is of, in the words of stage "micro"."""
    mode = str(one.get("mode", one.get("op", "")))
    return mode if mode in MODES else None


def is_this(device: str, machine: str) -> bool:
    """Whether the model's ``device`` ("A100") is the part that the driver names ("NVIDIA A100-SXM4-80GB")."""
    return device in PARTS and re.fullmatch(rf"(NVIDIA )?(GeForce )?({PARTS[device]})", machine.strip()) is not None


def nearest(devices: list[str], machine: str, capability: int | None) -> str:
    """The model's device that is most like the machine: of its name, else of its generation; "none" without one."""
    from bench.roofline.devices import BY_NAME

    alike = [name for name in devices if re.search(rf"\b{re.escape(name)}\b", machine)]
    if capability is not None:
        alike += [name for name in devices if name in BY_NAME and BY_NAME[name].arch == capability]
        alike += [name for name in devices if name in BY_NAME and BY_NAME[name].arch // 10 == capability // 10]
    return alike[0] if alike else "none"


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
    line = [sys.executable, "-m", "bench.roofline", "--json"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=options.scale * 500)
    if done.returncode:
        raise RuntimeError(f"bench.roofline ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    records = read_records(done.stdout)
    rows, machine = options.inputs.get("rows", []), options.inputs.get("machine", "")
    pairs = join(records, rows, machine)
    devices = sorted({str(one.get("device", "?")) for one in records})
    data = {"pairs": pairs, "modelled": len(records), "measured": len(rows), "devices": devices}
    if not any(is_this(device, machine) for device in devices):
        like = nearest(devices, machine, options.inputs.get("capability"))
        return record(OK, f"{len(records)} modelled times, none of this device; nearest model: {like}", **data)
    if not pairs:
        return record(OK, f"{len(records)} modelled times, none for what was measured here", **data)
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
