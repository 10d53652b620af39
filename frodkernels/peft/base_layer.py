# SPDX-License-Identifier: Apache-2.0
"""What an adapted layer may do with its base layer: use its weight, or only call it."""

from __future__ import annotations

from torch import Tensor, nn

from frodkernels.nn.hra import plain_linear


def plain_tensor(weight: object) -> bool:
    """Whether a weight's numbers are its own: no subclass that quantises or distributes them."""
    return type(weight) in (Tensor, nn.Parameter)


def plain_base(base: nn.Module) -> bool:
    """Whether the weight of a linear layer may be used without calling it."""
    return isinstance(base, nn.Linear) and plain_linear(base) and plain_tensor(base.weight)


def why_called(base: nn.Module) -> str:
    """Why the weight of a layer is not read."""
    return "has hooks" if type(base) is nn.Linear else f"is a {type(base).__name__}"
