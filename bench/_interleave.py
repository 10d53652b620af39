# SPDX-License-Identifier: Apache-2.0
"""Interleaved rounds: every contestant of a group runs once per round, in one process, in turn.

Machines drift (clocks, neighbours, temperature) by more than the differences of interest, but slowly: within one round
all contestants meet the same machine. So the result is the median over rounds of the ratio to the floor *of that
round*, with the 20th and 80th percentiles beside it; absolute times are the medians of the same calls.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench._timing import Clock, orders
from bench._truth import Answers, Judge, Truth

OK = "ok"
FLOOR = "floor"


class Unavailable(Exception):
    """A contestant that cannot run here; the message says why."""


@dataclass
class Contestant:
    """Something that can be timed.

    run      the timed call; gets what ``prepare`` returned.
    prepare  untimed, before every call.
    answers  what it computes, by name, to be judged; None for a floor, which computes nothing of meaning.
    saved    bytes kept for the backward; None where there is none.
    truth    of its own, where it computes another map than its group (LoRA).
    detail   which variant it is, for the table.
    every    takes its turn in one of so many rounds: more than 1 for one that would take most of the time.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    answers: Callable[[], Answers] | None = None
    saved: Callable[[], int] | None = None
    truth: Truth | None = None
    detail: str = ""
    every: int = 1


@dataclass(frozen=True)
class Entry:
    """A contestant to be made when its group's turn comes."""

    impl: str
    make: Callable[[], Contestant]


@dataclass(frozen=True)
class Group:
    """Contestants for the same job. The entry called "floor" is what ratios refer to.

    ``parameters`` is the dtype of what is trained where that is a part of the job; its name then follows ``dtype``'s.
    """

    op: str
    mode: str
    shape: Any
    dtype: torch.dtype
    truth: Truth
    entries: tuple[Entry, ...]
    min_bytes: int = 0  # what has to be read and written at least; 0: not stated
    parameters: torch.dtype | None = None

    @property
    def dtype_name(self) -> str:
        """As in "bfloat16", or "bfloat16+float32" for bfloat16 beside float32 parameters."""
        dtypes = dict.fromkeys((self.dtype, self.parameters or self.dtype))
        return "+".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    @property
    def id(self) -> str:
        return f"{self.op}/{self.mode}/{self.shape}/{self.dtype_name}"


@dataclass(frozen=True)
class Settings:
    """How long to measure: ``seconds`` per group, within these numbers of rounds."""

    seconds: float = 8.0
    min_rounds: int = 7
    max_rounds: int = 60
    warmup: int = 2


@dataclass
class Result:
    """One contestant's measurement. ``status`` is "ok", or why there is no time."""

    impl: str
    detail: str = ""
    status: str = OK
    seconds: list[float] = field(default_factory=list)  # one per round, in order
    ratios: list[float] = field(default_factory=list)  # to the floor of the same round
    error: float | None = None  # relative, in norm, against float64
    saved: int | None = None
    peak: int | None = None  # bytes above the start, on a GPU


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, 20th, 80th), interpolated."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[3]


def rounds_of(contestants: Sequence[Contestant], clock: Clock, settings: Settings) -> list[list[float]]:
    """Seconds per contestant and round, NaN where it was not its turn. The garbage collector waits outside."""
    for _ in range(max(settings.warmup, 1)):
        one_round = 0.0
        for contestant in contestants:
            start = time.perf_counter()
            clock(contestant.run, contestant.prepare())
            one_round += (time.perf_counter() - start) / contestant.every
    rounds = int(settings.seconds / max(one_round, 1e-9))
    rounds = max(settings.min_rounds, min(settings.max_rounds, rounds))
    plan = orders(len(contestants))
    samples: list[list[float]] = [[] for _ in contestants]
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(rounds):
            for i in plan[round_ % len(plan)]:
                if round_ % contestants[i].every:
                    samples[i].append(math.nan)
                    continue
                state = contestants[i].prepare()
                samples[i].append(clock(contestants[i].run, state))
                del state
    finally:
        if was_enabled:
            gc.enable()
    return samples


def fastest(contestants: Sequence[Contestant], clock: Clock) -> Contestant:
    """The one with the smallest median over a few interleaved rounds."""
    if len(contestants) == 1:
        return contestants[0]
    samples = rounds_of(contestants, clock, Settings(seconds=0.5, min_rounds=4, max_rounds=15, warmup=1))
    medians = [statistics.median(times) for times in samples]
    return contestants[medians.index(min(medians))]


def _peak(contestant: Contestant) -> int | None:
    """The most device memory in use during a call, above what was in use before it."""
    if not torch.cuda.is_initialized():
        return None
    contestant.run(contestant.prepare())  # libraries take their workspaces at the first call
    state = contestant.prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contestant.run(state)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _admit(entry: Entry, group: Group, judges: dict[Truth, Judge]) -> tuple[Contestant | None, Result]:
    """Build a contestant and judge its answers; without it where it may not be timed."""
    result = Result(entry.impl)
    try:
        contestant = entry.make()
        result.detail = contestant.detail
        if contestant.answers is not None:
            truth = contestant.truth or group.truth
            if truth not in judges:
                judges[truth] = Judge(truth, group.dtype)
            result.error, complaint = judges[truth].error(contestant.answers())
            if complaint is not None:
                result.status = f"wrong answer: {complaint}"
                return None, result
        if contestant.saved is not None:
            result.saved = contestant.saved()
        result.peak = _peak(contestant)
    except Unavailable as reason:
        result.status = f"unavailable: {reason}"
        return None, result
    except Exception as fault:  # a contestant that breaks is reported beside the others, not instead of them
        first = (str(fault).strip().splitlines() or [""])[0]
        result.status = f"failed: {type(fault).__name__}: {first}"[:300]
        return None, result
    return contestant, result


def measure(group: Group, clock: Clock, settings: Settings) -> list[Result]:
    """Every contestant of ``group``, in its entries' order; those without a right answer carry no time."""
    judges: dict[Truth, Judge] = {}
    results, racing = [], []
    for entry in group.entries:
        contestant, result = _admit(entry, group, judges)
        results.append(result)
        if contestant is not None:
            racing.append((contestant, result))
    judges.clear()
    if not racing:
        return results
    samples = rounds_of([contestant for contestant, _ in racing], clock, settings)
    floor = next((times for (_, result), times in zip(racing, samples, strict=True) if result.impl == FLOOR), None)
    for (_, result), times in zip(racing, samples, strict=True):
        result.seconds = [time_ for time_ in times if not math.isnan(time_)]
        if floor is not None:
            pairs = zip(times, floor, strict=True)
            result.ratios = [time_ / base for time_, base in pairs if not math.isnan(time_)]
    return results
