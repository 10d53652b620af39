# SPDX-License-Identifier: Apache-2.0
"""PEFT's HRA tuner whose layers are fast from the start; what ``enable()`` puts in PEFT's table of tuners."""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.tuners.hra import HRAConfig, HRAModel
from torch import Tensor, nn

from frodkernels.peft.hra_file import check_hra_file, check_numbers
from frodkernels.peft.methods import Method
from frodkernels.peft.swap import swap


class FastHRAModel(HRAModel):
    """As PEFT's, but every layer it injects is swapped at once. Saves and loads the same files."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        swap(self, injected=adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_hra_file(state_dict, model, config, adapter=adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


HRA = Method(
    peft_type=PeftType.HRA,
    config=HRAConfig,
    plain=HRAModel,
    fast=FastHRAModel,
    check_file=check_hra_file,
    check_numbers=check_numbers,
    swap_first=False,
    after_load=lambda config, adapter: None,
)
