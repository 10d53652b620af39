# SPDX-License-Identifier: Apache-2.0
"""FRoD as a module: a linear layer whose weight is U (S + diag lam) V^T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frodkernels.functional._common import autocast_dtype, check_tensor
from frodkernels.functional._views import prepare
from frodkernels.functional.frod import frod_linear, frod_weight
from frodkernels.functional.frod_init import factor, joint_basis, random_pattern
from frodkernels.nn.eval_cache import CacheBudget, EvalCache, may_cache
from frodkernels.pattern import SparsePattern


class FrodLinear(nn.Module):
    """``y = x V (S + diag lam)^T U^T + bias`` with lam and the entries of S trainable, U and V frozen.

    Make one with :meth:`from_linear` (which reproduces the layer it replaces) or :meth:`from_factors`.

    In evaluation mode without gradients the dense weight is kept between calls (one [m, n] matrix a layer) and
    rebuilt when a parameter has changed, so that decoding costs one linear layer. ``cache_budget`` bounds it.

    Attributes:
        lam: [n] parameter. values: [nnz] parameter, in the pattern's COO order.
        U: [m, n] buffer. V: [n, n] buffer, the given tensor: layers made with one V share it until they are moved or
            cast one by one.
        bias: [m] parameter or None. pattern: the :class:`~frodkernels.SparsePattern` of S.

    The pattern is part of ``state_dict`` (as extra state), so that a layer made with another random pattern takes
    over the saved one.

    Shapes: input [..., n], output [..., m].
    """

    U: Tensor
    V: Tensor

    def __init__(
        self,
        U: Tensor,
        V: Tensor,
        lam: Tensor,
        values: Tensor,
        pattern: SparsePattern,
        bias: Tensor | None = None,
        *,
        path: str = "auto",
        cache_budget: CacheBudget | None = None,
    ) -> None:
        super().__init__()
        check_tensor(U, "U")
        with torch.enable_grad():  # every check, of a trainable U or V too, by the function that uses them
            frod_linear(U.new_empty(0, U.shape[-1]), U, V, lam, values, pattern, bias, path=path)
        self.register_buffer("U", U.detach())
        self.register_buffer("V", V.detach())
        self.lam = nn.Parameter(lam.detach().clone())
        self.values = nn.Parameter(values.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.pattern = pattern.to(U.device)
        prepare(self.pattern)
        self.path = path
        self._cache = EvalCache(cache_budget)

    @classmethod
    def from_factors(
        cls, U: Tensor, V: Tensor, lam: Tensor, values: Tensor, pattern: SparsePattern, bias: Tensor | None = None
    ) -> FrodLinear:
        """From given factors; shapes as in :func:`frodkernels.frod_linear`. U and V are kept, not copied.

        Raises:
            ValueError: a factor of the wrong type, shape, dtype or device; names it.
        """
        return cls(U, V, lam, values, pattern, bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        V: Tensor | None = None,
        pattern: SparsePattern | None = None,
        sparse_rate: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> FrodLinear:
        """The FRoD layer that computes what ``linear`` computes (S = 0), ready to be trained.

        Args:
            linear: the layer to replace; it is not changed.
            V: [n, n] basis, as made by :func:`frodkernels.nn.joint_basis` for a whole category; None: from this
                weight alone.
            pattern: [n, n] pattern of S; None: uniformly random off-diagonal positions, a fraction ``sparse_rate``.
            generator: of the random positions.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        weight = linear.weight.detach()
        V = joint_basis([weight]) if V is None else V
        pattern = random_pattern(weight.shape[1], sparse_rate, generator) if pattern is None else pattern
        U, lam = factor(weight, V.to(weight.device, weight.dtype))
        return cls(U, V.to(weight.device, weight.dtype), lam, weight.new_zeros(pattern.nnz), pattern, linear.bias)

    @property
    def in_features(self) -> int:
        return self.V.shape[0]

    @property
    def out_features(self) -> int:
        return self.U.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and may_cache(x, self.lam, self.values):
            dtype = autocast_dtype(x) or x.dtype
            parameters, frozen = (self.lam, self.values), (self.U, self.V)
            weight = self._cache.get(parameters, frozen, (self.pattern,), lambda: self._weight(dtype), dtype=dtype)
            if weight is not None:
                return F.linear(x.to(dtype), weight, None if self.bias is None else self.bias.to(dtype))
        return frod_linear(x, self.U, self.V, self.lam, self.values, self.pattern, self.bias, path=self.path)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        return frod_weight(self.U.to(dtype), self.V.to(dtype), self.lam, self.values, self.pattern)

    def merge(self) -> nn.Linear:
        """A plain ``torch.nn.Linear`` with the effective weight; this layer is not changed."""
        m, n = self.U.shape
        merged = nn.Linear(n, m, bias=self.bias is not None, device=self.U.device, dtype=self.U.dtype)
        with torch.no_grad():
            merged.weight.copy_(self._weight(self.U.dtype))
            if self.bias is not None:
                merged.bias.copy_(self.bias)
        return merged

    def invalidate(self) -> None:
        """Forget the evaluation cache: after a CUDA parameter, or U or V, was written through ``.data``."""
        self._cache.drop()

    def train(self, mode: bool = True) -> FrodLinear:
        if mode:
            self._cache.drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrodLinear:
        self._cache.drop()
        super()._apply(fn, recurse)
        if not self.U.is_meta:
            self.pattern = self.pattern.to(self.U.device)
            prepare(self.pattern)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache.drop()
        super()._load_from_state_dict(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """The pattern, [2, nnz] int64: values mean nothing without the positions they belong to."""
        return torch.stack(self.pattern.coo())

    def set_extra_state(self, indices: Tensor) -> None:
        """Take the pattern of a saved layer; ValueError when it does not fit, before anything is changed."""
        n = self.in_features
        pattern = SparsePattern.from_coo(indices, (n, n))
        if pattern.nnz != self.values.numel():
            raise ValueError(f"the saved pattern has {pattern.nnz} entries but values has {self.values.numel()}")
        self.pattern = pattern.to(self.pattern.device)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nnz={self.pattern.nnz}, density={self.pattern.density:.3g}, path={self.path!r}"
        )
