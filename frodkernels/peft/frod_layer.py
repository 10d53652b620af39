# SPDX-License-Identifier: Apache-2.0
"""PEFT's FRoD layer with a fast forward: same parameters, keys, files and behaviour, no sort and no dense S."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.frod.layer import Linear as PeftFrodLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from frodkernels.functional.frod import frod_linear, frod_weight
from frodkernels.nn.eval_cache import CacheBudget, EvalCache, may_cache
from frodkernels.pattern import SparsePattern
from frodkernels.peft.frod_basis import Bases, Origin, judge, origin_of
from frodkernels.peft.frod_plan import plan_adapter
from frodkernels.peft.plan import Plan
from frodkernels.peft.planned import PlannedLayer, PlannedSlot

logger = logging.getLogger("frodkernels")


class Slot(PlannedSlot):
    """All that a fast layer remembers beyond PEFT's state; never copied, pickled or saved.

    budget   what the caches of the model may hold together; None: nothing, until accelerate() says how much.
    caches   adapter -> the dense weight in evaluation.
    origins  adapter -> the V that U was made from.
    """

    def __init__(self, budget: CacheBudget | None = None, name: str = "") -> None:
        super().__init__(name)
        self.budget = budget
        self.caches: dict[str, EvalCache] = {}
        self.origins: dict[str, Origin] = {}

    def drop_weights(self) -> None:
        for cache in list(self.caches.values()):  # another thread may be adding its own
            cache.drop()
        self.caches.clear()

    def forget_all_but(self, adapters: set[str]) -> None:
        super().forget_all_but(adapters)
        self.origins = {k: v for k, v in self.origins.items() if k in adapters}


def _random(dropout: nn.Module) -> bool:
    return not isinstance(dropout, nn.Identity) and dropout.training


def _plain(base: nn.Module) -> bool:
    """A linear layer that nobody watches: it may be given another input as long as the sum of outputs is the same."""
    watched = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return type(base) in (nn.Linear, Conv1D) and not watched and "forward" not in base.__dict__


class FastFrodLinear(PlannedLayer, PeftFrodLinear):
    """PEFT's ``frod.Linear`` on this package's kernels.

    Set as ``layer.__class__``: it has no ``__init__``, parameters, buffers or submodules of its own, so state-dict
    keys, saving, loading in plain PEFT, merging, disabling and copying are PEFT's. Merged and disabled layers do no
    adapter arithmetic and take PEFT's own forward; everything else, dropout and several adapters included, goes
    through :func:`frodkernels.frod_linear`.
    """

    def _new_slot(self) -> Slot:
        return Slot()

    def _trained(self) -> nn.ParameterDict:
        return self.frod_lambda_l

    def _indices(self, adapter: str) -> Tensor:
        return self.frod_s_indices[adapter]

    def _plan(self, adapter: str, name: str, earlier: Plan | None) -> Plan:
        return plan_adapter(self, adapter, name, earlier)

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        adapters = [name for name in self.active_adapters if name in self.frod_lambda_s_values]
        if not adapters:
            return super().forward(x, *args, **kwargs)
        if len(adapters) == 1 and not _random(self.frod_dropout[adapters[0]]):
            if self.runtime_offload_base_weight.get(adapters[0], False):
                self._offload_base_weight_to_cpu()
            return self._product(adapters[0], x, self.get_base_layer().bias).to(x.dtype)
        self._move_base_weight_to_device(x.device)
        if _plain(self.base_layer):
            return self._sum(adapters, x, args, kwargs).to(x.dtype)
        return self._sum_observed(adapters, x, args, kwargs).to(x.dtype)

    def _sum(self, adapters: list[str], x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """base(x) + sum_i (FRoD_i(h_i) - h_i W^T), with one product by W: base(x - sum_i h_i) + sum_i FRoD_i(h_i)."""
        whole = sum(not _random(self.frod_dropout[name]) for name in adapters)  # adapters that see x itself
        rest = None if whole == 1 else (1 - whole) * x
        total = None
        for name in adapters:
            h = self.frod_dropout[name](x)
            if _random(self.frod_dropout[name]):
                rest = -h if rest is None else rest - h
            y = self._product(name, h)
            total = y if total is None else total + y
        return self.base_layer(rest, *args, **kwargs) + total

    def _sum_observed(self, adapters: list[str], x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The same sum term by term, as PEFT forms it: the base layer's hooks see x."""
        base = self.get_base_layer()
        result = self.base_layer(x, *args, **kwargs)
        base_out = result if base.bias is None else result - base.bias
        for name in adapters:
            h = self.frod_dropout[name](x)
            replaced = base_out
            if _random(self.frod_dropout[name]):
                weight = base.weight.T if self.fan_in_fan_out else base.weight
                replaced = F.linear(h, weight.to(device=x.device, dtype=x.dtype))
            result = result + self._product(name, h) - replaced
        return result

    def _product(self, adapter: str, h: Tensor, bias: Tensor | None = None) -> Tensor:
        """FRoD_adapter(h) + bias."""
        pattern = self._pattern(adapter)
        device = h.device
        U, V = self.frod_U[adapter].to(device), self.frod_V[adapter].to(device)
        lam, values = self.frod_lambda_l[adapter].to(device), self.frod_lambda_s_values[adapter].to(device)
        dtype = h.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        # a bias of another dtype is added after the product, in the wider of the two, as PEFT does
        fused, late = (bias, None) if bias is None or bias.dtype == dtype else (None, bias)
        weight = self._weight(adapter, h, U, V, lam, values, pattern, dtype)
        if weight is not None:
            y = F.linear(h, weight, fused)
        else:
            y = frod_linear(h, U, V, lam, values, pattern, fused)
        return y if late is None else y + late

    def _weight(
        self,
        adapter: str,
        h: Tensor,
        U: Tensor,
        V: Tensor,
        lam: Tensor,
        values: Tensor,
        pattern: SparsePattern,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """The cached dense weight, in evaluation without gradients."""
        if self.training or not may_cache(h, lam, values):
            return None
        slot = self._slot()
        if slot.budget is None or slot.budget.limit == 0:
            return None
        cache = slot.caches.get(adapter)
        if cache is None:
            cache = slot.caches[adapter] = EvalCache(slot.budget)
        wide = torch.promote_types(U.dtype, dtype)  # rounding to the storage dtype would be seen in wider results

        def build() -> Tensor:
            return frod_weight(U.to(wide), V.to(wide), lam, values, pattern)

        return cache.get((lam, values), (U, V), (pattern,), build, dtype=dtype)

    # -- plans --------------------------------------------------------------------------------------------------

    def _pattern(self, adapter: str) -> SparsePattern:
        pattern = super()._pattern(adapter)
        if not torch.compiler.is_compiling() and self._fast is not None:
            origin = self._fast.origins.get(adapter)
            if origin is not None and not origin.at_rest(self.frod_V[adapter]):
                self._rejudge(adapter, origin)
        return pattern

    def _rejudge(self, adapter: str, known: Origin) -> None:
        """V is not what U was made from, as far as identity and version tell: moved, cast, or overwritten."""
        slot = self._slot()
        V = self.frod_V[adapter]
        if known.V() is not V and known.dtype != V.dtype:  # cast with the model: U was, too
            slot.origins[adapter] = origin_of(V)
            return
        verdict = judge(self, adapter, known, Bases())
        if verdict is None:  # W is out of reach: asking at every call would not help
            del slot.origins[adapter]
            return
        slot.origins[adapter] = verdict.origin
        if verdict.U is not None:
            self.frod_U[adapter] = verdict.U
            logger.warning("V of layer '%s', adapter '%s', was overwritten: U was derived again", slot.name, adapter)

    # -- everything that makes a remembered weight wrong, or useless ---------------------------------------------

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._drop_weights()
        super().set_adapter(*args, **kwargs)

    def enable_adapters(self, enabled: bool) -> None:
        self._drop_weights()
        super().enable_adapters(enabled)

    def update_layer(
        self, adapter_name: str, frod_V: Any, frod_s_indices: Any, frod_s_size: Any, **kwargs: Any
    ) -> None:
        """As PEFT's, but the new adapter gets projections of its own.

        PEFT hands a second adapter the first one's tensors, so that loading its file overwrites both.
        """
        super().update_layer(adapter_name, frod_V, frod_s_indices, frod_s_size, **kwargs)
        for store in (frod_V, frod_s_indices, frod_s_size):
            mine = store[adapter_name]
            if any(other is mine for name, other in store.items() if name != adapter_name):
                store[adapter_name] = mine.clone()
        slot = self._slot()
        slot.forget_all_but(set(self.frod_lambda_l) - {adapter_name})
        slot.origins[adapter_name] = origin_of(frod_V[adapter_name])

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self._drop_weights()
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        self._drop_weights()
        super().unmerge()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """PEFT's own arithmetic, so that a merged weight has the same bits; the pattern is checked before."""
        self._pattern(adapter)
        return super().get_delta_weight(adapter)
