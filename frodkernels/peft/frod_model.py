# SPDX-License-Identifier: Apache-2.0
"""PEFT's FRoD tuner whose layers are fast from the start; what ``enable()`` puts in PEFT's table of tuners."""

from __future__ import annotations

from typing import Any

from peft.tuners.frod import FrodModel
from torch import Tensor, nn

from frodkernels.peft.frod_file import check_adapter_file
from frodkernels.peft.swap import swap


class FastFrodModel(FrodModel):
    """As PEFT's, but every layer it injects is swapped at once. Saves and loads the same files."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        swap(self, injected=adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_adapter_file(state_dict, model, config, adapter=adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def plain_tuner(module: nn.Module) -> None:
    """Give a tuner made by ``enable()`` its PEFT class back."""
    if type(module) is FastFrodModel:
        module.__class__ = FrodModel
