# SPDX-License-Identifier: Apache-2.0
"""Runs the items of a stage in child processes and makes a record of whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench._machine import ROOT
from bench.gpu.child import POISONED
from bench.gpu.stage import CRASHED, FAILED, NOT_RUN, TIMEOUT, Item, Options, Record, record

START_SECONDS = 180.0  # what a child may take, beside its first item's limit, to import torch and open the device
POLL_SECONDS = 0.05
TAIL_BYTES = 6000
MAX_RETRIES = 6

OnRecord = Callable[[str, Record], None]


def environment(options: Options) -> dict[str, str]:
    """A child's: output at once, no downloads, and in a dry run Triton in its interpreter."""
    env = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONFAULTHANDLER="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="0")
    env["TQDM_DISABLE"] = "1"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if options.dry_run:
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # tiny sizes
    return env


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}"
    name = signal.Signals(-status).name
    return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def dump(process: subprocess.Popen) -> None:
    """Let a process that hangs print where its threads are (faulthandler answers SIGABRT) before it is stopped."""
    try:
        process.send_signal(signal.SIGABRT)
        process.wait(3)
    except subprocess.TimeoutExpired:
        pass


def stop(process: subprocess.Popen) -> None:
    """The child and everything it started: it leads a process group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@dataclass
class _Child:
    """One child process: its files, and what its events have said so far."""

    module: str
    items: Sequence[Item]
    options: Options
    folder: Path
    on_record: OnRecord
    at: Item | None = None
    mark: str = ""
    done: set[str] = field(default_factory=set)
    poisoned: str = ""  # what the device said, where the last item left it broken
    spoilt: Record = field(default_factory=dict)  # that item's record
    _read: int = 0
    _log_start: int = 0
    _began: float = 0.0

    def _tail(self) -> str:
        with open(self.folder / "log", "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - TAIL_BYTES))
            return log.read().decode("utf-8", "replace")

    def _finish(self, item: str, done: Record) -> None:
        done["seconds"] = round(time.monotonic() - self._began, 2)
        if done["status"] == FAILED:
            done["tail"] = self._tail()
        self.done.add(item)
        self.at, self.mark = None, ""
        self.on_record(item, done)

    def _events(self) -> None:
        with open(self.folder / "events", encoding="utf-8") as file:
            file.seek(self._read)
            while (line := file.readline()).endswith("\n"):
                self._read = file.tell()
                event = json.loads(line)
                if "begin" in event:
                    self.at = next(item for item in self.items if item.id == event["begin"])
                    self.mark, self._began = "", time.monotonic()
                    self._log_start = event["log"]
                elif "mark" in event:
                    self.mark = event["mark"]
                elif "fault" in event:
                    self.poisoned, self.spoilt = event["fault"], event["record"]
                else:
                    self._finish(event["end"], event["record"])

    def run(self) -> Record | None:
        """Until the process ends. A record of what befell the item it was at; None where it finished them all."""
        job = {"module": self.module, "items": [item.id for item in self.items], "options": asdict(self.options)}
        (self.folder / "job").write_text(json.dumps(job), encoding="utf-8")
        (self.folder / "events").touch()
        command = [sys.executable, "-m", "bench.gpu.child", str(self.folder / "job"), str(self.folder / "events")]
        self._began = time.monotonic()
        with open(self.folder / "log", "wb") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(self.options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while True:
                status = process.poll()
                self._events()
                if status is not None:
                    break
                limit = self.at.seconds if self.at else START_SECONDS
                if time.monotonic() - self._began > self.options.scale * limit:
                    dump(process)
                    where = "" if self.at else " while it started"
                    return self._fate(TIMEOUT, f"stopped after {self.options.scale * limit:.0f} s{where}")
                time.sleep(POLL_SECONDS)
        finally:
            stop(process)
        if self.at is None and len(self.done) == len(self.items):
            return None
        if status == POISONED and self.poisoned:
            return self._fate(CRASHED, f"the device failed: {self.poisoned}")
        return self._fate(CRASHED, _how_it_ended(status))

    def _fate(self, status: str, summary: str) -> Record:
        fate = record(status, f"{summary}, at {self.mark}" if self.mark else summary, **self.spoilt.get("data", {}))
        fate["tail"], fate["seconds"] = self._tail(), round(time.monotonic() - self._began, 2)
        return fate


def _batches(items: Sequence[Item]) -> list[list[Item]]:
    """Consecutive items that may share a process."""
    found: list[list[Item]] = []
    for item in items:
        if item.alone or not found or found[-1][0].alone:
            found.append([])
        found[-1].append(item)
    return found


def run_stage(module: Any, items: Sequence[Item], options: Options, on_record: OnRecord) -> None:
    """Every item once, whatever happens; ``on_record`` gets each record as it comes."""
    deadline = time.monotonic() + options.scale * module.budget(options)
    waiting = list(items)
    while waiting:
        if time.monotonic() > deadline:
            for item in waiting:
                on_record(item.id, record(NOT_RUN, "the stage's time was spent before its turn came"))
            return
        batch = _batches(waiting)[0]
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
            child = _Child(module.__name__, batch, options, Path(folder), on_record)
            fate = child.run()
            waiting = [item for item in waiting if item.id not in child.done]
            if fate is None:
                continue
            if child.at is not None and child.at.retry and child.mark:
                excluded = options.excluded.setdefault(child.at.id, {})
                if child.mark not in excluded and len(excluded) < MAX_RETRIES:
                    excluded[child.mark] = f"{fate['status']}: {fate['summary']}"
                    continue
            # a process that does not even start would not start for the others of its batch
            victims = {child.at.id} if child.at else {item.id for item in batch} - child.done
            for item in victims:
                on_record(item, fate)
            waiting = [item for item in waiting if item.id not in victims]
