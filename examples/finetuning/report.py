# SPDX-License-Identifier: Apache-2.0
"""From the workers' numbers to the summary, the table and the plot."""

from __future__ import annotations

import os
import platform
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .settings import (
    FRODKERNELS,
    FRODKERNELS_HRA,
    FRODKERNELS_SHIRA,
    LORA,
    PAIRS,
    PEFT_FROD,
    PEFT_HRA,
    PEFT_SHIRA,
    Settings,
)

NAMES = {
    LORA: "LoRA",
    PEFT_FROD: "FRoD, plain PEFT",
    FRODKERNELS: "FRoD, frodkernels",
    PEFT_HRA: "HRA, plain PEFT",
    FRODKERNELS_HRA: "HRA, frodkernels",
    PEFT_SHIRA: "SHiRA, plain PEFT",
    FRODKERNELS_SHIRA: "SHiRA, frodkernels",
}
COLOURS = {
    LORA: "#7f7f7f",
    PEFT_FROD: "#d95f02",
    FRODKERNELS: "#1b6ca8",
    PEFT_HRA: "#e6ab02",
    FRODKERNELS_HRA: "#4b8b3b",
    PEFT_SHIRA: "#c994c7",
    FRODKERNELS_SHIRA: "#6a3d9a",
}

REPORT_WIDTH = 110

Summary = dict[str, Any]


def summarise(settings: Settings, results: dict[str, dict[str, Any]], timing: dict[str, Any] | None) -> Summary:
    """One JSON-able record of the run: settings, machine, one row per method, the curves, and their agreement."""
    rows = {method: _row(method, result, timing) for method, result in results.items()}
    summary: Summary = {
        "settings": settings.to_json(),
        "machine": machine(),
        "rows": rows,
        "timing": timing,
        "majority_share": next(iter(results.values()))["majority_share"],
        "runs": results,
        "agreement": {},
    }
    for adapter, (plain, ours) in PAIRS.items():
        if plain in results and ours in results:
            summary["agreement"][adapter] = _agreement(results[plain], results[ours])
    return summary


def _agreement(plain: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """How far apart the same training went in PEFT and on frodkernels."""
    difference = [abs(a - b) for a, b in zip(plain["losses"], ours["losses"], strict=True)]
    return {
        "loss_difference": difference,
        "max_loss_difference": max(difference),
        "accuracy_difference": abs(plain["accuracy"] - ours["accuracy"]),
    }


def _row(method: str, result: dict[str, Any], timing: dict[str, Any] | None) -> dict[str, Any]:
    """The table's numbers for one method. Times come from the turns where they were taken."""
    step_ms = timing["step_ms"][method] if timing else result["step_ms"]
    eval_ms = timing["eval_batch_ms"][method] if timing else result["eval_batch_ms"]
    return {
        "init_s": result["init_s"],
        "step_ms": statistics.median(step_ms),
        "step_ratio": timing["step_ratio"][method] if timing else None,
        "eval_s": sum(eval_ms) / 1e3,
        "eval_ratio": timing["eval_ratio"][method] if timing else None,
        "peak_memory_mb": result["peak_memory_mb"],
        "peak_above_base_mb": result["peak_above_base_mb"],
        "trainable_parameters": result["trainable_parameters"],
        "accuracy": result["accuracy"],
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    versions = {}
    for package in ("torch", "peft", "transformers", "frodkernels"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"cpu": name, "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}


def print_table(summary: Summary, console: Console | None = None) -> None:
    """The table, and below it what a reader needs to trust it."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=REPORT_WIDTH)  # a log file has no width to fit
    timing = summary["timing"]
    against = f"× {NAMES[timing['ratios_to']]}" if timing else None
    settings = summary["settings"]
    title = (
        f"{settings['steps']} steps of {settings['batch_size']} texts, up to {settings['sequence_length']} tokens, "
        f"{settings['dtype']}, {settings['device']}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    headings = ["init s", "step ms", against, "eval s", against, "peak MB", "above base MB", "trainable", "accuracy"]
    for heading in headings:
        if heading is not None:
            table.add_column(heading, justify="right")
    for method, row in summary["rows"].items():
        cells = [
            f"{row['init_s']:.2f}",
            f"{row['step_ms']:.0f}",
            f"{row['step_ratio']:.2f}" if timing else None,
            f"{row['eval_s']:.2f}",
            f"{row['eval_ratio']:.2f}" if timing else None,
            f"{row['peak_memory_mb']:.0f}",
            f"{row['peak_above_base_mb']:.0f}",
            f"{row['trainable_parameters']:,}",
            f"{100 * row['accuracy']:.1f} %",
        ]
        table.add_row(NAMES[method], *(cell for cell in cells if cell is not None))
    console.print(table)
    console.print(f"always answering the most frequent class: {100 * summary['majority_share']:.1f} %", highlight=False)
    for adapter, agreement in summary["agreement"].items():
        console.print(
            f"largest difference between the two {adapter} loss curves: {agreement['max_loss_difference']:.2e}",
            highlight=False,
        )


def plot(summary: Summary, path: Path) -> None:
    """Loss curves over their difference, and the times, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    agreement = summary["agreement"]
    figure = pyplot.figure(figsize=(14, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[3, 1], width_ratios=[1.7, 1.15, 1.15])
    curves = figure.add_subplot(grid[0, 0] if agreement else grid[:, 0])
    _plot_losses(curves, summary)
    if agreement:
        below = figure.add_subplot(grid[1, 0], sharex=curves)
        for adapter, pair in agreement.items():
            steps = range(1, len(pair["loss_difference"]) + 1)
            # A difference of exactly zero has no place on a log axis; 1e-9 lies below anything float32 can show.
            heights = [max(value, 1e-9) for value in pair["loss_difference"]]
            below.semilogy(steps, heights, color=COLOURS[PAIRS[adapter][1]], lw=1, label=adapter)
        below.legend(fontsize=7)
        below.set_ylabel("|PEFT − ours|")
        below.set_xlabel("training step")
        below.grid(alpha=0.3)
        curves.tick_params(labelbottom=False)
    else:
        curves.set_xlabel("training step")
    _plot_bars(figure.add_subplot(grid[:, 1]), summary, ("step_ms", "step_ratio"), "training step, ms", ".0f")
    _plot_bars(figure.add_subplot(grid[:, 2]), summary, ("eval_s", "eval_ratio"), "evaluation, s", ".2f")
    settings, where = summary["settings"], summary["machine"]
    figure.suptitle(
        f"{Path(settings['model']).parent.name}/{Path(settings['model']).name}, {settings['dtype']}, "
        f"{settings['device']} ({where['cpu']}, {where['cores']} cores)",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _plot_losses(axes: Any, summary: Summary) -> None:
    # PEFT's curve is drawn broad and ours thin and dashed on top, so that both show where they coincide.
    styles: dict[str, dict[str, Any]] = {LORA: {"lw": 1.5}}
    for plain, ours in PAIRS.values():
        styles |= {plain: {"lw": 5, "alpha": 0.55}, ours: {"lw": 1.5, "ls": "--"}}
    for method, result in summary["runs"].items():
        steps = range(1, len(result["losses"]) + 1)
        axes.plot(steps, result["losses"], label=NAMES[method], color=COLOURS[method], **styles[method])
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_bars(axes: Any, summary: Summary, keys: tuple[str, str], title: str, spec: str) -> None:
    """One bar per method: the first key's number, and below it the second key's ratio where there is one."""
    rows, (value, ratio) = summary["rows"], keys
    heights = [row[value] for row in rows.values()]
    bars = axes.bar([NAMES[method].replace(", ", ",\n") for method in rows], heights)
    for bar, method in zip(bars, rows, strict=True):
        bar.set_color(COLOURS[method])
        times = f"\n{rows[method][ratio]:.2f}×" if rows[method][ratio] is not None else ""
        text = f"{rows[method][value]:{spec}}{times}"
        axes.annotate(text, (bar.get_x() + bar.get_width() / 2, bar.get_height()), ha="center", va="bottom")
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(0, 1.18 * max(heights))
    axes.set_title(title, fontsize=10)
