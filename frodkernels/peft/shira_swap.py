# SPDX-License-Identifier: Apache-2.0
"""SHiRA's entry in the swap: check a layer and its adapters, then change its class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from frodkernels.nn.eval_cache import CacheBudget, EvalCache
from frodkernels.ops.sparse_core import FLOATS
from frodkernels.peft.base_layer import plain_base, why_called
from frodkernels.peft.methods import inside_load
from frodkernels.peft.plan import Plan
from frodkernels.peft.report import served_by
from frodkernels.peft.shira_layer import FastShiraLinear, PeftShiraLinear, Slot
from frodkernels.peft.shira_plan import Known, plan_adapter


@dataclass
class PreparedShira:
    """The plans of one layer."""

    name: str
    module: Any
    plans: dict[str, Plan] = field(default_factory=dict)
    rederived: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def commit(self, budget: CacheBudget) -> None:
        layer = self.module
        layer.__class__ = FastShiraLinear
        slot = layer._fast
        if slot is None:
            slot = Slot()
            object.__setattr__(layer, "_fast", slot)
        if slot.cache is None or slot.cache.budget is not budget:
            layer._drop_weights()
            slot.cache = EvalCache(budget)
        slot.name, slot.plans = self.name, self.plans

    def describe(self) -> str:
        layer = self.module
        parts = [f"{layer.out_features}x{layer.in_features}"]
        for adapter, plan in self.plans.items():
            values = layer.shira_weight[adapter]
            dtype, device = str(values.dtype).removeprefix("torch."), values.device.type
            entries = f"nnz {plan.pattern.nnz} ({plan.pattern.density:.2%})"
            parts.append(f"'{adapter}': {entries}, {dtype}, {served_by('sparse_core', device)} on {device}")
        if plain_base(layer.base_layer):
            limit = layer._fast.cache.budget.limit
            cache = "off" if limit == 0 else "on" if limit is None else f"within {limit:,} bytes"
            parts.append(f"eval cache {cache}")
        else:
            parts.append("base layer called")
        return ", ".join(parts)


class ShiraTuner:
    """Serves one call: layers with the same positions share their plan."""

    name = "SHiRA"
    layer = PeftShiraLinear
    fast = FastShiraLinear

    def __init__(self) -> None:
        self._known: Known = {}

    def why_not(self, module: Any) -> str | None:
        if type(module) not in (self.layer, self.fast):
            return f"subclass {type(module).__name__}"
        if any(values.is_meta for values in module.shira_weight.values()):
            return "shira_weight is on the meta device: load the adapter first"
        if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
            return "its forward is overridden on the instance"
        base = module.base_layer
        if isinstance(base, BaseTunerLayer):
            return f"its base layer has another adapter ({type(base).__name__})"
        if plain_base(base) and base.weight.dtype not in FLOATS:
            return f"unsupported base dtype {base.weight.dtype}"
        return None

    def prepare(self, name: str, module: Any, injected: str | None) -> PreparedShira:
        prepared = PreparedShira(name, module)
        slot = getattr(module, "_fast", None)
        for adapter in module.shira_weight:
            if adapter == injected and (inside_load.get() or adapter not in module.shira_indices):
                continue  # its positions come from a file, or from the user, later
            earlier = None if slot is None else slot.plans.get(adapter)
            prepared.plans[adapter] = plan_adapter(module, adapter, name, earlier, self._known)
        if not plain_base(module.base_layer):
            what = f"the base layer {why_called(module.base_layer)}: it is called, and the sparse product added"
            backend = module.quantization_backend
            peft = "" if backend is not None and not backend.supports_merge else " (PEFT reads its weight instead)"
            prepared.notes.append(f"{name}: {what}{peft}")
        return prepared

    def budget(self, module: Any) -> CacheBudget | None:
        slot = getattr(module, "_fast", None)
        return None if slot is None or slot.cache is None else slot.cache.budget

    def release(self, module: Any) -> None:
        """What this package merged is unmerged, bit for bit; what PEFT merged stays as PEFT left it."""
        module._release()

    def drop_weights(self, module: Any) -> None:
        module._drop_weights()
