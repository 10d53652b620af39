# SPDX-License-Identifier: Apache-2.0
"""Stage "micro": one op or layer at a time, device time with cold caches, interleaved, judged before it is timed."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch

from bench._interleave import FLOOR, Contestant, Entry, Group, Settings, Unavailable, measure
from bench._machine import describe
from bench.gpu.clock import make_clock
from bench.gpu.groups import build
from bench.gpu.shapes import jobs
from bench.gpu.stage import FAILED, OK, Item, Mark, Options, Record, not_ok, record, table
from bench.results import Row, make_rows

NAME, TITLE = "micro", "Microbenchmarks"

OURS = ("auto", "native", "native:fma", "triton", "activation", "fold", "materialize", "accelerated", "input", "output")
# Contestants that have no form for a dtype or a device: said in the report, no failure of ours.
OTHER_MAPS = ("lora8", "lora", FLOOR)
RIVALS = ("peft", "torch", "torch:factor", "torch:csr", "torch:dense", "compile", "dense:once", *OTHER_MAPS)


def items(options: Options) -> list[Item]:
    limit = 120.0 if options.dry_run else 900.0
    return [Item(job.id, limit, retry=True) for job in jobs(options.dry_run, options.quick)]


def budget(options: Options) -> float:
    return 1200.0 if options.quick else 3 * 3600.0


TIMING = "the timed rounds"


def _healthy() -> None:
    """RuntimeError where an earlier contestant has left the device broken."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _watched(group: Group, excluded: dict[str, str], mark: Mark) -> Group:
    """Says which contestant is at work; those in ``excluded`` killed a process before and are left out.

    A contestant is named only while the device works: when a kernel's fault has broken it, the name that stands is its.
    """

    def make(entry: Entry) -> Contestant:
        if entry.impl in excluded:
            raise RuntimeError(excluded[entry.impl])
        _healthy()
        mark(entry.impl)
        made = entry.make()
        answers = made.answers
        if answers is not None:

            def and_wait() -> Any:
                got = answers()
                _healthy()
                return got

            made.answers = and_wait
        return made

    def all_made() -> Contestant:
        _healthy()
        mark(TIMING)
        raise Unavailable("no contestant")

    entries = tuple(Entry(entry.impl, lambda entry=entry: make(entry)) for entry in group.entries)
    return dataclasses.replace(group, entries=(*entries, Entry(TIMING, all_made)))


def run(item: str, options: Options, mark: Mark) -> Record:
    job = next(job for job in jobs(options.dry_run, options.quick) if job.id == item)
    device = torch.device(options.device)
    clock = make_clock(options.device)
    compile = not options.dry_run and not (options.quick and job.op.endswith("_linear"))
    group = _watched(build(job, device, clock, compile), options.excluded.get(item, {}), mark)
    settings = Settings(0.0, 1, 1, 1) if options.dry_run else Settings(1.0 if options.quick else 2.0, 9, 60, 3)
    results = [result for result in measure(group, clock, settings) if result.impl != TIMING]
    rows = [dataclasses.asdict(row) for row in make_rows(group, results, describe(device), clock.cache)]
    del group
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    data: dict[str, Any] = {"rows": rows, "rate": getattr(job.shape, "rate", 0.0)}
    bad = [f"{r.impl}: {r.status}" for r in results if r.impl in OURS and r.status.startswith(("failed", "wrong"))]
    times = {row["impl"]: float(row["ms"]) for row in rows if row["ms"]}
    if bad:
        return record(FAILED, "; ".join(bad)[:400], **data)
    if not times:
        return record(FAILED, "nothing could be timed", **data)
    return record(OK, _summary(times), **data)


def _summary(times: dict[str, float]) -> str:
    mine = times.get("auto")
    rivals = {name: ms for name, ms in times.items() if name not in (*OURS, *OTHER_MAPS)}
    if mine is None or not rivals:
        return ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    best = min(rivals, key=rivals.__getitem__)
    return f"auto {1e3 * mine:.0f} us; best other: {best} {1e3 * rivals[best]:.0f} us ({rivals[best] / mine:.2f} x)"


def rows_of(records: dict[str, Record]) -> list[tuple[Row, float]]:
    """Every row with its density."""
    found = []
    for one in records.values():
        data = one.get("data", {})
        found += [(Row(**row), float(data.get("rate", 0.0))) for row in data.get("rows", [])]
    return found


def verdict(records: dict[str, Record]) -> str:
    wins = losses = 0
    for one in records.values():
        times = {row["impl"]: float(row["ms"]) for row in one.get("data", {}).get("rows", []) if row["ms"]}
        rivals = [ms for name, ms in times.items() if name not in (*OURS, *OTHER_MAPS)]
        if "auto" in times and rivals:
            wins += times["auto"] <= min(rivals)
            losses += times["auto"] > min(rivals)
    wrong = sum(
        row["status"].startswith("wrong") for one in records.values() for row in one.get("data", {}).get("rows", [])
    )
    return f"fastest of all in {wins} of {wins + losses} groups; {wrong} wrong answers"


def _cell(row: Row | None, best: str) -> str:
    if row is None:
        return ""
    if not row.ms:
        return row.status.split(":")[0]
    text = f"{1e3 * float(row.ms):.0f} ({1e3 * float(row.ms_p20):.0f}–{1e3 * float(row.ms_p80):.0f})"
    return f"**{text}**" if row.impl == best else text


def _best(rows: list[Row]) -> str:
    timed = {row.impl: float(row.ms) for row in rows if row.ms and row.impl not in OTHER_MAPS}
    return min(timed, key=timed.__getitem__) if timed else ""


def render(records: dict[str, Record]) -> str:
    groups: dict[tuple[str, str, str], list[tuple[str, list[Row]]]] = {}
    for one in records.values():
        rows = [Row(**row) for row in one.get("data", {}).get("rows", [])]
        if rows:
            first, rate = rows[0], 100 * float(one["data"].get("rate", 0))
            to = f"{first.n}→{first.m}" if first.op.endswith("_linear") else f"n={first.n}"
            size = f"r={first.rank}" if first.rank else f"{rate:g} %"
            label = f"{first.model} {first.layer}, {to}, T={first.T}, {size}"
            groups.setdefault((first.op, first.mode, first.dtype), []).append((label, rows))
    what = "Microseconds: median (20th to 80th percentile) of interleaved rounds; device time, cold caches"
    if any(row.device == "cpu" for row, _ in rows_of(records)):
        what = "Dry run, CPU, not a result: microseconds of one call on tiny sizes"
    parts = [f"{what}. Bold: the fastest that computes the map. No time without a right answer.\n"]
    for (op, mode, dtype), lines in groups.items():
        columns = list(dict.fromkeys(row.impl for _, rows in lines for row in rows))
        body = []
        for label, rows in lines:
            by, best = {row.impl: row for row in rows}, _best(rows)
            body.append([label, *(_cell(by.get(name), best) for name in columns)])
        parts.append(f"### {op}, {mode}, {dtype}\n\n{table(['', *columns], body)}")
    broken = sorted({(r.impl, r.dtype, r.status) for r, _ in rows_of(records) if r.status != OK})
    if broken:
        lines = [f"* {impl}, {dtype}: {status}" for impl, dtype, status in broken]
        parts.append("No time:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts) + _break_even(records)


def _break_even(records: dict[str, Record]) -> str:
    """The native kernel over the dense product, by density: what the dispatcher's constants should be."""
    lines = []
    for one in records.values():
        rows = {row["impl"]: row for row in one.get("data", {}).get("rows", [])}
        times = {name: float(row["ms"]) for name, row in rows.items() if row["ms"]}
        if not {"native", "dense:once", "torch:dense"} <= set(times) or rows["native"]["op"] != "sparse_core":
            continue
        first, mine = rows["native"], times["native"]
        key = (first["n"], first["T"], first["dtype"], first["mode"], float(one["data"]["rate"]))
        lines.append((key, mine / times["torch:dense"], mine / times["dense:once"], times.get("auto", 0) / mine))
    if not lines:
        return ""
    body = [
        [f"n={n}, T={T}, {dtype}, {mode}", f"{100 * rate:g} %", f"{each:.2f}", f"{once:.2f}", f"{auto:.2f}"]
        for (n, T, dtype, mode, rate), each, once, auto in sorted(lines)
    ]
    head = ["", "density", "kernel / (densify + GEMM)", "kernel / GEMM alone", "auto / kernel"]
    return f"\n### Break-even with the dense product (below 1: sparse wins)\n\n{table(head, body)}"


def expected(records: dict[str, Record]) -> list[str]:
    found = not_ok(records)
    for name, one in records.items():
        for row in one.get("data", {}).get("rows", []):
            if row["status"] != OK or not row["ms"] or row["device"] != "cpu":
                found.append(f"{name}: {row['impl']} on {row['device']}: {row['status']}")
    return found
