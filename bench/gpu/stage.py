# SPDX-License-Identifier: Apache-2.0
"""What a stage is: a module with these names. Records travel as JSON, so they hold plain values only.

NAME, TITLE            short name for ``--only``, heading in the report
items(options)         -> list[Item]: what the stage does, most important first
run(item, options, mark)
                       -> Record: does one item, in a child process; ``mark(text)`` says what it is at, so that whoever
                       finds the process dead knows what killed it
budget(options)        -> seconds for the whole stage; what has not begun by then is recorded as "not run"
verdict(records)       -> one line for the table at the top of the report
render(records)        -> the stage's section of the report, Markdown
expected(records)      -> for a dry run: what is not as it should be, one sentence each
AGAIN                  optional: True where results are never kept, for they depend on other stages
inputs(report)         -> optional: what the stage needs from the stages before it, put into ``options.inputs``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

OK = "ok"  # did what it should and found nothing wrong
FAILED = "failed"  # ran to its end and found something wrong
CRASHED = "crashed"  # its process died
TIMEOUT = "timeout"  # was stopped at its time limit
UNAVAILABLE = "unavailable"  # something it needs is not there; the summary says what
NOT_RUN = "not run"  # its turn did not come
KEPT = (OK, FAILED)  # results: an interrupted run that goes on does not repeat them


class Unavailable(Exception):
    """Something an item needs is not there; the message says what."""


Record = dict[str, Any]  # status, summary, data; tail and seconds are added by the runner
Mark = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Item:
    """``seconds``: its time limit. ``alone``: in a process of its own. ``retry``: after a crash, once more without what
    it was at (``options.excluded[id]`` then holds {mark: what happened})."""

    id: str
    seconds: float
    alone: bool = False
    retry: bool = False


@dataclasses.dataclass
class Options:
    """What the command line asked for; the same for every stage."""

    dry_run: bool = False
    quick: bool = False
    device: str = "cuda"
    models: str = ""
    steps: int = 0  # of training; 0: the stage's own choice
    scale: float = 1.0  # every time limit is multiplied by it
    excluded: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Options:
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def record(status: str, summary: str, **data: Any) -> Record:
    return {"status": status, "summary": summary, "data": data}


def table(header: Sequence[str], lines: Sequence[Sequence[object]], text: bool = False) -> str:
    """A Markdown table; the first column is text, the others are numbers (or ``text`` too)."""
    rule = ["---"] + ["---" if text else "---:"] * (len(header) - 1)
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (header, rule, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def counts(records: dict[str, Record]) -> str:
    """ "3 ok, 1 crashed"."""
    found: dict[str, int] = {}
    for one in records.values():
        found[one["status"]] = found.get(one["status"], 0) + 1
    return ", ".join(f"{number} {status}" for status, number in found.items()) or "nothing"


def not_ok(records: dict[str, Record], allowed: Sequence[str] = (OK,)) -> list[str]:
    return [
        f"{name}: {one['status']}: {one['summary']}" for name, one in records.items() if one["status"] not in allowed
    ]


def tails(records: dict[str, Record]) -> str:
    """The ends of the outputs of what went wrong."""
    parts = []
    for name, one in records.items():
        if one["status"] in (OK, NOT_RUN):
            continue
        parts.append(f"**{name}**: {one['status']}: {one['summary']}\n")
        tail = one.get("tail", "").strip("\n").replace("```", "'''")
        if tail:
            parts.append(f"```text\n{tail}\n```\n")
    return "\n".join(parts)
