# SPDX-License-Identifier: Apache-2.0
"""Time of sampling a product over the pattern's density: where the two algorithms cross, measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench._interleave import FLOOR
from bench._machine import slug
from bench.results import Row, measured

ENTRIES, BLOCKS = "entries", "blocks"
STYLES: dict[str, dict[str, Any]] = {
    "frodkernels": {"color": "#20639b", "lw": 6, "alpha": 0.3, "label": "frodkernels: its choice"},
    ENTRIES: {"color": "#20639b", "lw": 1.4, "marker": "o", "ms": 3, "label": "by entries"},
    BLOCKS: {"color": "#4b8b3b", "lw": 1.4, "marker": "s", "ms": 3, "label": "by blocks"},
    FLOOR: {"color": "#b0413e", "lw": 1.4, "ls": "--", "label": "(aᵀb)[pattern]"},
    "onednn": {"color": "#c98b3c", "lw": 1.2, "ls": "--", "label": "the same, product by oneDNN"},
    "torch:csr": {"color": "#8f7a4a", "lw": 1.2, "ls": ":", "label": "torch.sparse.sampled_addmm"},
}

Curve = list[tuple[float, float]]  # (density in per cent, milliseconds), ascending


def curves(groups: Sequence[list[Row]]) -> dict[str, Curve]:
    """Of one shape and dtype."""
    found: dict[str, Curve] = {}
    for rows in groups:
        for row in rows:
            if measured(row):
                found.setdefault(row.impl, []).append((100 * row.nnz / (row.m * row.n), float(row.ms)))
    return {impl: sorted(points) for impl, points in found.items()}


def crossing(entries: Curve, blocks: Curve) -> float | None:
    """The density from which blocks are faster, interpolated between logarithms; None where the curves do not cross."""
    other = dict(blocks)
    gaps = [(math.log(density), math.log(ms / other[density])) for density, ms in entries if density in other]
    for (x0, low), (x1, high) in pairwise(gaps):
        if low < 0 <= high:
            return math.exp(x0 - low * (x1 - x0) / (high - low))
    return None


def _sizes(groups: Sequence[list[Row]]) -> dict[tuple[int, int, int], list[list[Row]]]:
    found: dict[tuple[int, int, int], list[list[Row]]] = {}
    for rows in groups:
        found.setdefault((rows[0].m, rows[0].n, rows[0].T), []).append(rows)
    return found


def break_evens(groups: Sequence[list[Row]]) -> list[str]:
    """A sentence for each size where both algorithms were measured."""
    sentences = []
    for (m, n, T), members in _sizes(groups).items():
        of = curves(members)
        if ENTRIES not in of or BLOCKS not in of:
            continue
        density, others = crossing(of[ENTRIES], of[BLOCKS]), dict(of[BLOCKS])
        if density is not None:
            what = f"by blocks is faster from {density:.2g} % on"
        elif any(ms < others.get(at, math.inf) for at, ms in of[ENTRIES]):
            what = "by entries is faster at every density measured"
        else:
            what = "by blocks is faster at every density measured"
        sentences.append(f"* {m}×{n}, T={T}: {what}")
    return ["Between our two algorithms:\n\n" + "\n".join(sentences) + "\n"] if sentences else []


def draw(groups: Sequence[list[Row]], folder: Path, dtype: str) -> Path | None:
    """A panel for each size; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
    except ImportError:
        return None
    sizes = _sizes(groups)
    figure = Figure(figsize=(max(5.0, 4.3 * len(sizes)), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axes, ((m, n, T), members) in zip(panels, sizes.items(), strict=True):
        of = curves(members)
        for impl, style in STYLES.items():
            if impl in of:
                axes.loglog(*zip(*of[impl], strict=True), **style)
        density = crossing(of.get(ENTRIES, []), of.get(BLOCKS, []))
        if density is not None:
            axes.axvline(density, color="black", lw=0.8, ls=":")
            place = {"xytext": (-3, 4), "textcoords": "offset points", "rotation": 90, "ha": "right", "va": "bottom"}
            axes.annotate(f"{density:.2g} %", (density, axes.get_ylim()[0]), fontsize=7, **place)
        ticks = sorted({point for curve in of.values() for point, _ in curve})
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], fontsize=7)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("density, %")
        axes.set_title(f"{m}×{n}, T={T}", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms")
    first = groups[0][0]
    threads = f", {first.threads} threads" if first.device == "cpu" else ""
    figure.suptitle(f"Sampled product, {dtype}\n{first.machine}{threads}, torch {first.torch}", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=7, ncols=3, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    cold = ["cold"] if first.cache == "cold" and first.device == "cpu" else []
    name = "-".join([first.op, first.dtype, slug(first.device, first.machine, first.threads), *cold])
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
