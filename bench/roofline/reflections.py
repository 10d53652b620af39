# SPDX-License-Identifier: Apache-2.0
"""Modelled times of the Householder ops beside the least HBM traffic and beside plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.kernels.counts import Reflections
from bench.roofline import householder, model
from bench.roofline.devices import LAUNCH_GAP, Device

Record = dict[str, Any]
OPS = ("householder", "householder_backward")
# features, tokens, rank
SIZES = ((4096, 8192, 8), (4096, 8192, 32), (4096, 8192, 128), (3072, 3072, 32), (9216, 4608, 32))


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def record(op: str, n: int, T: int, rank: int, device: Device, dtype: str = "bfloat16") -> Record:
    """Microseconds, all modelled."""
    case = Reflections(op, n, rank, T, dtype)
    times = model.times(case, device)
    seconds = model.seconds([t.work for t in times], device)
    floors = householder.floors(case, device)
    highest = max(floors.values())
    torchs = householder.plain_seconds(case, device, LAUNCH_GAP)
    return {
        "label": "modelled",
        "device": device.name,
        "op": op,
        "impl": "native",
        "dtype": dtype,
        "n": n, "T": T, "rank": rank,
        "modelled_us": _us(seconds),
        "floors_us": {name: _us(value) for name, value in floors.items()},
        "floor_us": _us(highest),
        "over_floor": round(seconds / highest, 3),
        "plain_us": {name: _us(value) for name, value in torchs.items()},
        "bound": max(times, key=lambda t: t.seconds()).bound,
        "kernels": [
            {
                "kernel": t.work.kernel,
                "modelled_us": _us(t.seconds()),
                "bound": t.bound,
                "parts_us": {name: _us(value) for name, value in t.parts.items()},
                "grid": t.work.grid,
                "rounds": t.work.rounds,
                "blocks_per_sm": t.work.per_sm,
                "hbm_bytes": round(t.work.hbm_bytes),
                "l2_bytes": round(t.work.l2_bytes),
            }
            for t in times
        ],
    }  # fmt: skip


def records(devices: Sequence[Device]) -> Iterator[Record]:
    for n, T, rank in SIZES:
        for device in devices:
            for op in OPS:
                yield record(op, n, T, rank, device)


def table(found: Sequence[Record]) -> str:
    """A row for each size and op, a column for each device: us (x the floor; plain torch in float32, in 16 bits)."""
    devices = list(dict.fromkeys(r["device"] for r in found))
    lines = ["| n, T, rank | op |" + "".join(f" {name} |" for name in devices), "|---|---|" + "--:|" * len(devices)]
    by_key: dict[tuple[int, int, int, str], dict[str, Record]] = {}
    for r in found:
        by_key.setdefault((r["n"], r["T"], r["rank"], r["op"]), {})[r["device"]] = r
    for (n, T, rank, op), mine in by_key.items():
        cells = [
            f" {r['modelled_us']:.0f} ({r['over_floor']:.2f}; {r['plain_us']['torch_float32']:.0f},"
            f" {r['plain_us']['torch_16_bits']:.0f}) |"
            for r in (mine[name] for name in devices)
        ]
        lines.append(f"| {n}, {T}, {rank} | {op} |" + "".join(cells))
    return "\n".join(lines)
