# SPDX-License-Identifier: Apache-2.0
"""HRA's entries in the swap: check a layer and its adapters, then change its class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from frodkernels.functional._reflections import deficiency, dependent_columns
from frodkernels.functional.hra_side import NOMINAL_TOKENS, costs
from frodkernels.nn.eval_cache import CacheBudget
from frodkernels.nn.hra import watched
from frodkernels.ops.sparse_core import FLOATS
from frodkernels.peft.base_layer import plain_base, why_called
from frodkernels.peft.hra_file import check_directions
from frodkernels.peft.hra_layer import FastHRAConv2d, FastHRALinear, PeftHRAConv2d, PeftHRALinear
from frodkernels.peft.methods import inside_load
from frodkernels.peft.report import served_by


@dataclass
class PreparedHRA:
    """A layer whose directions are in order."""

    module: Any
    fast: type[nn.Module]
    rederived: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def commit(self, budget: CacheBudget) -> None:
        self.module.__class__ = self.fast

    def describe(self) -> str:
        layer = self.module
        base = layer.get_base_layer()
        if isinstance(base, nn.Conv2d):
            parts = [f"{layer.out_features}x{layer.in_features}x{'x'.join(map(str, base.kernel_size))}"]
        else:
            parts = [f"{layer.out_features}x{layer.in_features}"]
        for adapter, u in layer.hra_u.items():
            gram_schmidt = ", Gram-Schmidt" if layer.hra_apply_GS[adapter] else ""
            dtype, device = str(u.dtype).removeprefix("torch."), u.device.type
            backend = served_by("householder", device)
            parts.append(f"'{adapter}': r {u.shape[1]}{gram_schmidt}, {dtype}, {backend} on {device}")
            parts.append(self._way(u.shape[1]))
        return ", ".join(parts)

    def _way(self, r: int) -> str:
        """How a training step goes; other numbers of tokens may take the other side."""
        layer = self.module
        if isinstance(layer, FastHRAConv2d):
            return "r more filters"
        if not plain_base(layer.base_layer):
            return "input side"
        cost = costs(NOMINAL_TOKENS, layer.out_features, layer.in_features, r, needs_x=True, needs_u=True)
        return f"{min(cost, key=cost.__getitem__)} side at {NOMINAL_TOKENS} tokens"


class _HRATuner:
    """Serves one call."""

    name = "HRA"
    layer: ClassVar[type[nn.Module]]
    fast: ClassVar[type[nn.Module]]

    def __init__(self) -> None:
        self._warned = False

    def why_not(self, module: Any) -> str | None:
        if type(module) not in (self.layer, self.fast):
            return f"subclass {type(module).__name__}"
        if any(u.is_meta for u in module.hra_u.values()):
            return "hra_u is on the meta device: load the adapter first"
        if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
            return "its forward is overridden on the instance"
        if isinstance(module.base_layer, BaseTunerLayer):
            return f"its base layer has another adapter ({type(module.base_layer).__name__})"
        if any(gram_schmidt and module.hra_r[a] > _inputs(module) for a, gram_schmidt in module.hra_apply_GS.items()):
            return "apply_GS with more columns of u than entries in one"
        return self._base_why_not(module.base_layer)

    def _base_why_not(self, base: Any) -> str | None:
        return None

    def prepare(self, name: str, module: Any, injected: str | None) -> PreparedHRA:
        prepared = PreparedHRA(module, self.fast)
        for adapter, u in module.hra_u.items():
            if adapter == injected and inside_load.get():  # what is in it now is about to be overwritten
                continue
            where = f"hra_u of layer '{name}', adapter '{adapter}',"
            check_directions(u, (_inputs(module), module.hra_r[adapter]), where)
            count = dependent_columns(u) if module.hra_apply_GS[adapter] else 0
            if count:
                prepared.notes.append(f"{name} ('{adapter}'): {count} of {u.shape[1]} columns of u are dependent")
                if not self._warned:  # once, not for every layer
                    self._warned = True
                    prepared.warnings.append(f"{name} ('{adapter}'): {deficiency(count, u.shape[1])}")
        prepared.notes += [f"{name}: {note}" for note in self._base_notes(module.base_layer)]
        return prepared

    def _base_notes(self, base: Any) -> list[str]:
        return []

    def budget(self, module: Any) -> CacheBudget | None:
        return None

    def release(self, module: Any) -> None:
        """What this package merged is unmerged, bit for bit; what PEFT merged stays as PEFT left it.

        A weight that was overwritten since is unmerged as PEFT does it, by arithmetic, all of its adapters.
        """
        made_from = module.__dict__.get("_merged_from")
        module._put_back()
        if made_from is not None and len(module.merged_adapters) > len(made_from.before):
            module.unmerge()

    def drop_weights(self, module: Any) -> None:
        pass


class HRALinearTuner(_HRATuner):
    layer = PeftHRALinear
    fast = FastHRALinear

    def _base_notes(self, base: Any) -> list[str]:
        if plain_base(base):
            return []
        return [
            f"the base layer {why_called(base)}: it is called, on the reflected input (PEFT reads its weight instead)"
        ]


class HRAConv2dTuner(_HRATuner):
    layer = PeftHRAConv2d
    fast = FastHRAConv2d

    def _base_why_not(self, base: Any) -> str | None:
        if type(base).forward is not nn.Conv2d.forward or type(base)._conv_forward is not nn.Conv2d._conv_forward:
            return f"its base layer {type(base).__name__} has a forward of its own"
        weight = getattr(base, "weight", None)
        if weight is None or weight.dtype not in FLOATS:
            return f"quantised base layer {type(base).__name__}"
        return "its base weight is not in memory (meta device)" if weight.is_meta else None

    def why_not(self, module: Any) -> str | None:
        why = super().why_not(module)
        if why is not None:
            return why
        kernel = module.base_layer.kernel_size
        if kernel[0] != kernel[1] and any(u.shape[0] != _inputs(module) for u in module.hra_u.values()):
            size = "x".join(map(str, kernel))
            return f"{size} kernel: PEFT makes u for one of {kernel[0]}x{kernel[0]}, and cannot run the layer itself"
        return None

    def _base_notes(self, base: nn.Conv2d) -> list[str]:
        notes = []
        ignored = {
            "dilation": base.dilation != (1, 1),
            "stride": base.stride[0] != base.stride[1],
            "padding": isinstance(base.padding, str) or base.padding[0] != base.padding[1],
            "padding mode": base.padding_mode != "zeros",
        }
        if any(ignored.values()):
            what = ", ".join(name for name, there in ignored.items() if there)
            notes.append(f"PEFT ignores the convolution's {what} until it is merged; here it always holds")
        if watched(base):
            notes.append("hooks of the base layer see its own input and output, before the correction")
        return notes


def _inputs(module: Any) -> int:
    """Rows of u."""
    base = module.get_base_layer()
    if isinstance(base, nn.Conv2d):
        return int(base.in_channels * base.kernel_size[0] * base.kernel_size[1])
    return int(module.in_features)
