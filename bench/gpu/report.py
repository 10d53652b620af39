# SPDX-License-Identifier: Apache-2.0
"""The report: one Markdown file for people, with the whole data as a JSON block at its end.

The JSON block is also the state of the run: ``load`` reads it back from the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.stage import NOT_RUN, counts, table, tails

FORMAT = 1
_OPEN, _CLOSE = "<!-- data -->\n```json\n", "\n```\n<!-- end of data -->\n"

Report = dict[str, Any]  # format, header, stages: {name: {item: record}}


def empty(header: dict[str, Any]) -> Report:
    return {"format": FORMAT, "header": header, "stages": {}}


def _records(report: Report, name: str) -> dict[str, Any]:
    return report["stages"].get(name, {})


def _verdict(module: Any, records: dict[str, Any]) -> str:
    if not records:
        return NOT_RUN
    try:
        return module.verdict(records)
    except Exception as fault:  # a record of an unforeseen form must not cost the report
        return f"no verdict ({type(fault).__name__}: {fault})"


def _section(module: Any, records: dict[str, Any]) -> str:
    try:
        return module.render(records)
    except Exception as fault:
        return f"This section could not be written ({type(fault).__name__}: {fault}); its data is in the block below.\n"


def render(report: Report, modules: Sequence[Any]) -> str:
    header = report["header"]
    parts = ["<!-- SPDX-License-Identifier: Apache-2.0 -->\n# frodkernels on a GPU\n"]
    if header.get("dry_run"):
        parts.append("**Dry run on a CPU: no number in this file is a result.**\n")
    facts = [
        [name, header[name]]
        for name in ("machine", "commit", "torch", "started", "updated", "command")
        if name in header
    ]
    parts.append(table(["", ""], facts, text=True))
    parts.append("## Verdicts\n")
    parts.append("The file to send back is this one; everything in it is also in the data block at its end.\n")
    lines = []
    for module in modules:
        records = _records(report, module.NAME)
        seconds = sum(one.get("seconds", 0.0) for one in records.values())
        lines.append([module.NAME, _verdict(module, records), counts(records), f"{seconds:.0f} s"])
    parts.append(table(["stage", "verdict", "items", "time"], lines, text=True))
    for module in modules:
        records = _records(report, module.NAME)
        parts.append(f"## {module.TITLE}\n")
        parts.append(_section(module, records) if records else f"{NOT_RUN}.\n")
        ends = tails(records)
        if ends:
            parts.append(f"### What went wrong in “{module.NAME}”\n\n{ends}")
    parts.append("## Data\n")
    data = json.dumps(report, indent=None, separators=(",", ":"), default=str)
    return "\n".join(parts) + "\n" + _OPEN + data + _CLOSE


def write(path: Path, report: Report, modules: Sequence[Any]) -> None:
    """Whole or not at all: a run that is killed leaves the report as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(render(report, modules), encoding="utf-8")
    os.replace(partial, path)


def load(path: Path) -> Report:
    """The data of a report.

    Raises:
        ValueError: the file is no report, or of another format.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = text.rfind(_OPEN), text.rfind(_CLOSE)
    if begin < 0 or end < begin:
        raise ValueError(f"{path} holds no data block of a report")
    report = json.loads(text[begin + len(_OPEN) : end])
    if report.get("format") != FORMAT:
        raise ValueError(f"{path} is a report of format {report.get('format')}, not {FORMAT}")
    return report
