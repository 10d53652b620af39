# SPDX-License-Identifier: Apache-2.0
"""One CSV row per (op, implementation, mode, shape, dtype, cache, device, torch, commit).

A file without a column, from before there was one, reads as zeros or nothing there.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench._interleave import OK, Group, Result, percentiles
from bench._machine import ROOT, Machine

FOLDER = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """Times in milliseconds; ``ratio_*`` to the floor of the same round; "" where nothing was measured.

    status is "ok", or why there is no time. error: relative, in norm, against float64, the worst of all answers.
    """

    op: str
    mode: str
    impl: str
    detail: str
    model: str
    layer: str
    m: int
    n: int
    T: int
    nnz: int
    rank: int
    dtype: str
    status: str
    ms: str
    ms_p20: str
    ms_p80: str
    ratio: str
    ratio_p20: str
    ratio_p80: str
    gbps: str
    saved_bytes: str
    peak_bytes: str
    error: str
    rounds: int
    cache: str
    device: str
    machine: str
    threads: int
    torch: str
    commit: str
    time: str

    @property
    def group(self) -> tuple:
        """What rows of one table line have in common."""
        return (self.device, self.machine, self.threads, self.cache, self.op, self.mode, self.dtype, *self.shape)

    @property
    def shape(self) -> tuple:
        return (self.model, self.layer, self.m, self.n, self.T, self.nnz, self.rank)

    @property
    def key(self) -> tuple:
        return (*self.group, self.impl, self.torch, self.commit)


def _three(values: Iterable[float], scale: float, digits: int) -> tuple[str, str, str]:
    samples = list(values)
    if not samples:
        return "", "", ""
    middle, low, high = (f"{scale * value:.{digits}f}" for value in percentiles(samples))
    return middle, low, high


def make_rows(group: Group, results: Iterable[Result], machine: Machine, cache: str) -> list[Row]:
    """The rows of one measured group."""
    shape = group.shape
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    rows = []
    for result in results:
        ms, ratios = _three(result.seconds, 1e3, 4), _three(result.ratios, 1.0, 4)
        gbps = f"{group.min_bytes / float(ms[0]) / 1e6:.2f}" if group.min_bytes and ms[0] else ""
        row = Row(
            group.op,
            group.mode,
            result.impl,
            result.detail,
            shape.model,
            shape.layer,
            shape.m,
            shape.n,
            shape.T,
            shape.nnz,
            getattr(shape, "rank", 0),
            group.dtype_name,
            result.status,
            *ms,
            *ratios,
            gbps,
            "" if result.saved is None else str(result.saved),
            "" if result.peak is None else str(result.peak),
            "" if result.error is None else f"{result.error:.3g}",
            len(result.seconds),
            cache,
            machine.device,
            machine.name,
            machine.threads,
            machine.torch,
            machine.commit,
            now,
        )
        rows.append(row)
    return rows


def read(path: Path) -> list[Row]:
    types = {field.name: int if field.type == "int" else str for field in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        return [Row(**{name: kind(line.get(name) or kind()) for name, kind in types.items()}) for line in lines]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Add ``rows`` to the file; a row with the same key is replaced."""
    kept = {row.key: row for row in (read(path) if path.exists() else [])}
    for row in rows:
        kept[row.key] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".csv.part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in kept.values())
    partial.replace(path)


def latest(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Group -> the rows of its newest measurement (one group is always measured as a whole)."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        members = groups.setdefault(row.group, [])
        if members and row.time > members[0].time:
            members.clear()
        if not members or row.time == members[0].time:
            members.append(row)
    return groups


def measured(row: Row) -> bool:
    return row.status == OK and row.ms != ""
