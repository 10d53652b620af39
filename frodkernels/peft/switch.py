# SPDX-License-Identifier: Apache-2.0
"""Another adapter merged in the place of those that are: what serving many adapters of one model comes down to."""

from __future__ import annotations

from typing import Any

from torch import nn

from frodkernels.peft._require import require_peft


def switch(model: nn.Module, adapter_name: str, *, safe_merge: bool = False) -> None:
    """Unmerge whatever is merged, activate ``adapter_name`` and merge it.

    On fast SHiRA layers the adapters' entries are all that is read and written, in place, and unmerging is exact: after
    any number of switches the base weights come back bit for bit. Other layers merge as they do.

    The adapter is active afterwards, as after PEFT's ``set_adapter``.

    Args:
        model: a PeftModel.
        adapter_name: one of its adapters.
        safe_merge: as in PEFT's ``merge_adapter``: refuse a merged weight that is not finite.

    Raises:
        ValueError: no PeftModel, an unknown adapter, or one whose indices are broken or that does not merge; adapters
            are active and merged as before.
        ImportError: PEFT is not installed.
    """
    require_peft()
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        raise ValueError(f"model must be a PeftModel, got {type(model).__name__}")
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name {adapter_name!r} is none of the model's adapters: {sorted(model.peft_config)}")
    base: Any = model.base_model
    base._check_merge_allowed()
    layers: list[Any] = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    active, active_in_base = model.active_adapter, base.active_adapters
    merged = [list(layer.merged_adapters) for layer in layers]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        _unmerge(layers)
        model.set_adapter(adapter_name)
        _merge(layers, [[adapter_name]] * len(layers), safe_merge)
    except BaseException:
        _unmerge(layers)
        base.set_adapter(active_in_base)
        model.active_adapter = active
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        _merge(layers, merged, False)
        raise


def _unmerge(layers: list[Any]) -> None:
    from peft.tuners.tuners_utils import onload_layer

    for layer in layers:
        if layer.merged:
            with onload_layer(layer):
                layer.unmerge()


def _merge(layers: list[Any], adapters: list[list[str]], safe: bool) -> None:
    from peft.tuners.tuners_utils import onload_layer

    for layer, names in zip(layers, adapters, strict=True):
        if names:
            with onload_layer(layer):
                layer.merge(safe_merge=safe, adapter_names=names)
