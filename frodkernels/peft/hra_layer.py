# SPDX-License-Identifier: Apache-2.0
"""PEFT's HRA layers with a fast forward: same parameters, keys, files and behaviour, and no dense rotation."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.hra.layer import HRAConv2d as PeftHRAConv2d
from peft.tuners.hra.layer import HRALinear as PeftHRALinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from frodkernels.functional._common import autocast_dtype, autocast_off
from frodkernels.functional.householder import householder
from frodkernels.functional.hra import hra_linear
from frodkernels.nn.hra import corrected, watched, zero_columns
from frodkernels.ops.sparse_core import FLOATS
from frodkernels.peft.base_layer import plain_base, plain_tensor
from frodkernels.peft.hra_file import check_columns
from frodkernels.peft.hra_merge import MergedFrom, bits_of, mergeable, rotated, wide
from frodkernels.reference.sparse_core import accumulator

logger = logging.getLogger("frodkernels")

_Layer: Any = nn.Module  # and PEFT's HRALayer; a class is only changed for one that begins with the same base class


class FastHRA(_Layer):
    """What both layers share. Set as ``layer.__class__``: no ``__init__``, parameters, buffers or submodules.

    All that a layer remembers beyond PEFT's state is what its merged weight was made from, and only while it is merged.
    That is copied, pickled and moved with the layer.
    """

    _merged_from: MergedFrom | None = None  # the instance's own lives in its __dict__, unregistered

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.hra_u]
        u = self._directions(names, x.device) if names else None
        return self._adapted(x, u, args, kwargs).to(x.dtype)

    def _directions(self, names: list[str], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One chain [n, R] for W D_1 D_2 ..., the product that PEFT forms of several adapters.

        The Gram-Schmidt basis of an adapter with ``apply_GS`` is orthonormal: its reflections are a chain like any.
        """
        parts = []
        with autocast_off(self.hra_u[names[0]]):
            for name in names:
                u = self.hra_u[name].to(device, dtype)
                parts.append(gram_schmidt(u) if self.hra_apply_GS[name] else u)
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _adapted(self, x: Tensor, u: Tensor | None, args: tuple, kwargs: dict) -> Tensor:
        raise NotImplementedError

    def _dtype(self, x: Tensor, weight: Tensor | None, u: Tensor | None) -> torch.dtype:
        """What to cast x to. PEFT takes u's dtype, which for float32 u makes the large product one of float32."""
        if weight is None or weight.dtype not in FLOATS or autocast_dtype(x) is not None:
            return x.dtype
        if not self.cast_input_dtype_enabled:
            return weight.dtype
        wide = torch.promote_types(x.dtype, weight.dtype)
        return torch.float64 if u is not None and u.dtype == torch.float64 else wide

    # -- merging ------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, but rounded once, whatever the number of adapters, and nothing changes when it fails."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.hra_u]
        if not names:
            return
        base = self.get_base_layer()
        weight = mergeable(base).data
        start, before = weight, tuple(self.merged_adapters)
        with torch.no_grad():
            u = self._directions(names, weight.device, wide(weight)).detach().clone()
            made_from = self._merged_from if self.merged else None
            if made_from is not None and made_from.made(weight):
                start, before = made_from.weight.to(weight.device), made_from.before
                u = torch.cat([made_from.directions.to(weight.device), u], 1)
            merged = rotated(start, u)
        if safe_merge and not torch.isfinite(merged).all():
            broken = [name for name in names if zero_columns(self.hra_u[name])] or names
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(broken)} seems to be broken")
        base.weight.data = merged
        self._merged_from = MergedFrom(start, u, before, bits_of(merged))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """The weight from before the merge, bit for bit. PEFT's arithmetic where there is none that fits."""
        if self.merged:
            self._put_back()
            if not self.merged:
                return
        super().unmerge()

    def _put_back(self) -> None:
        """Undo our own merges, if any."""
        made_from = self.__dict__.pop("_merged_from", None)
        if made_from is None:
            return
        weight = self.get_base_layer().weight
        if not made_from.made(weight):
            logger.warning(
                "the weight of a merged HRA layer (%s) was overwritten: it is unmerged by arithmetic, with rounding",
                ", ".join(self.merged_adapters),
            )
            return
        weight.data = made_from.weight.to(weight.device)
        del self.merged_adapters[len(made_from.before) :]

    def get_delta_weight(self, adapter_name: str, reverse: bool = False) -> Tensor:
        """The dense rotation D [n, n] in u's dtype, or its inverse; nothing here needs it but PEFT's own arithmetic."""
        u = self.hra_u[adapter_name]
        eye = torch.eye(u.shape[0], device=u.device, dtype=u.dtype)
        with torch.autocast(u.device.type, enabled=False):
            return householder(eye, self._directions([adapter_name], u.device), transpose=reverse)

    # -- moves and loads ----------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        made_from = self._merged_from
        ours = made_from is not None and made_from.made(self.get_base_layer().weight)
        super()._apply(fn, recurse)
        if made_from is not None and ours:
            self.__dict__.pop("_merged_from", None)
            moved = made_from.moved(fn, self.get_base_layer().weight)
            if moved is not None:
                self._merged_from = moved
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.hra_u:
            key = f"{prefix}hra_u.{name}"
            u = state_dict.get(key)
            if isinstance(u, Tensor) and plain_tensor(u) and u.dim() == 2 and not u.is_meta:
                check_columns(u, f"'{key}'")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class FastHRALinear(FastHRA, PeftHRALinear):
    """PEFT's ``hra.HRALinear`` on :func:`frodkernels.hra_linear`.

    A base layer that is no plain ``torch.nn.Linear``, or that has hooks, is called, on the reflected input.
    """

    def _adapted(self, x: Tensor, u: Tensor | None, args: tuple, kwargs: dict) -> Tensor:
        base = self.base_layer
        if not plain_base(base):
            return self._called(x, u, args, kwargs)
        weight, bias, late = base.weight.detach(), base.bias, None  # PEFT gives the base weight no gradient, either
        if autocast_dtype(x) is None:
            dtype = self._dtype(x, weight, u)
            x, weight = x.to(dtype), weight.to(dtype)
            bias, late = split_bias(bias, dtype)
        y = F.linear(x, weight, bias) if u is None else hra_linear(x, weight, u, bias)
        return y if late is None else y + late

    def _called(self, x: Tensor, u: Tensor | None, args: tuple, kwargs: dict) -> Tensor:
        """base(x H^T): the base layer meets the dtype that it would meet without an adapter."""
        weight = getattr(self.get_base_layer(), "weight", None)
        x = x.to(self._dtype(x, weight, u))
        if u is not None:
            with torch.autocast(x.device.type, enabled=False):
                x = householder(x, u, transpose=True)
        if weight is not None and weight.dtype in FLOATS and autocast_dtype(x) is None:
            x = x.to(weight.dtype)
        return self.base_layer(x, *args, **kwargs)


class FastHRAConv2d(FastHRA, PeftHRAConv2d):
    """PEFT's ``hra.HRAConv2d`` on the base layer's own convolution, corrected by one with r filters.

    Stride, padding, dilation and padding mode are the base layer's, as in PEFT's merged layer.
    """

    def _adapted(self, x: Tensor, u: Tensor | None, args: tuple, kwargs: dict) -> Tensor:
        conv = self.base_layer
        autocast = autocast_dtype(x) is not None
        if not plain_conv(conv):
            y = self.base_layer(x if autocast else x.to(conv.weight.dtype), *args, **kwargs)
            return y if u is None else corrected(y, x, conv, u, False)
        weight, bias, late = conv.weight.detach(), conv.bias, None
        if not autocast:
            dtype = self._dtype(x, weight, u)
            x, weight = x.to(dtype), weight.to(dtype)
            bias, late = split_bias(bias, dtype)
        y = conv._conv_forward(x, weight, bias)
        if u is not None:
            y = corrected(y, x, conv, u, False, weight)
        return y if late is None else y + late.reshape(-1, 1, 1)


def gram_schmidt(u: Tensor) -> Tensor:
    """An orthonormal basis of u's columns, in the accumulator's dtype; NaN where a column is zero."""
    exact = u.to(wide(u))
    norms = torch.linalg.vector_norm(exact, dim=0)
    basis = torch.linalg.qr(exact / norms).Q  # its signs do not matter to reflections
    return (basis + (norms - norms) / norms).to(accumulator(u, u))


def plain_conv(base: nn.Module) -> bool:
    """Whether the weight of a convolution may be used without calling it."""
    return type(base) is nn.Conv2d and not watched(base)


def split_bias(bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(bias to be added in the product in ``dtype``, bias to be added after it): a wider one is not to be rounded."""
    if bias is not None and torch.promote_types(bias.dtype, dtype) != dtype:
        return None, bias
    return None if bias is None else bias.to(dtype), None
