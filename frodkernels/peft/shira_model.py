# SPDX-License-Identifier: Apache-2.0
"""PEFT's SHiRA tuner whose layers are fast from the start; what ``enable()`` puts in PEFT's table of tuners."""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.tuners.shira import ShiraConfig, ShiraModel
from torch import Tensor, nn

from frodkernels.peft.methods import Method
from frodkernels.peft.shira_file import check_numbers, check_shira_file
from frodkernels.peft.swap import swap


class FastShiraModel(ShiraModel):
    """As PEFT's, but every layer it injects is swapped at once. Saves and loads the same files."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        swap(self, injected=adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_shira_file(state_dict, model, config, adapter=adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


SHIRA = Method(
    peft_type=PeftType.SHIRA,
    config=ShiraConfig,
    plain=ShiraModel,
    fast=FastShiraModel,
    check_file=check_shira_file,
    check_numbers=check_numbers,
    swap_first=False,
    after_load=lambda config, adapter: None,
)
