# SPDX-License-Identifier: Apache-2.0
"""The PEFT layer classes there are fast versions of: one entry per class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from frodkernels.nn.eval_cache import CacheBudget
from frodkernels.peft._require import has_method


class Prepared(Protocol):
    """One layer, checked and ready to be changed; nothing has been changed yet.

    rederived: adapter -> how far its U was off (FRoD).
    notes, warnings: for the report; warnings are logged as well.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def rederived(self) -> dict[str, float]: ...

    @property
    def notes(self) -> list[str]: ...

    @property
    def warnings(self) -> list[str]: ...

    def commit(self, budget: CacheBudget) -> None:
        """Make the change. Does not fail."""

    def describe(self) -> str:
        """What serves the layer now."""


class Tuner(Protocol):
    """How one of PEFT's layer classes is swapped. An instance serves one call of ``accelerate``."""

    @property
    def name(self) -> str:
        """The method's, as in papers: "FRoD", "HRA", "SHiRA"."""

    @property
    def layer(self) -> type[nn.Module]:
        """PEFT's class."""

    @property
    def fast(self) -> type[nn.Module]:
        """Ours, a subclass that adds behaviour only."""

    def why_not(self, module: Any) -> str | None:
        """Why this layer (of PEFT's class or one derived from it) must stay as it is; None when it can be swapped."""

    def prepare(self, name: str, module: Any, injected: str | None) -> Prepared:
        """Check every adapter of the layer and plan it; ``injected`` has just been made by PEFT, not trained or loaded.

        Raises ValueError; changes nothing.
        """

    def budget(self, module: Any) -> CacheBudget | None:
        """The cache budget of a layer that is fast already; None when it keeps nothing."""

    def release(self, module: Any) -> None:
        """Undo what a plain class change would not."""

    def drop_weights(self, module: Any) -> None:
        """Forget cached weights."""


@functools.cache
def _classes() -> tuple[Callable[[], Tuner], ...]:
    """Every class with a fast version, of the methods that this PEFT has. Imports it."""
    found: list[Callable[[], Tuner]] = []
    if has_method("frod"):
        from frodkernels.peft.frod_swap import FrodTuner

        found.append(FrodTuner)
    if has_method("hra"):
        from frodkernels.peft.hra_swap import HRAConv2dTuner, HRALinearTuner

        found += [HRALinearTuner, HRAConv2dTuner]
    if has_method("shira"):
        from frodkernels.peft.shira_swap import ShiraTuner

        found.append(ShiraTuner)
    return tuple(found)


def tuners() -> list[Tuner]:
    """Fresh tuners for one call."""
    return [tuner() for tuner in _classes()]
