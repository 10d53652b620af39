# SPDX-License-Identifier: Apache-2.0
"""PEFT's FRoD tuner whose layers are fast from the start; what ``enable()`` puts in PEFT's table of tuners."""

from __future__ import annotations

import logging
from typing import Any

from peft import PeftType
from peft.tuners.frod import FrodConfig, FrodModel
from torch import Tensor, nn

from frodkernels.peft.frod_file import check_adapter_file
from frodkernels.peft.frod_keys import check_numbers
from frodkernels.peft.methods import Method
from frodkernels.peft.swap import swap

logger = logging.getLogger("frodkernels")


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


def _warn_unverifiable(config: Any, adapter: str) -> None:
    if not config.save_projection:
        logger.warning(
            "adapter '%s' was saved without its projections: V and the pattern of S were made anew from the base "
            "weights. On another machine or library they may differ from those it was trained with, and nothing in "
            "the file can tell. Save with save_projection=True.",
            adapter,
        )


FROD = Method(
    peft_type=PeftType.FROD,
    config=FrodConfig,
    plain=FrodModel,
    fast=FastFrodModel,
    check_file=check_adapter_file,
    check_numbers=check_numbers,
    swap_first=True,  # fast layers give a further adapter projections of its own
    after_load=_warn_unverifiable,
)
