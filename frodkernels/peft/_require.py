# SPDX-License-Identifier: Apache-2.0
"""What every entry point asks first: is there a usable PEFT, and is this a model?"""

from __future__ import annotations

import importlib

from torch import nn


def require_peft() -> None:
    """Import PEFT and its FRoD tuner.

    Raises:
        ImportError: PEFT is not installed, or has no FRoD.
    """
    try:
        importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(
            "frodkernels.peft needs the PEFT package, which could not be imported "
            f"({error}). Install it with: pip install 'peft>=0.21.2' transformers"
        ) from error
    try:
        importlib.import_module("peft.tuners.frod")
    except ImportError as error:
        version = getattr(importlib.import_module("peft"), "__version__", "unknown")
        raise ImportError(
            f"PEFT {version} has no usable FRoD tuner ({error}). Install a newer one: pip install 'peft>=0.21.2'"
        ) from error


def require_module(model: object) -> None:
    """Raises ValueError when ``model`` is no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
