# SPDX-License-Identifier: Apache-2.0
"""SHiRA as a module: a frozen linear layer with a sparse, trainable change of its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frodkernels.functional._common import autocast_dtype
from frodkernels.functional._views import prepare
from frodkernels.functional.positions import random_positions
from frodkernels.functional.sampled import scatter_values_
from frodkernels.functional.sparse_delta import sparse_delta, sparse_delta_linear
from frodkernels.nn.eval_cache import CacheBudget, EvalCache, may_cache
from frodkernels.nn.hra import plain_linear
from frodkernels.pattern import SparsePattern


class SparseDeltaLinear(nn.Module):
    """``y = x (W + scale S)^T + bias`` with the entries of S trainable at fixed positions, W frozen.

    Make one with :meth:`from_linear`. The base layer may be any module that maps [..., n] to [..., m]: one that is no
    plain ``torch.nn.Linear`` (quantised, offloaded), or that has hooks, is called, and the sparse product is added.

    In evaluation mode without gradients a copy of W with S scattered into it is kept between calls (one [m, n] matrix
    a layer) and made again when a parameter has changed; ``cache_budget`` bounds it. :meth:`merge_` needs no copy: it
    scatters S into W itself, and :meth:`unmerge_` puts the old entries back, bit for bit. Two adapters of one layer
    switch that way at the price of their nonzeros.

    Attributes:
        values: [nnz] parameter, in the pattern's COO order. base: the frozen layer. scale: a number.
        pattern: the :class:`~frodkernels.SparsePattern` of S; part of ``state_dict`` (as extra state).
        merged: whether W holds S now.

    Shapes: input [..., n], output [..., m].
    """

    def __init__(
        self,
        base: nn.Module,
        values: Tensor,
        pattern: SparsePattern,
        *,
        scale: float = 1.0,
        cache_budget: CacheBudget | None = None,
    ) -> None:
        super().__init__()
        n = getattr(base, "in_features", None)
        if not isinstance(base, nn.Module) or not isinstance(n, int):
            raise ValueError(f"base must be a linear layer with in_features, got {type(base).__name__}")
        if not isinstance(values, Tensor):
            raise ValueError(f"values must be a tensor, got {type(values).__name__}")
        sparse_delta(
            values.new_empty(0, n), values, pattern, scale=scale
        )  # every check, by the function that uses them
        m = getattr(base, "out_features", pattern.shape[0])
        if pattern.shape[0] != m:
            raise ValueError(f"pattern must be {m} x {n} to match base, got {pattern.shape[0]} x {pattern.shape[1]}")
        self.base = base.requires_grad_(False)
        self.values = nn.Parameter(values.detach().clone())
        self.pattern = pattern.to(values.device)
        self.scale = float(scale)
        self._old: Tensor | None = None
        self._cache = EvalCache(cache_budget)
        self._register_state_dict_hook(_as_unmerged)
        prepare(self.pattern)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        *,
        pattern: SparsePattern | None = None,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> SparseDeltaLinear:
        """Adapt ``linear``, which is kept (not copied) and frozen; S starts at zero, so that nothing changes yet.

        Args:
            linear: a ``torch.nn.Linear``, or a layer like one (``in_features``, ``out_features``, callable).
            r: as many entries as a LoRA adapter of this rank has parameters, r (m + n), at random positions.
            pattern: [m, n] positions to train instead.
            scale: a number that multiplies S.
            generator: of the random positions.

        Raises:
            ValueError: an argument of the wrong type or shape; names it.
        """
        m, n = getattr(linear, "out_features", None), getattr(linear, "in_features", None)
        if not isinstance(m, int) or not isinstance(n, int):
            raise ValueError(f"linear must be a linear layer with in_features, got {type(linear).__name__}")
        if pattern is None:
            if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r * (m + n) <= m * n:
                raise ValueError(f"r must be a whole number with 1 <= r (m + n) <= m n, got {r!r} for {m} x {n}")
            pattern = random_positions(m, n, r * (m + n), generator)
        elif not isinstance(pattern, SparsePattern):
            raise ValueError(f"pattern must be a frodkernels.SparsePattern, got {type(pattern).__name__}")
        weight = next((p for p in linear.parameters() if p.is_floating_point()), None)
        wide = torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32
        device = None if weight is None else weight.device
        return cls(linear, torch.zeros(pattern.nnz, dtype=wide, device=device), pattern, scale=scale)

    @property
    def merged(self) -> bool:
        return self._old is not None

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        if self.merged:
            return base(x)
        if not plain_linear(base):
            y = base(x)
            return y + sparse_delta(x, self.values, self.pattern, scale=self.scale).to(y.dtype)
        if not self.training and may_cache(x, self.values):
            if x.shape[-1:] != (self.pattern.shape[1],):
                raise ValueError(f"x must be [..., {self.pattern.shape[1]}], got {list(x.shape)}")
            dtype = autocast_dtype(x) or x.dtype
            constants = (self.pattern, self.scale)
            weight = self._cache.get(
                (self.values,), (base.weight,), constants, lambda: self._weight(dtype), dtype=dtype
            )
            if weight is not None:
                return F.linear(x.to(dtype), weight, None if base.bias is None else base.bias.to(dtype))
        return sparse_delta_linear(x, base.weight, self.values, self.pattern, base.bias, scale=self.scale)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """W + scale S as a matrix of its own."""
        with torch.no_grad():
            weight = self.base.weight.detach().to(dtype, copy=True)  # type: ignore[operator]
            return scatter_values_(weight, self.values, self.pattern, scale=self.scale)

    def _linear(self) -> nn.Linear:
        base = self.base
        # a weight that is made anew at every call, or that is used for something else, has no place for S
        own = "weight" in base._parameters and type(base).forward is nn.Linear.forward
        if not isinstance(base, nn.Linear) or not own:
            raise ValueError(f"base must be a torch.nn.Linear to be merged, got {type(base).__name__}")
        return base

    def merge(self) -> nn.Linear:
        """A plain ``torch.nn.Linear`` with the weight W + scale S; this layer is not changed.

        Raises:
            ValueError: the base layer is no ``torch.nn.Linear``.
        """
        base = self._linear()
        weight = base.weight.detach().clone() if self.merged else self._weight(base.weight.dtype)
        merged = nn.Linear(
            base.in_features, base.out_features, base.bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            merged.weight.copy_(weight)
            if base.bias is not None:
                merged.bias.copy_(base.bias)
        return merged

    def merge_(self) -> SparseDeltaLinear:
        """Scatter S into W, in place, and remember the entries that it changes. Does nothing when merged.

        Raises:
            ValueError: the base layer is no ``torch.nn.Linear``.
        """
        weight = self._linear().weight.detach()
        if not self.merged:
            old = weight.new_empty(self.pattern.nnz)
            with torch.no_grad():
                scatter_values_(weight, self.values, self.pattern, scale=self.scale, old=old)
            self._old = old
            self._cache.drop()
        return self

    def unmerge_(self) -> SparseDeltaLinear:
        """Put back the entries of W that :meth:`merge_` changed, bit for bit. Does nothing when not merged."""
        if self._old is not None:
            weight = self._linear().weight.detach()
            scatter_values_(weight, self._old.to(weight.device, weight.dtype), self.pattern, accumulate=False)
            self._old = None
            self._cache.drop()
        return self

    def invalidate(self) -> None:
        """Forget the evaluation cache: after a CUDA parameter, or the base weight, was written through ``.data``."""
        self._cache.drop()

    def train(self, mode: bool = True) -> SparseDeltaLinear:
        if mode:
            self._cache.drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseDeltaLinear:
        self._cache.drop()
        super()._apply(fn, recurse)
        if self._old is not None:
            self._old = fn(self._old)
        if not self.values.is_meta:
            self.pattern = self.pattern.to(self.values.device)
            prepare(self.pattern)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        indices = state_dict.get(f"{prefix}_extra_state")
        if indices is not None:
            self._checked(indices)  # before anything is changed
        self._cache.drop()
        self.unmerge_()  # what is saved is the state of an unmerged layer
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """The pattern, [2, nnz] int64: values mean nothing without the positions they belong to."""
        return torch.stack(self.pattern.coo())

    def _checked(self, indices: Tensor) -> SparsePattern:
        pattern = SparsePattern.from_coo(indices, self.pattern.shape)
        if pattern.nnz != self.values.numel():
            raise ValueError(f"the saved pattern has {pattern.nnz} entries but values has {self.values.numel()}")
        return pattern

    def set_extra_state(self, indices: Tensor) -> None:
        """Take the pattern of a saved layer; ValueError when it does not fit."""
        pattern = self._checked(indices)
        self.unmerge_()
        self.pattern = pattern.to(self.pattern.device)

    def extra_repr(self) -> str:
        return f"nnz={self.pattern.nnz}, density={self.pattern.density:.3g}, scale={self.scale}, merged={self.merged}"


def _as_unmerged(layer: SparseDeltaLinear, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A merged layer saves W as it was before: loaded anywhere, S is in it once."""
    key = f"{prefix}base.weight"
    if layer._old is not None and key in state:
        weight = state[key].detach().clone()
        scatter_values_(weight, layer._old.to(weight.device, weight.dtype), layer.pattern, accumulate=False)
        state[key] = weight
