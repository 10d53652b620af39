# SPDX-License-Identifier: Apache-2.0
"""FRoD's entry in the swap: check a layer and its adapters, then change its class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from frodkernels.functional.frod_path import NOMINAL_TOKENS, costs
from frodkernels.nn.eval_cache import CacheBudget
from frodkernels.ops.sparse_core import FLOATS
from frodkernels.peft.frod_basis import Bases, Origin, judge, origin_of
from frodkernels.peft.frod_layer import FastFrodLinear, PeftFrodLinear, Slot
from frodkernels.peft.frod_plan import plan_adapter
from frodkernels.peft.plan import Plan
from frodkernels.peft.report import served_by


@dataclass
class PreparedFrod:
    """The plans of one layer, the U to be put in place, and where both came from."""

    name: str
    module: Any
    plans: dict[str, Plan] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    replace: dict[str, Tensor] = field(default_factory=dict)
    rederived: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def commit(self, budget: CacheBudget) -> None:
        layer = self.module
        layer.__class__ = FastFrodLinear
        slot = layer._fast
        if slot is None:
            slot = Slot(budget, self.name)
            object.__setattr__(layer, "_fast", slot)
        if slot.budget is not budget or self.replace:
            slot.drop_weights()
        slot.name, slot.budget, slot.plans, slot.origins = self.name, budget, self.plans, self.origins
        for adapter, U in self.replace.items():
            layer.frod_U[adapter] = U
        self._place()

    def _place(self) -> None:
        """Put U and V where the trainable parameters are: PEFT leaves those of a late adapter on the host and
        copies them to the device in every forward."""
        layer = self.module
        for adapter in self.plans:
            device = layer.frod_lambda_l[adapter].device
            if device.type == "meta":
                continue
            for store in (layer.frod_U, layer.frod_V):
                if store[adapter].device != device:
                    store[adapter] = store[adapter].to(device)

    def describe(self) -> str:
        layer = self.module
        parts = [f"{layer.out_features}x{layer.in_features}"]
        for adapter, plan in self.plans.items():
            device = layer.frod_lambda_l[adapter].device.type
            dtype = str(layer.frod_V[adapter].dtype).removeprefix("torch.")
            parts.append(
                f"'{adapter}': nnz {plan.pattern.nnz}, {dtype}, {served_by('sparse_core', device)} on {device}"
            )
            parts.append(f"{self._training_path(adapter, plan)} path at {NOMINAL_TOKENS} tokens")
        limit = layer._fast.budget.limit
        parts.append("eval cache " + ("off" if limit == 0 else "on" if limit is None else f"within {limit:,} bytes"))
        return ", ".join(parts)

    def _training_path(self, adapter: str, plan: Plan) -> str:
        """The association order that a training step takes; other numbers of tokens may take another."""
        layer = self.module
        cost = costs(
            NOMINAL_TOKENS,
            layer.out_features,
            layer.in_features,
            plan.pattern.nnz,
            layer.frod_V[adapter].dtype,
            needs_x=True,
            needs_parameters=True,
            device=layer.frod_lambda_l[adapter].device.type,
        )
        return min(cost, key=cost.__getitem__)


class FrodTuner:
    """Serves one call: layers of a category share their plan and the factors of their V."""

    name = "FRoD"
    layer = PeftFrodLinear
    fast = FastFrodLinear

    def __init__(self) -> None:
        self._bases = Bases()
        self._lost: list[Tensor] = []  # the V that adapters share, once reported

    def why_not(self, module: Any) -> str | None:
        if type(module) not in (self.layer, self.fast):
            return f"subclass {type(module).__name__}"
        base = module.get_base_layer()
        weight = getattr(base, "weight", None)
        if weight is None or not weight.dtype.is_floating_point:
            return f"quantised base layer {type(base).__name__}"
        if weight.dtype not in FLOATS:
            return f"unsupported base dtype {weight.dtype}"
        for attribute in ("frod_V", "frod_U", "frod_s_indices", "frod_s_size"):
            if any(tensor.is_meta for tensor in (getattr(module, attribute) or {}).values()):
                return f"{attribute} is on the meta device: load the adapter first"
        forward = module.__dict__.get("forward")
        if forward is not None and "_old_forward" not in module.__dict__:
            return "its forward is overridden on the instance"
        return None

    def prepare(self, name: str, module: Any, injected: str | None) -> PreparedFrod:
        prepared = PreparedFrod(name, module)
        slot = getattr(module, "_fast", None)
        for adapter in module.frod_lambda_s_values:
            earlier = None if slot is None else slot.plans.get(adapter)
            prepared.plans[adapter] = plan_adapter(module, adapter, name, earlier)
            if adapter == injected:
                prepared.origins[adapter] = origin_of(module.frod_V[adapter])
                continue
            known = None if slot is None else slot.origins.get(adapter)
            verdict = judge(module, adapter, known, self._bases)
            if verdict is None:
                prepared.notes.append(
                    f"{name} ('{adapter}'): base weight is not at hand, U could not be checked against V"
                )
                continue
            prepared.origins[adapter] = verdict.origin
            if verdict.U is not None:
                prepared.replace[adapter] = verdict.U
                prepared.rederived[adapter] = verdict.off
        self._warn_of_lost_bases(prepared)
        return prepared

    def _warn_of_lost_bases(self, prepared: PreparedFrod) -> None:
        """Plain PEFT hands a later adapter the earlier one's V, and loading the later one's file overwrites it."""
        stored = prepared.module.frod_V
        for adapter in prepared.rederived:
            V = stored[adapter]
            sharing = [name for name in prepared.plans if stored[name] is V]
            if len(sharing) > 1 and not any(V is lost for lost in self._lost):
                self._lost.append(V)
                earlier, last = ", ".join(f"'{name}'" for name in sharing[:-1]), sharing[-1]
                prepared.warnings.append(
                    f"{prepared.name} and its like: adapter {earlier} shares V and the pattern of S with '{last}', "
                    f"whose file has overwritten them. What {earlier} was trained with is lost: load its file again, "
                    "inside enabled()"
                )

    def budget(self, module: Any) -> CacheBudget | None:
        slot = getattr(module, "_fast", None)
        return None if slot is None else slot.budget

    def release(self, module: Any) -> None:
        """Back to PEFT's state. A merged weight goes back to the saved one, bit for bit."""
        if module.merged:
            module.unmerge()
        module.__dict__.pop("_fast", None)

    def drop_weights(self, module: Any) -> None:
        module._drop_weights()
