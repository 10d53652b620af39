# SPDX-License-Identifier: Apache-2.0
"""A layer as a contestant: what is timed in each mode, what its answers are called, what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from bench._interleave import Contestant
from bench._saved import saved_bytes


class Batch(Protocol):
    """The input of a layer and the gradient of its output."""

    x: Tensor
    g: Tensor


def contestant(
    forward: Callable[[Tensor], Tensor], case: Batch, mode: str, parameters: dict[str, Tensor]
) -> Contestant:
    """Time ``forward`` as ``mode`` says. ``parameters`` are named like their gradients in the truth."""
    if mode != "step":

        def answer(_: Any = None) -> Tensor:
            with torch.no_grad():
                return forward(case.x)

        return Contestant(answer, answers=lambda: {"y": answer()})

    x = case.x.detach().requires_grad_()
    names, leaves = ("dx", *parameters), (x, *parameters.values())

    def step(_: Any = None) -> tuple[Tensor, ...]:
        y = forward(x)
        return (y, *torch.autograd.grad(y, leaves, case.g))

    def answers() -> dict[str, Tensor]:
        y, *grads = step()
        return {"y": y.detach(), **dict(zip(names, grads, strict=True))}

    return Contestant(step, answers=answers, saved=lambda: saved_bytes(lambda: forward(x), [x]))
