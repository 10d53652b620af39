# SPDX-License-Identifier: Apache-2.0
"""HRA as modules: a frozen linear layer or convolution whose weight is rotated by chained Householder reflections."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frodkernels.functional._common import autocast_off
from frodkernels.functional._reflections import check_reflections
from frodkernels.functional.householder import householder
from frodkernels.functional.hra import hra_linear
from frodkernels.functional.hra_conv import correct_conv2d
from frodkernels.functional.hra_side import SIDES

Layer = TypeVar("Layer", bound="_HRA")


def initial_directions(n: int, r: int, symmetric: bool, generator: torch.Generator | None = None) -> Tensor:
    """u [n, r] in float32, random.

    ``symmetric`` repeats every direction, so that the reflections cancel in pairs and the adapted layer starts as the
    layer it adapts (r must be even).
    """
    if r < 1 or n < 1:
        raise ValueError(f"r and the layer's inputs must be at least 1, got r={r} and {n} inputs")
    u = torch.empty(n, (r + 1) // 2 if symmetric else r).uniform_(-1, 1, generator=generator)
    return torch.repeat_interleave(u, 2, dim=1)[:, :r] if symmetric else u


def zero_columns(u: Tensor) -> list[int]:
    """The columns of u [n, r] that are no directions: zero, or not finite. Synchronises."""
    length = torch.linalg.vector_norm(u.detach().double(), dim=0)
    return torch.nonzero(~(torch.isfinite(length) & (length > 0))).flatten().tolist()


def check_directions(u: Tensor, name: str = "u") -> None:
    """ValueError when a column of u [n, r] is no direction."""
    bad = zero_columns(u)
    if bad:
        raise ValueError(f"{name} has columns that are zero or not finite, which are no reflections: {bad[:8]}")


class _HRA(nn.Module):
    """What both layers share. ``base`` is the layer that is adapted: kept, not copied, and frozen."""

    def __init__(self, base: nn.Module, n: int, u: Tensor, orthogonalize: bool) -> None:
        super().__init__()
        check_reflections(u, n, orthogonalize)
        check_directions(u)
        self.base = base.requires_grad_(False)
        self.u = nn.Parameter(u.detach().clone())
        self.orthogonalize = orthogonalize

    @classmethod
    def _directions(
        cls, base: nn.Module, n: int, r: int, u: Tensor | None, orthogonalize: bool, generator: torch.Generator | None
    ) -> Tensor:
        if u is not None:
            return u
        weight = next((p for p in base.parameters() if p.is_floating_point()), None)
        made = initial_directions(n, r, symmetric=r % 2 == 0 and not orthogonalize, generator=generator)
        if weight is None:
            return made
        return made.to(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        u = state_dict.get(f"{prefix}u")
        if isinstance(u, Tensor) and u.dim() == 2 and not u.is_meta:
            check_directions(u, f"{prefix}u")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _rotated(self, weight: Tensor) -> Tensor:
        """W H for a weight [m, ...], in its dtype."""
        with torch.no_grad(), autocast_off(weight):
            return householder(weight.flatten(1), self.u, orthogonalize=self.orthogonalize).view_as(weight)


class HRALinear(_HRA):
    """``y = x (W H_1 ... H_r)^T + bias`` with the directions u of the reflections trainable, W frozen.

    Make one with :meth:`from_linear`. The base layer may be any module that maps [..., n] to [..., m]: one that is no
    plain ``torch.nn.Linear`` (quantised, offloaded), or that has hooks, is called on the reflected input and its weight
    is not touched.

    Attributes:
        u: [n, r] parameter. base: the frozen layer. orthogonalize: whether u's Gram-Schmidt basis is used.
        side: as for :func:`frodkernels.hra_linear`.

    Shapes: input [..., n], output [..., m].
    """

    def __init__(
        self,
        base: nn.Module,
        u: Tensor,
        *,
        orthogonalize: bool = False,
        side: str = "auto",
        in_features: int | None = None,
    ) -> None:
        n = getattr(base, "in_features", None) if in_features is None else in_features
        if not isinstance(base, nn.Module) or not isinstance(n, int):
            raise ValueError(f"base must be a linear layer with in_features, got {type(base).__name__}")
        if side not in ("auto", *SIDES):
            raise ValueError(f"side must be 'auto', 'input' or 'output', got {side!r}")
        super().__init__(base, n, u, orthogonalize)
        self.side = side

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        *,
        u: Tensor | None = None,
        orthogonalize: bool = False,
        side: str = "auto",
        generator: torch.Generator | None = None,
    ) -> HRALinear:
        """Adapt ``linear``, which is kept (not copied) and frozen.

        Args:
            linear: a ``torch.nn.Linear``, or a layer like one (``in_features``, callable on [..., n]).
            r: number of reflections. Even ones start in pairs that cancel, so that the layer starts unchanged; odd ones
                and ``orthogonalize`` start at random.
            u: [n, r] directions to start from instead.
            orthogonalize: train on u's Gram-Schmidt basis (PEFT's ``apply_GS``).
            side: as for :func:`frodkernels.hra_linear`.
            generator: for the random directions.

        Raises:
            ValueError: an argument of the wrong type or shape, or a zero column of u; names it.
        """
        n = getattr(linear, "in_features", None)
        if not isinstance(n, int):
            raise ValueError(f"linear must be a linear layer with in_features, got {type(linear).__name__}")
        return cls(
            linear, cls._directions(linear, n, r, u, orthogonalize, generator), orthogonalize=orthogonalize, side=side
        )

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        if plain_linear(base):
            return hra_linear(x, base.weight, self.u, base.bias, orthogonalize=self.orthogonalize, side=self.side)
        return base(householder(x, self.u, transpose=True, orthogonalize=self.orthogonalize))

    def merge(self) -> nn.Linear:
        """A plain ``torch.nn.Linear`` with the weight W H; this layer is not changed.

        Raises:
            ValueError: the base layer is no ``torch.nn.Linear``.
        """
        base = self.base
        if not isinstance(base, nn.Linear):
            raise ValueError(f"base must be a torch.nn.Linear to be merged, got {type(base).__name__}")
        weight = self._rotated(base.weight)
        merged = nn.Linear(
            base.in_features, base.out_features, base.bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            merged.weight.copy_(weight)
            if base.bias is not None:
                merged.bias.copy_(base.bias)
        return merged

    def extra_repr(self) -> str:
        return f"r={self.u.shape[1]}, orthogonalize={self.orthogonalize}, side={self.side!r}"


def plain_linear(base: nn.Module) -> bool:
    """Whether ``base`` is a ``torch.nn.Linear`` that nobody watches: its weight may be used without calling it."""
    return type(base) is nn.Linear and not watched(base)


def watched(base: nn.Module) -> bool:
    """Whether something else than the layer's own forward runs when it is called."""
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return bool(hooks) or "forward" in base.__dict__


class HRAConv2d(_HRA):
    """``conv2d(x, W H_1 ... H_r) + bias`` on W as the matrix [m, C kh kw], with u trainable, W frozen.

    Make one with :meth:`from_conv2d`. Non-square kernels, stride, padding and dilation are the base layer's.

    Attributes:
        u: [C kh kw, r] parameter. base: the frozen convolution. orthogonalize: whether u's Gram-Schmidt basis is used.

    Shapes: as the convolution.
    """

    base: nn.Conv2d

    def __init__(self, base: nn.Conv2d, u: Tensor, *, orthogonalize: bool = False) -> None:
        super().__init__(base, _patch(base, "base"), u, orthogonalize)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        r: int = 8,
        *,
        u: Tensor | None = None,
        orthogonalize: bool = False,
        generator: torch.Generator | None = None,
    ) -> HRAConv2d:
        """Adapt ``conv``, which is kept (not copied) and frozen; arguments as for :meth:`HRALinear.from_linear`.

        Raises:
            ValueError: an argument of the wrong type or shape, or a zero column of u; names it.
            NotImplementedError: a convolution with groups.
        """
        n = _patch(conv, "conv")
        return cls(conv, cls._directions(conv, n, r, u, orthogonalize, generator), orthogonalize=orthogonalize)

    def forward(self, x: Tensor) -> Tensor:
        return corrected(self.base(x), x, self.base, self.u, self.orthogonalize)

    def merge(self) -> nn.Conv2d:
        """A plain ``torch.nn.Conv2d`` with the weight W H; this layer is not changed."""
        base = self.base
        merged = nn.Conv2d(
            base.in_channels,
            base.out_channels,
            base.kernel_size,  # type: ignore[arg-type]
            base.stride,  # type: ignore[arg-type]
            base.padding,  # type: ignore[arg-type]
            base.dilation,  # type: ignore[arg-type]
            bias=base.bias is not None,
            padding_mode=base.padding_mode,
            device=base.weight.device,
            dtype=base.weight.dtype,
        )
        with torch.no_grad():
            merged.weight.copy_(self._rotated(base.weight))
            if merged.bias is not None and base.bias is not None:
                merged.bias.copy_(base.bias)
        return merged

    def extra_repr(self) -> str:
        return f"r={self.u.shape[1]}, orthogonalize={self.orthogonalize}"


def _patch(conv: nn.Module, name: str) -> int:
    """Inputs of one output pixel: C kh kw."""
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"{name} must be a torch.nn.Conv2d, got {type(conv).__name__}")
    if conv.groups > 1:
        raise NotImplementedError(f"HRA has no convolutions with groups > 1, got groups={conv.groups}")
    return conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]


def corrected(
    y: Tensor, x: Tensor, base: nn.Conv2d, u: Tensor, orthogonalize: bool, weight: Tensor | None = None
) -> Tensor:
    """The adapted convolution from ``y = base(x)``, in y's dtype. Calls nothing of ``base``, reads its weight.

    ``weight``: what to take for it instead.
    """
    padding: Any = base.padding
    if base.padding_mode != "zeros":  # as torch does it: pad first, then convolve without padding
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        padding = 0
    weight = (base.weight if weight is None else weight).to(y.dtype)
    return correct_conv2d(y, x.to(y.dtype), weight, u, base.stride, padding, base.dilation, orthogonalize)  # type: ignore[arg-type]
