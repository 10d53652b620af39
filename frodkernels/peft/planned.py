# SPDX-License-Identifier: Apache-2.0
"""What fast layers over a checked pattern share: the pattern of each adapter, and when what is remembered is wrong."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from frodkernels.pattern import SparsePattern
from frodkernels.peft.plan import Plan

_Layer: Any = nn.Module  # a class is only changed for one that begins with the same base class
Self = TypeVar("Self", bound="PlannedLayer")


class PlannedSlot:
    """What a fast layer can make again; never copied, pickled or saved.

    name   the layer's path when it was swapped, for messages.
    plans  adapter -> the checked pattern.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.plans: dict[str, Plan] = {}

    def drop_weights(self) -> None:
        raise NotImplementedError

    def forget_all_but(self, adapters: set[str]) -> None:
        """After adapters went away: nothing of theirs may serve a namesake."""
        self.drop_weights()
        self.plans = {k: v for k, v in self.plans.items() if k in adapters}


class PlannedLayer(_Layer):
    """First base of a fast layer, before PEFT's: no ``__init__``, parameters, buffers or submodules."""

    _fast: Any = None  # the instance's slot lives in its __dict__, unregistered

    def _new_slot(self) -> PlannedSlot:
        raise NotImplementedError

    def _trained(self) -> nn.ParameterDict:
        """adapter -> a parameter that says where its pattern belongs."""
        raise NotImplementedError

    def _indices(self, adapter: str) -> Tensor | None:
        """The adapter's positions, as PEFT keeps them."""
        raise NotImplementedError

    def _plan(self, adapter: str, name: str, earlier: Plan | None) -> Plan:
        raise NotImplementedError

    def _slot(self) -> Any:
        slot = self._fast
        if slot is None:  # a deep copy, or fresh out of a file: cached weights only when accelerate() says so
            slot = self._new_slot()
            object.__setattr__(self, "_fast", slot)
        return slot

    # -- plans --------------------------------------------------------------------------------------------------

    def _pattern(self, adapter: str) -> SparsePattern:
        slot = self._fast
        plan = None if slot is None else slot.plans.get(adapter)
        if torch.compiler.is_compiling():  # no identity checks in a graph: PEFT's indices do not change under one
            return plan.pattern if plan is not None else _plan_eagerly(self, adapter).pattern
        if plan is None or not plan.current(self._indices(adapter)):
            plan = self._replan(adapter)
        return plan.pattern

    def _replan(self, adapter: str) -> Plan:
        """Plan again: first use after a copy or a move, a new adapter, or somebody replaced the indices."""
        slot = self._slot()
        plan = self._plan(adapter, slot.name or self._get_name(), slot.plans.get(adapter))
        slot.plans[adapter] = plan
        return plan

    # -- everything that makes what is remembered wrong, or useless ------------------------------------------------

    def _drop_weights(self) -> None:
        if self._fast is not None:
            self._fast.drop_weights()

    def _forget_strangers(self) -> None:
        if self._fast is not None:
            self._fast.forget_all_but(set(self._trained()))

    def train(self: Self, mode: bool = True) -> Self:
        if mode:
            self._drop_weights()
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._forget_strangers()

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        self._drop_weights()
        super()._apply(fn, recurse)
        if self._fast is not None:  # so that a graph compiled after the move finds its pattern in place
            trained = self._trained()
            for adapter, plan in self._fast.plans.items():
                device = trained[adapter].device
                if device != plan.pattern.device and device.type != "meta":
                    self._fast.plans[adapter] = plan.moved(device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_weights()
        super()._load_from_state_dict(*args, **kwargs)

    # -- copies -------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)
        state = dict(inherited() if inherited is not None else self.__dict__)
        state.pop("_fast", None)
        return state

    def _replicate_for_data_parallel(self: Self) -> Self:
        replica = super()._replicate_for_data_parallel()
        slot = self._new_slot()  # a replica lives for one forward, on another device
        slot.plans = dict(self._slot().plans)
        object.__setattr__(replica, "_fast", slot)
        return replica


@torch.compiler.disable
def _plan_eagerly(layer: PlannedLayer, adapter: str) -> Plan:
    return layer._replan(adapter)
