# SPDX-License-Identifier: Apache-2.0
"""Bars of the ratio to the floor, one cluster per shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench._interleave import FLOOR
from bench._machine import slug
from bench.results import Row, measured

COLOURS = {
    "peft": "#b0413e",
    "torch": "#c98b3c",
    "torch:csr": "#c98b3c",
    "torch:dense": "#8f7a4a",
    "compile": "#7d8a5c",
    "auto": "#20639b",
    "frodkernels": "#20639b",
    "accelerated": "#6fa8d6",
    "lora8": "#a0a0a0",
}
SKIPPED = (FLOOR, "activation", "fold", "materialize")
LOGARITHMIC = 12.0  # from this ratio on


def _file_name(row: Row) -> str:
    cold = ["cold"] if row.cache == "cold" and row.device == "cpu" else []
    return "-".join([row.op, row.mode, row.dtype, slug(row.device, row.machine, row.threads), *cold]) + ".png"


def _tick(row: Row) -> str:
    if row.op == "sparse_core":  # it does not know m
        return f"n={row.n}\nT={row.T}"
    return f"{row.model}\n{row.layer}\n{row.n}→{row.m}, T={row.T}"


def plot(groups: Sequence[list[Row]], folder: Path, title: str, labels: Mapping[str, str]) -> Path | None:
    """Draw one figure; None without matplotlib or without a floor to refer to."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    present = {row.impl for rows in groups for row in rows if measured(row) and row.ratio}
    impls = [impl for impl in labels if impl in present and impl not in SKIPPED]
    if not impls:
        return None
    figure = Figure(figsize=(max(7.0, 1.5 + 1.35 * len(groups)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.84 / len(impls)
    highest = 1.0
    for i, impl in enumerate(impls):
        offset = (i - (len(impls) - 1) / 2) * width
        for cluster, rows in enumerate(groups):
            row = next((r for r in rows if r.impl == impl and measured(r) and r.ratio), None)
            if row is None:
                continue
            ratio, low, high = float(row.ratio), float(row.ratio_p20), float(row.ratio_p80)
            highest = max(highest, high)
            label = labels[impl].strip("*") if cluster == 0 else None
            spread = [[max(ratio - low, 0.0)], [max(high - ratio, 0.0)]]
            axes.bar(
                cluster + offset,
                ratio,
                width,
                color=COLOURS.get(impl, "#555555"),
                label=label,
                yerr=spread,
                error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
            )
            axes.annotate(
                f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}",
                (cluster + offset, high),
                ha="center",
                va="bottom",
                fontsize=6,
                xytext=(0, 1),
                textcoords="offset points",
            )
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    if highest >= LOGARITHMIC:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
    axes.set_ylabel("time / floor")
    axes.set_xticks(range(len(groups)))
    axes.set_xticklabels([_tick(rows[0]) for rows in groups], fontsize=7)
    first = groups[0][0]
    threads = f", {first.threads} threads" if first.device == "cpu" else ""
    axes.set_title(f"{title}\n{first.machine}{threads}, torch {first.torch}", fontsize=9)
    axes.legend(fontsize=7, ncols=min(len(impls), 4), frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _file_name(first)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
