# SPDX-License-Identifier: Apache-2.0
"""What ``accelerate`` did to each layer, and why not where it did nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from frodkernels._backends import DEVICES, select


def percent(off: float, digits: int = 0) -> str:
    """A relative difference for people: beyond ten times the number itself says nothing."""
    return f"{off:.{digits}%}" if off <= 10 else "> 1000 %"  # NaN included


def served_by(op: str, device: str) -> str:
    """The backend that serves ``op`` on a device of this type now."""
    try:
        return select(op, device) if device in DEVICES else "reference"
    except RuntimeError as error:  # a backend was forced that cannot serve
        return f"nothing ({error})"


def worst(offs: Iterable[float]) -> str:
    return percent(max(math.inf if math.isnan(off) else off for off in offs))


@dataclass
class LayerReport:
    """One tuner layer.

    Attributes:
        name: its path in the model.
        tuner: the PEFT method, "FRoD", "HRA" or "SHiRA".
        status: "swapped" by this call, "already" fast before it, or "skipped".
        why: the reason of a skip.
        details: what serves it: shape, nonzeros or rank, backend, evaluation cache.
    """

    name: str
    tuner: str
    status: str
    why: str = ""
    details: str = ""


@dataclass
class SwapReport:
    """The result of ``accelerate``.

    Attributes:
        layers: one entry per tuner layer, in the model's order.
        rederived: ``"<layer> (<adapter>)"`` -> relative difference, for each U that did not belong to the V in place
            and was derived again (PEFT's loader leaves such layers silently wrong).
        notes: anything else worth knowing.
    """

    layers: list[LayerReport] = field(default_factory=list)
    rederived: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def _named(self, status: str) -> list[str]:
        return [layer.name for layer in self.layers if layer.status == status]

    @property
    def swapped(self) -> list[str]:
        """The layers this call made fast."""
        return self._named("swapped")

    @property
    def already(self) -> list[str]:
        """The layers that were fast before this call."""
        return self._named("already")

    @property
    def skipped(self) -> dict[str, str]:
        """The layers left as they are -> why."""
        return {layer.name: layer.why for layer in self.layers if layer.status == "skipped"}

    def summary(self) -> str:
        """One line."""
        if not self.layers:
            return "no tuner layers found"
        parts = [f"{len(self.swapped)} layers swapped"]
        if self.already:
            parts.append(f"{len(self.already)} already fast")
        if self.skipped:
            reasons = Counter(self.skipped.values()).most_common()
            parts.append(f"{len(self.skipped)} skipped ({'; '.join(f'{n} x {why}' for why, n in reasons)})")
        if self.rederived:
            parts.append(f"U re-derived in {len(self.rederived)} (was wrong by up to {worst(self.rederived.values())})")
        return ", ".join(parts)

    def __repr__(self) -> str:
        lines = [f"SwapReport: {self.summary()}"]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            what = layer.why if layer.status == "skipped" else layer.details
            lines.append(f"  {layer.name or '(root)':<{width}}  {layer.tuner}  {layer.status:<7}  {what}".rstrip())
        lines += [f"  U re-derived: {where}, was off by {percent(off, 2)}" for where, off in self.rederived.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
