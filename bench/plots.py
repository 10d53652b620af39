# SPDX-License-Identifier: Apache-2.0
"""Bars of the ratio to the floor, one cluster per shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench._interleave import FLOOR
from bench._machine import slug
from bench.names import CONTEXT, PATHS, tick
from bench.results import Row, measured

COLOURS = {
    "peft": "#b0413e",
    "torch": "#c98b3c",
    "torch:factor": "#8f7a4a",
    "torch:csr": "#c98b3c",
    "torch:dense": "#8f7a4a",
    "torch:weight": "#8f7a4a",
    "torch:clone": "#c98b3c",
    "torch:partial": "#8f7a4a",
    "compile": "#7d8a5c",
    "auto": "#20639b",
    "frodkernels": "#20639b",
    "accelerated": "#6fa8d6",
    "lora8": "#a0a0a0",
    "lora16": "#c4c4c4",
    "lora": "#a0a0a0",
}
SKIPPED = (FLOOR, *PATHS, *CONTEXT)
LOGARITHMIC = 12.0  # from this ratio on


def _file_name(row: Row) -> str:
    cold = ["cold"] if row.cache == "cold" and row.device == "cpu" else []
    return (
        "-".join([row.op, row.mode, row.dtype.replace("+", "-"), slug(row.device, row.machine, row.threads), *cold])
        + ".png"
    )


def _colour(impl: str) -> str:
    return COLOURS.get(impl, "#555555")


def _timed(rows: Sequence[Row], impl: str) -> Row | None:
    return next((row for row in rows if row.impl == impl and measured(row) and row.ratio), None)


def _bars(axes: Any, groups: Sequence[list[Row]], impls: Sequence[str]) -> float:
    """A cluster of bars per group, percentiles as whiskers; returns how high they reach."""
    width = 0.84 / len(impls)
    highest = 1.0
    for i, impl in enumerate(impls):
        for cluster, rows in enumerate(groups):
            row = _timed(rows, impl)
            if row is None:
                continue
            x = cluster + (i - (len(impls) - 1) / 2) * width
            ratio, low, high = float(row.ratio), float(row.ratio_p20), float(row.ratio_p80)
            highest = max(highest, high)
            spread = [[max(ratio - low, 0.0)], [max(high - ratio, 0.0)]]
            whisker = {"elinewidth": 0.8, "ecolor": "#333333"}
            axes.bar(x, ratio, width, color=_colour(impl), yerr=spread, error_kw=whisker)
            text = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
            place = {"xytext": (0, 1), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(text, (x, high), fontsize=6, **place)
    return highest


def plot(groups: Sequence[list[Row]], folder: Path, title: str, labels: Mapping[str, str]) -> Path | None:
    """Draw one figure; None without matplotlib or without a floor to refer to."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        return None
    impls = [impl for impl in labels if impl not in SKIPPED and any(_timed(rows, impl) for rows in groups)]
    if not impls:
        return None
    figure = Figure(figsize=(max(7.0, 1.5 + 1.35 * len(groups)), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    highest = _bars(axes, groups, impls)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    if highest >= LOGARITHMIC:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
    axes.set_ylabel("time / floor")
    axes.set_xticks(range(len(groups)), [tick(rows[0]) for rows in groups], fontsize=7)
    first = groups[0][0]
    threads = f", {first.threads} threads" if first.device == "cpu" else ""
    axes.set_title(f"{title}\n{first.machine}{threads}, torch {first.torch}", fontsize=9)
    patches = [Patch(color=_colour(impl), label=labels[impl].strip("*")) for impl in impls]
    figure.legend(handles=patches, loc="outside lower center", fontsize=7, ncols=len(impls), frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _file_name(first)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
