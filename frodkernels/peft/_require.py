# SPDX-License-Identifier: Apache-2.0
"""What every entry point asks first: is there a usable PEFT, and is this a model?"""

from __future__ import annotations

import functools
import importlib

from torch import nn

METHODS = {"frod": "FRoD", "hra": "HRA", "shira": "SHiRA"}  # PEFT's module of tuners -> name in papers
_INSTALL = "pip install 'peft>=0.21.2' transformers"


def require_peft() -> None:
    """Import PEFT and the tuners of it that this package serves.

    Raises:
        ImportError: PEFT is not installed, or has none of them.
    """
    try:
        importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(
            "frodkernels.peft needs the PEFT package, which could not be imported "
            f"({error}). Install it with: {_INSTALL}"
        ) from error
    missing = {method: _missing(method) for method in METHODS}
    if all(missing.values()):
        version = getattr(importlib.import_module("peft"), "__version__", "unknown")
        reasons = "; ".join(f"{METHODS[method]}: {error}" for method, error in missing.items())
        raise ImportError(f"PEFT {version} has no usable tuner that frodkernels serves ({reasons}). Try: {_INSTALL}")


def has_method(method: str) -> bool:
    """Whether PEFT has this tuner: "frod", "hra" or "shira"."""
    return _missing(method) is None


@functools.cache
def _missing(method: str) -> str | None:
    try:
        importlib.import_module(f"peft.tuners.{method}")
    except ImportError as error:
        return str(error)
    return None


def require_module(model: object) -> None:
    """Raises ValueError when ``model`` is no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
