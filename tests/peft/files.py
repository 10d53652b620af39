# SPDX-License-Identifier: Apache-2.0
"""Broken adapter files: how a good one is spoilt, and whether a failed load left traces."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

FILE = "adapter_model.safetensors"

State = dict[str, Tensor]
Change = Callable[[State], object]


def put(key: str, *where, value) -> Change:
    """Write ``value`` to entries of a tensor."""

    def change(state: State) -> None:
        state[key][where] = value

    return change


def remake(key: str, make: Callable[[Tensor], Tensor]) -> Change:
    def change(state: State) -> None:
        state[key] = make(state[key]).contiguous()

    return change


def add(key: str, tensor: Tensor) -> Change:
    def change(state: State) -> None:
        state[key] = tensor.clone()

    return change


def structure(model: nn.Module) -> list:
    return [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()]


def contents(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
