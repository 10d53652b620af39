# SPDX-License-Identifier: Apache-2.0
"""The PEFT methods whose models ``enable()`` makes fast: one entry per method."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from frodkernels.peft._require import has_method


@dataclass(frozen=True)
class Method:
    """A PEFT method and what is done around the making and the loading of its adapters.

    peft_type       its entry in PEFT's table of tuners.
    config          the class of its configs.
    plain, fast     PEFT's tuner, and ours, which is put in the table.
    check_file      (tensors, model, config, adapter=None, ignore_mismatched=False): ValueError for a broken file.
    check_numbers   ValueError for a config whose numbers are none; gets its dict.
    swap_first      whether the layers must be fast before PEFT gives them a further adapter.
    after_load      (config, adapter name): what is to be said of a file that was loaded.
    """

    peft_type: Any
    config: Any
    plain: type[nn.Module]
    fast: type[nn.Module]
    check_file: Callable[..., None]
    check_numbers: Callable[[Mapping[str, Any]], None]
    swap_first: bool
    after_load: Callable[[Any, str], None]


# While PEFT injects an adapter whose tensors come from a file later: what is in them now means nothing.
inside_load: contextvars.ContextVar[bool] = contextvars.ContextVar("inside_load", default=False)


@functools.cache
def methods() -> tuple[Method, ...]:
    """Every method that this PEFT has. Imports it."""
    found = []
    if has_method("frod"):
        from frodkernels.peft.frod_model import FROD

        found.append(FROD)
    if has_method("hra"):
        from frodkernels.peft.hra_model import HRA

        found.append(HRA)
    if has_method("shira"):
        from frodkernels.peft.shira_model import SHIRA

        found.append(SHIRA)
    return tuple(found)


def method_of(peft_type: Any) -> Method | None:
    """The method of a config's ``peft_type``; None when it is none of ours."""
    return next((method for method in methods() if method.peft_type == peft_type), None)


def plain_tuner(module: nn.Module) -> None:
    """Give a tuner made by ``enable()`` its PEFT class back."""
    for method in methods():
        if type(module) is method.fast:
            module.__class__ = method.plain
