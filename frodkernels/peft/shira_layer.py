# SPDX-License-Identifier: Apache-2.0
"""PEFT's SHiRA layer with a fast forward: same parameters, keys, files and behaviour, no copy of W and no dense dW."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.shira.layer import Linear as PeftShiraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from frodkernels.functional._common import autocast_dtype
from frodkernels.functional.sampled import scatter_values_
from frodkernels.functional.sparse_delta import sparse_delta, sparse_delta_linear
from frodkernels.nn.eval_cache import EvalCache, may_cache
from frodkernels.pattern import SparsePattern
from frodkernels.peft.base_layer import plain_base
from frodkernels.peft.plan import Plan
from frodkernels.peft.planned import PlannedLayer, PlannedSlot
from frodkernels.peft.shira_merge import Merged, add, in_place, put_back, read
from frodkernels.peft.shira_plan import plan_adapter

logger = logging.getLogger("frodkernels")

_Entries = tuple[Tensor, SparsePattern, float]  # the values of an adapter, where they belong, what they are scaled by


class Slot(PlannedSlot):
    """What a fast layer can make again: its checked patterns and, in evaluation, a weight.

    cache    W and the active adapters' entries in one matrix; None: none, until accelerate() says how much it may hold.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.cache: EvalCache | None = None

    def drop_weights(self) -> None:
        if self.cache is not None:
            self.cache.drop()


class FastShiraLinear(PlannedLayer, PeftShiraLinear):
    """PEFT's ``shira.Linear`` on :func:`frodkernels.sparse_delta_linear`.

    Set as ``layer.__class__``: it has no ``__init__``, parameters, buffers or submodules of its own, so state-dict
    keys, saving, loading in plain PEFT, disabling and copying are PEFT's. A base layer that is no plain
    ``torch.nn.Linear``, or that has hooks, is called, and the sparse products are added.
    """

    _merged_from: tuple[Merged, ...] = ()  # unlike the slot it is copied, pickled and moved with the layer

    def _new_slot(self) -> Slot:
        return Slot()

    def _trained(self) -> nn.ParameterDict:
        return self.shira_weight

    def _indices(self, adapter: str) -> Tensor | None:
        return self.shira_indices.get(adapter)

    def _plan(self, adapter: str, name: str, earlier: Plan | None) -> Plan:
        return plan_adapter(self, adapter, name, earlier)

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        adapters = [self._entries(name, x.device) for name in self.active_adapters if name in self.shira_weight]
        if not plain_base(base):
            y = base(x, *args, **kwargs)
        else:
            weight, bias = base.weight.detach(), base.bias  # PEFT gives the base weight no gradient, either
            same = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
            if not adapters or (autocast_dtype(x) is None and not same):  # torch says which dtypes go together
                y = F.linear(x, weight, bias)
            else:
                cached = self._cached(adapters, x)
                if cached is not None:
                    return F.linear(x.to(cached.dtype), cached, None if bias is None else bias.to(cached.dtype))
                values, pattern, scale = adapters.pop(0)
                y = sparse_delta_linear(x, weight, values, pattern, bias, scale=scale)
        for values, pattern, scale in adapters:
            y = y + sparse_delta(x, values, pattern, scale=scale).to(y.dtype)
        return y

    def _entries(self, adapter: str, device: torch.device) -> _Entries:
        values, scale = self.shira_weight[adapter].to(device), self.scaling[adapter]
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):  # a tensor, say: PEFT multiplies by anything
            values, scale = values * scale, 1.0
        return values, self._pattern(adapter), scale

    def _cached(self, adapters: list[_Entries], x: Tensor) -> Tensor | None:
        """W with every adapter's entries added, in the dtype of the product; in evaluation without gradients."""
        slot, parameters = self._fast, tuple(values for values, _, _ in adapters)
        if self.training or slot is None or slot.cache is None or not may_cache(x, *parameters):
            return None
        weight = self.base_layer.weight

        def build() -> Tensor:
            whole = weight.detach().clone()
            for values, pattern, scale in adapters:
                scatter_values_(whole, values, pattern, scale=scale)
            return whole

        constants = tuple(constant for _, pattern, scale in adapters for constant in (pattern, scale))
        return slot.cache.get(parameters, (weight,), constants, build, dtype=autocast_dtype(x) or x.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """PEFT's sparse tensor; the indices are checked before."""
        self._pattern(adapter)
        return super().get_delta_weight(adapter)

    # -- merging ------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, but only the adapters' entries are touched, in place, and nothing changes when it fails."""
        if not self._in_place():
            self._drop_weights()
            super().merge(safe_merge, adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.shira_weight]
        for name in names:
            self._pattern(name)
        before = len(self.merged_adapters)
        try:
            for name in names:
                self._merge_one(name, safe_merge)
        except BaseException:
            while len(self.merged_adapters) > before:
                self._unmerge_last()
            raise

    def _in_place(self) -> bool:
        if self.quantization_backend is not None:
            return False
        return in_place(getattr(self.base_layer, "weight", None), (self.out_features, self.in_features))

    def _merge_one(self, name: str, safe: bool) -> None:
        self._drop_weights()
        weight = self.base_layer.weight.detach()
        with torch.inference_mode(False), torch.no_grad():
            values, pattern, scale = self._entries(name, weight.device)
            try:
                old, new = add(weight, values, pattern, scale, safe)
            except FloatingPointError:
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                ) from None
        self._keep((*self._merged_from, Merged(name, len(self.merged_adapters), pattern, old, new)))
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """The weight from before the merges, bit for bit. PEFT's arithmetic where the kept entries do not fit."""
        if not self.merged:
            super().unmerge()  # has a word to say about it
        while self.merged_adapters:
            self._unmerge_last()

    def _kept(self) -> Merged | None:
        """What undoes the last merge, if it was ours."""
        last = self._merged_from[-1] if self._merged_from else None
        return last if last is not None and last.below == len(self.merged_adapters) - 1 else None

    def _unmerge_last(self) -> None:
        self._drop_weights()
        name, kept = self.merged_adapters[-1], self._kept()
        with torch.inference_mode(False), torch.no_grad():
            fits = kept is not None and self._in_place() and put_back(self.base_layer.weight.detach(), kept)
            if not fits:
                if kept is not None:
                    logger.warning(
                        "the weight of layer '%s' was overwritten while adapter '%s' was merged into it: it is "
                        "unmerged by arithmetic, with rounding",
                        self._slot().name or self._get_name(),
                        name,
                    )
                if name in self.shira_weight:
                    weight = self.get_base_weight()
                    weight -= self.get_delta_weight(name)
                    self.set_base_weight(weight)
        self.merged_adapters.pop()
        if kept is not None:
            self._keep(self._merged_from[:-1])

    def _keep(self, merged: tuple[Merged, ...]) -> None:
        if merged:
            self._merged_from = merged
        else:
            self.__dict__.pop("_merged_from", None)

    def _merged_again(self) -> Callable[[], None]:
        """What writes the merged entries, as they are now, where a failed load has unmerged them."""
        if not self._in_place():
            return lambda: None
        weight = self.base_layer.weight.detach()
        ours = {merged.adapter: merged.pattern for merged in self._merged_from}
        names = [name for name in self.merged_adapters if name in ours or name in self.shira_weight]
        patterns = [ours.get(name) or self._pattern(name) for name in names]
        entries = [(pattern, read(weight, pattern)) for pattern in patterns]

        def merge() -> None:
            for pattern, there in entries:
                scatter_values_(self.base_layer.weight.detach(), there, pattern, accumulate=False)

        return merge

    def _release(self) -> None:
        """Undo our own merges, and forget all that PEFT's class does not know."""
        while self._kept() is not None:
            self._unmerge_last()
        self._keep(())
        self.__dict__.pop("_fast", None)

    def _apply(self, fn: Any, recurse: bool = True) -> FastShiraLinear:
        super()._apply(fn, recurse)
        if self._merged_from:
            moved = [merged.moved(fn) for merged in self._merged_from]
            self._keep(tuple(merged for merged in moved if merged is not None))
        return self
