# SPDX-License-Identifier: Apache-2.0
"""accelerate, restore, invalidate: change the class of PEFT's tuner layers, and change it back."""

from __future__ import annotations

import logging
import types
from typing import Any

from torch import nn

from frodkernels.nn.eval_cache import CacheBudget
from frodkernels.peft._require import require_module, require_peft
from frodkernels.peft.report import LayerReport, SwapReport, worst
from frodkernels.peft.tuners import Prepared, Tuner, tuners

logger = logging.getLogger("frodkernels")


def accelerate(model: nn.Module, *, eval_cache: int | bool | None = None) -> SwapReport:
    """Run the tuner layers inside ``model`` on this package's kernels.

    Only the class of each layer changes: parameters, state-dict keys, saving, loading in plain PEFT, merging,
    adapter switching and copying go on as before, and :func:`restore` undoes it. Everything is checked before
    anything is changed. Call it again after adding or loading an adapter; layers that are fast already stay so.

    FRoD: a layer whose U does not belong to the V in place, as PEFT's loader can leave it, gets the right U; the
    report and a warning name it.

    Args:
        model: any module that holds PEFT tuner layers: a PeftModel, a part of one, a single layer.
        eval_cache: how many bytes of dense weights the layers of FRoD and SHiRA may keep between parameter changes in
            evaluation.
            False or 0: none. True: as many as they need (on CUDA: as leave a tenth of the device free). None: as
            True, or what an earlier call said.

    Returns:
        A SwapReport: per layer swapped, already fast, or skipped and why.

    Raises:
        ValueError: ``model`` is no module, or an adapter's tensors are broken (bad indices, sizes, lengths, dtypes,
            directions of no length); nothing was changed.
        ImportError: PEFT is not installed.
    """
    require_peft()
    require_module(model)
    report = swap(model, _limit(eval_cache))
    logger.info("accelerate: %s", report.summary())
    return report


def _limit(eval_cache: int | bool | None) -> int | None | str:
    """Bytes, None for no limit, "keep" for what is set already."""
    if eval_cache is None:
        return "keep"
    if isinstance(eval_cache, bool):
        return None if eval_cache else 0
    if not isinstance(eval_cache, int) or eval_cache < 0:
        raise ValueError(f"eval_cache must be a number of bytes >= 0, a bool or None, got {eval_cache!r}")
    return eval_cache


def swap(model: nn.Module, limit: int | None | str = "keep", *, injected: str | None = None) -> SwapReport:
    """``accelerate`` without the INFO line. ``injected``: the adapter PEFT has just made, which needs no check."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    serving = tuners()
    report = SwapReport()
    ready: list[tuple[Tuner, Prepared, LayerReport]] = []
    budget = None
    for name, module in model.named_modules():
        tuner = next((t for t in serving if isinstance(module, t.layer)), None)
        if tuner is None:
            if isinstance(module, BaseTunerLayer):
                family = type(module).__module__.split(".")[-2]
                other = f"no fast version of {family}.{type(module).__name__}"
                report.layers.append(LayerReport(name, family, "skipped", why=other))
            continue
        why = tuner.why_not(module)
        if why is not None:
            report.layers.append(LayerReport(name, tuner.name, "skipped", why=why))
            continue
        status = "already" if type(module) is tuner.fast else "swapped"
        budget = budget or tuner.budget(module)
        line = LayerReport(name, tuner.name, status)
        report.layers.append(line)
        ready.append((tuner, tuner.prepare(name, module, injected), line))
    if limit != "keep" or budget is None:
        budget = CacheBudget(None if limit == "keep" else limit)  # type: ignore[arg-type]
    for tuner, prepared, line in ready:
        prepared.commit(budget)
        line.details = prepared.describe()
        _retarget_hook(prepared.module, tuner.layer, tuner.fast)
        report.rederived.update({f"{line.name} ({adapter})": off for adapter, off in prepared.rederived.items()})
        report.notes += prepared.notes + prepared.warnings
        for warning in prepared.warnings:
            logger.warning("%s", warning)
    if report.rederived:
        logger.warning(
            "U did not belong to the loaded V in %d layers (off by up to %s) and was derived again: %s",
            len(report.rederived),
            worst(report.rederived.values()),
            ", ".join(report.rederived),
        )
    return report


def _retarget_hook(module: Any, old: Any, new: Any) -> None:
    """Hugging Face's accelerate hooks keep the bound forward of the class they met: point it to the new one."""
    bound = module.__dict__.get("_old_forward")
    if isinstance(bound, types.MethodType) and bound.__func__ is old.forward:
        module._old_forward = types.MethodType(new.forward, module)


def _fast_layers(model: nn.Module) -> list[tuple[Any, Any]]:
    """(layer, its tuner) for every fast layer inside ``model``."""
    serving = tuners()
    return [(module, tuner) for module in model.modules() for tuner in serving if type(module) is tuner.fast]


def restore(model: nn.Module) -> None:
    """Give the layers inside ``model`` their PEFT classes back. What they have merged is unmerged first, bit for bit.

    FRoD's corrected U factors stay: the plain layers need them as much.
    """
    require_peft()
    require_module(model)
    from frodkernels.peft.methods import plain_tuner

    for module, tuner in _fast_layers(model):
        tuner.release(module)
        module.__class__ = tuner.layer
        _retarget_hook(module, tuner.fast, tuner.layer)
    for module in model.modules():
        plain_tuner(module)


def invalidate(model: nn.Module) -> None:
    """Drop the cached evaluation weights inside ``model``.

    FRoD and SHiRA: HRA's layers keep none. Needed only after parameters were written behind autograd's back
    (``p.data.copy_()`` and the like) on CUDA, or what is frozen (U and V, or SHiRA's base weight) anywhere; every other
    change is seen.
    """
    require_peft()
    require_module(model)
    for module, tuner in _fast_layers(model):
        tuner.drop_weights(module)
