# SPDX-License-Identifier: Apache-2.0
"""PaCA as a module: a linear layer of whose weight a few input columns are trained, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from frodkernels.functional._common import check_tensor
from frodkernels.functional.paca import adapted, check_columns
from frodkernels.nn.hra import plain_linear


class PaCALinear(nn.Module):
    """``y = x W^T + bias`` with k columns of W trainable, the others frozen.

    Make one with :meth:`from_linear`. The optimiser sees the columns as one [m, k] parameter; every call first writes
    it into its place in W, k m numbers, so that both directions are one product with W and only x[:, columns] is kept
    for the backward. W is the base layer's own: training changes it, as PaCA does.

    Attributes:
        column_weight: [m, k] parameter. columns: [k] int64 buffer. weight: [m, n] frozen parameter, W.
        bias: [m] parameter (frozen) or None.

    Shapes: input [..., n], output [..., m].
    """

    columns: Tensor

    def __init__(self, weight: Tensor, columns: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError("weight must be an [m, n] floating-point matrix")
        columns = check_columns(columns, weight.shape[1]).to(weight.device)
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("columns", columns.clone())
        self.column_weight = nn.Parameter(self.weight.detach().index_select(1, self.columns))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        k: int = 8,
        *,
        columns: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PaCALinear:
        """Adapt ``linear``, whose weight and bias are taken over (not copied) and frozen.

        Args:
            linear: a ``torch.nn.Linear``; its weight changes as the columns are trained.
            k: how many columns to train, chosen at random (what the paper recommends).
            columns: [k] distinct positions below n to train instead.
            generator: of the random choice.

        Raises:
            ValueError: an argument of the wrong type, or bad columns; names it.
        """
        if not isinstance(linear, nn.Linear) or not plain_linear(linear):
            raise ValueError(f"linear must be a plain torch.nn.Linear without hooks, got {type(linear).__name__}")
        n = linear.in_features
        if columns is None:
            if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
                raise ValueError(f"k must be a whole number between 1 and {n}, got {k!r}")
            columns = torch.randperm(n, generator=generator)[:k].sort().values
        return cls(linear.weight, columns, linear.bias)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def _place(self) -> None:
        """Write the columns into W. Through ``data``: a layer that is called twice writes what is there already, and
        a parameter that was changed between forward and backward is noticed by its own version counter."""
        with torch.no_grad():
            self.weight.data.index_copy_(1, self.columns, self.column_weight.detach().to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(x, "x")
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., {self.in_features}], got {list(x.shape)}")
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("weight requires grad, but it is frozen in PaCA: train column_weight instead")
        placed = not torch.compiler.is_compiling()  # a graph should change nothing behind its inputs
        if placed:
            self._place()
        return adapted(x, self.weight, self.columns, self.column_weight, self.bias, placed=placed)

    def merge(self) -> nn.Linear:
        """A plain ``torch.nn.Linear`` with a copy of the present weight; this layer is not changed."""
        self._place()
        m, n = self.weight.shape
        merged = nn.Linear(n, m, self.bias is not None, device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            merged.weight.copy_(self.weight)
            if self.bias is not None:
                merged.bias.copy_(self.bias)
        return merged

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        columns = state_dict.get(f"{prefix}columns")
        if isinstance(columns, Tensor) and not columns.is_meta:
            check_columns(columns, self.in_features)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"columns={self.columns.numel()}, bias={self.bias is not None}"
        )
