# SPDX-License-Identifier: Apache-2.0
"""Where dense blocks are modelled faster than an inner product an entry, in sampled products.

What each kernel asks of each resource is counted at two densities and continued on a line, as in ``dispatch``; that of
blocks, which have more splits where there are few entries, not below the lower density.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.kernels.counts import Sampling
from bench.roofline import model
from bench.roofline.devices import DEVICES, Device
from bench.roofline.dispatch import between, crossing

Record = dict[str, Any]
DTYPES = ("bfloat16", "float32", "float64")  # float16: as bfloat16, to the last count but for the type's name
SIZES = ((2048, 1024), (2048, 8192), (4096, 1024), (4096, 4096), (4096, 8192))  # features, tokens
CHOSEN = (4096, 4096)  # what frodkernels/ops/sampled_way_gpu.py holds
ENTRIES, BLOCKS = (0.01, 0.03), {"bfloat16": (0.05, 0.15), "float32": (0.2, 0.3), "float64": (0.2, 0.3)}  # counted
# Multiply-adds of float64 a clock and SM (programming guide; B200 assumed as H100): disassembly is read for float32's.
WIDE_LANES = {80: 32, 90: 64, 89: 2, 100: 64}


def _seconds(
    case_at: Callable[[float], Sampling], densities: tuple[float, float], device: Device, least: float = -1.0
) -> Callable[[float], float]:
    low, high = (model.works(case_at(density), device) for density in densities)

    def seconds(density: float) -> float:
        share = max((density - densities[0]) / (densities[1] - densities[0]), least)
        return model.seconds([between(a, b, share) for a, b in zip(low, high, strict=True)], device)

    return seconds


def _wide(dtype: str, products: float, T: int, device: Device) -> float:
    """Seconds that multiply-adds of float64 take."""
    if dtype != "float64":
        return 0.0
    return products * T / (WIDE_LANES[device.arch] * device.sms * device.clock)


def ways(n: int, T: int, dtype: str, device: Device) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """density -> seconds: the faster kernel for entries, and blocks."""

    def case(tiled: bool, tiles: bool) -> Callable[[float], Sampling]:
        return lambda density: Sampling(n, int(n * n * density), T, dtype, tiled, tiles=tiles)

    plans = (True, False) if dtype == "bfloat16" else (False,)
    entries = [_seconds(case(False, tiles), ENTRIES, device) for tiles in plans]
    blocks = _seconds(case(True, False), BLOCKS[dtype], device, 0.0)
    return (
        lambda density: max(min(way(density) for way in entries), _wide(dtype, density * n * n, T, device)),
        lambda density: max(blocks(density), _wide(dtype, n * n, T, device)),
    )


def record(n: int, T: int, dtype: str, device: Device) -> Record:
    """The density from which on blocks are modelled faster, and microseconds there; 1.0: never."""
    entries, blocks = ways(n, T, dtype, device)
    density = crossing(lambda d: blocks(d) - entries(d))
    return {
        "label": "modelled",
        "device": device.name,
        "dtype": dtype,
        "n": n, "T": T,
        "density": round(density, 3),
        "entries_us": {str(d): round(1e6 * entries(d), 1) for d in (0.001, 0.01, 0.1)},
        "blocks_us": {str(d): round(1e6 * blocks(d), 1) for d in (0.001, 0.01, 0.1)},
    }  # fmt: skip


def records(devices: Sequence[Device] = DEVICES) -> Iterator[Record]:
    for dtype in DTYPES:
        for n, T in SIZES:
            for device in devices:
                yield record(n, T, dtype, device)


def table(found: Sequence[Record]) -> str:
    """Break-even densities (us of entries at 1 %; of blocks at 10 %), a column for each device."""
    devices = list(dict.fromkeys(r["device"] for r in found))
    lines = ["| dtype | n, T |" + "".join(f" {name} |" for name in devices), "|---|---|" + "--:|" * len(devices)]
    rows: dict[tuple[str, int, int], dict[str, Record]] = {}
    for r in found:
        rows.setdefault((r["dtype"], r["n"], r["T"]), {})[r["device"]] = r
    for (dtype, n, T), mine in rows.items():
        cells = (
            f" {r['density']:.3f} ({r['entries_us']['0.01']:.0f}; {r['blocks_us']['0.1']:.0f}) |"
            for r in (mine[name] for name in devices)
        )
        lines.append(f"| {dtype} | {n}, {T} |" + "".join(cells))
    return "\n".join(lines)
