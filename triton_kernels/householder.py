# SPDX-License-Identifier: Apache-2.0
"""Chained Householder reflections in Triton: tall-skinny products over tokens, [T, features] by [features, r].

    householder           coefficients = x left;  out = base - coefficients right^T
    householder_backward  q = g left;  dx = base - q right^T;  sum_x = x^T q;  sum_g = g^T coefficients
    householder_gradient  x^T q

Every output has one owner and no atomic is used: two runs give the same bits. ``docs/triton.md`` tells how the work is
laid out and why.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from frodkernels.reference.sparse_core import accumulator

from ._config import (
    FLAT,
    HOUSEHOLDER_FUSED_TILES,
    HOUSEHOLDER_GRADIENT_PROGRAMS,
    MOST_RANKS,
    HouseholderConfig,
    householder_config,
    householder_kind,
    householder_splits,
)
from .householder_kernels import (
    householder_gradient_kernel,
    householder_kernel,
    householder_project_kernel,
    householder_reduce_kernel,
    householder_update_kernel,
)
from .sparse_core import INTERPRETED, _device_guard

_LIMIT = 2**31 - 1024  # tokens and features are counted in 32 bits, and a program looks a few past its last
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TL = {torch.float32: tl.float32, torch.float64: tl.float64}
_PART = tl.float32 if INTERPRETED else tl.bfloat16


def _check(features: dict[str, tuple[Tensor, int, int]], factors: dict[str, tuple[Tensor, int]], rank: int) -> None:
    """What memory safety needs; the registered op has checked the rest. Shapes that are expected stand beside each."""
    first, T, _ = next(iter(features.values()))
    if rank > MOST_RANKS:
        raise NotImplementedError(f"rank {rank}: the Triton kernels serve ranks up to {MOST_RANKS}; use the reference")
    for name, (tensor, rows, columns) in {**features, **{k: (t, n, rank) for k, (t, n) in factors.items()}}.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, the features are on {first.device}")
        if tensor.shape != (rows, columns):
            raise ValueError(f"{name} must be [{rows}, {columns}], got {list(tensor.shape)}")
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}; float32, float64, bfloat16 and float16 are served")
        if name in features and tensor.dtype != first.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the other features are {first.dtype}")
        if name in factors and rows * rank > _LIMIT:
            raise ValueError(f"{name} has {rows * rank} elements, the Triton backend's limit is {_LIMIT}")
    for name, size in (("tokens", T), *(("features", columns) for _, _, columns in features.values())):
        if size > _LIMIT:
            raise ValueError(f"{size} {name} exceed the Triton backend's limit of {_LIMIT}")


def _rows(features: Tensor) -> Tensor:
    """Adjacent features adjacent in memory: every program reads whole pieces of rows."""
    return features if features.stride(1) == 1 or features.shape[1] == 1 else features.contiguous()


def _factor(factor: Tensor, acc: torch.dtype) -> Tensor:
    return factor.to(acc).contiguous()


def feature_parts(features: torch.dtype) -> int:
    """How many bfloat16 numbers sum to any number of `features`: what a sum in fp32 multiplies is cut into them."""
    return {torch.bfloat16: 1, torch.float16: 2}.get(features, 3)


def update_parts(features: torch.dtype) -> int:
    """Parts of the coefficients and of right: two where the rounding of out to 16 bits leaves nothing of the third."""
    return 2 if features.itemsize == 2 else 3


def _itemsize(features: Tensor, acc: torch.dtype) -> int:
    """What the table of tiles goes by."""
    return 8 if acc == torch.float64 else min(features.element_size(), 4)


def _settings(x: Tensor, rank: int, acc: torch.dtype, config: HouseholderConfig) -> dict[str, Any]:
    return {"RANK": rank, "X_PARTS": feature_parts(x.dtype), "PART": _PART, "ACC": _TL[acc], **config.launch()}


def householder(x: Tensor, left: Tensor, right: Tensor | None, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``frodkernels::householder`` on a CUDA device: (out [T, m] in x's dtype, coefficients [T, r]).

    ``x`` [T, n], ``left`` [n, r], ``right`` [m, r], ``base`` [T, m]: m = n and x itself where it is None. Without
    ``right``, ``out`` is an empty [0]. Ranks above 128 raise NotImplementedError.
    """
    with _device_guard(x, "x"):
        (T, n), rank = x.shape, left.shape[1]
        m = n if base is None else base.shape[1]
        features = {"x": (x, T, n)} if base is None else {"x": (x, T, n), "base": (base, T, m)}
        factors = {"left": (left, n)} if right is None else {"left": (left, n), "right": (right, m)}
        _check(features, factors, rank)
        acc = accumulator(x, left)
        coefficients = torch.empty(T, rank, dtype=acc, device=x.device)
        out = x.new_empty(0) if right is None else x.new_empty(T, m)
        if T == 0 or n == 0 or rank == 0:
            if right is not None:
                out.copy_(x if base is None else base)
            return out, coefficients.zero_()
        x = _rows(x)
        base = x if base is None else _rows(base)
        left = _factor(left, acc)
        right = None if right is None else _factor(right, acc)
        config = householder_config(householder_kind(T), _itemsize(x, acc), rank)
        settings = _settings(x, rank, acc, config)
        parts = update_parts(x.dtype)
        tiles, blocks = triton.cdiv(T, config.block_t), triton.cdiv(n, config.block_n)
        splits = 1 if tiles >= HOUSEHOLDER_FUSED_TILES else householder_splits(tiles, blocks)
        if splits == 1 and right is not None:
            householder_kernel[(tiles,)](
                x, left, right, base, coefficients, out, T, n, m, x.stride(0), base.stride(0), PARTS=parts, **settings
            )
            return out, coefficients
        partial = coefficients if splits == 1 else coefficients.new_empty(splits, T, rank)
        householder_project_kernel[(tiles, splits)](
            x, left, partial, T, n, x.stride(0), triton.cdiv(blocks, splits), **settings
        )
        if splits > 1:
            columns = 0 if right is None else m
            factor = left if right is None else right  # an address that is not read where there are no columns
            out_blocks = max(triton.cdiv(columns, config.block_n), 1)
            per_split = triton.cdiv(out_blocks, householder_splits(tiles, out_blocks))
            del settings["X_PARTS"]
            householder_update_kernel[(tiles, triton.cdiv(out_blocks, per_split))](
                partial, factor, base, coefficients, out, T, columns, base.stride(0), per_split,
                SPLITS=splits, PARTS=parts, **settings,
            )  # fmt: skip
        return out, coefficients


def _sums(x: Tensor, q: Tensor, g: Tensor | None = None, coefficients: Tensor | None = None) -> Tensor:
    """x^T q, or x^T q + g^T coefficients: [n, r] in q's dtype."""
    (T, n), rank = x.shape, q.shape[1]
    sums = torch.empty(n, rank, dtype=q.dtype, device=x.device)
    if sums.numel() == 0 or T == 0:
        return sums.zero_()
    x, q = _rows(x), q.contiguous()
    g = None if g is None else _rows(g)
    config = householder_config("gradient", _itemsize(x, q.dtype), rank)
    tiles, blocks = triton.cdiv(T, config.block_t), triton.cdiv(n, config.block_n)
    per_split = triton.cdiv(tiles, householder_splits(blocks, tiles, HOUSEHOLDER_GRADIENT_PROGRAMS))
    splits = triton.cdiv(tiles, per_split)
    partial = sums if splits == 1 else sums.new_empty(splits, n, rank)
    householder_gradient_kernel[(blocks, splits)](
        x, q, g, coefficients, partial, T, n, x.stride(0), 0 if g is None else g.stride(0), per_split,
        HAS_G=g is not None, **_settings(x, rank, q.dtype, config),
    )  # fmt: skip
    if splits > 1:
        grid = (triton.cdiv(sums.numel(), FLAT["BLOCK"]),)
        householder_reduce_kernel[grid](partial, sums, splits, sums.numel(), ACC=_TL[q.dtype], **FLAT)
    return sums


def householder_backward(
    g: Tensor, x: Tensor, coefficients: Tensor, left: Tensor, right: Tensor, base: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``frodkernels::householder_backward`` on a CUDA device: (dx [T, n], q [T, r], sum_x [n, r], sum_g [m, r]).

    ``g`` [T, m], ``x`` [T, n], ``coefficients`` [T, r], ``left`` [m, r], ``right`` [n, r], ``base`` [T, n]: m = n and g
    itself where it is None, and then sum_x holds both sums and sum_g is an empty [0]. What ``needs`` (dx, the sums)
    does not ask for is empty too. Ranks above 128 raise NotImplementedError.
    """
    with _device_guard(g, "g"):
        (T, m), n, rank = g.shape, x.shape[1], left.shape[1]
        features = {"g": (g, T, m), "x": (x, T, m if base is None else n)}
        if base is not None:
            features["base"] = (base, T, n)
        _check(features, {"left": (left, m), "right": (right, n)}, rank)
        dx, q = householder(g, left, right if needs[0] else None, base)
        if coefficients.shape != q.shape or coefficients.dtype != q.dtype or coefficients.device != q.device:
            raise ValueError(f"coefficients must be {list(q.shape)} in {q.dtype} on {q.device}")
        if not needs[1]:
            return dx, q, q.new_empty(0), q.new_empty(0)
        coefficients = coefficients.contiguous()
        if base is None:
            return dx, q, _sums(x, q, g, coefficients), q.new_empty(0)
        return dx, q, _sums(x, q), _sums(g, coefficients)


def householder_gradient(x: Tensor, q: Tensor) -> Tensor:
    """``frodkernels::householder_gradient`` on a CUDA device: x^T q [n, r] in q's dtype (float32 or float64).

    ``x`` [T, n], ``q`` [T, r]. Ranks above 128 raise NotImplementedError.
    """
    with _device_guard(x, "x"):
        T, n = x.shape
        if q.dtype not in _TL:
            raise ValueError(f"q is {q.dtype}; it must be float32 or float64")
        _check({"x": (x, T, n)}, {}, q.shape[1])
        if q.shape[0] != T or q.device != x.device:
            raise ValueError(f"q must be [{T}, r] on {x.device}, got {list(q.shape)} on {q.device}")
        return _sums(x, q)
