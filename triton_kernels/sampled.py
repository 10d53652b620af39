# SPDX-License-Identifier: Apache-2.0
"""Sampled products and scatters in Triton.

    sampled_product  out[perm[p]] = sum_t a[indices[p], t] b[g, t]
    scatter_values_  weight[g, indices[p]] = scale values[perm[p]] (+ what it was)

with p over the slots indptr[g] .. indptr[g + 1] - 1 of a group. Every output has one owner and no atomic is used: two
runs give the same bits. ``docs/triton.md`` tells how the work is laid out and why.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from frodkernels.reference.sparse_core import accumulator

from ._config import FLAT, SAMPLED_TILES, SCATTER, sampled_grid
from .sampled_kernels import sampled_product_kernel, scatter_values_kernel
from .sparse_core import INTERPRETED, _check_plan, _device_guard, sparse_core_backward
from .sparse_core_kernels import reduce_partials_kernel

_LIMIT = 2**31 - 2**18  # sizes are counted in 32 bits, and the last range of features may end past the last feature
_TL = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,  # the interpreter multiplies bfloat16's bit patterns
}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size > _LIMIT:
            raise ValueError(f"{size} {name} exceed the Triton backend's limit of {_LIMIT}")


def load_unit(itemsize: int) -> int:
    """Elements of one load of the tiled product: 16 bytes."""
    return 16 // itemsize


def _operand(features: Tensor) -> tuple[Tensor, bool]:
    """`features` so that one axis is adjacent, stored up to a multiple of 16 bytes and aligned to it; is it the tokens?

    Both axes serve, so that [T, n] activations and [n, T] features are read where they are. What is not so is copied,
    its adjacent axis filled up with zeros: they add nothing, and every load stays 16 bytes wide.
    """
    unit = load_unit(features.element_size())
    for tokens, x in ((True, features), (False, features.t())):
        if x.stride(1) == 1 and not (x.stride(0) % unit or x.shape[1] % unit or x.data_ptr() % 16):
            return features, tokens
    tokens = features.stride(0) != 1
    x = features if tokens else features.t()
    rows, size = x.shape
    whole = x.new_empty(rows, triton.cdiv(size, unit) * unit)
    whole[:, :size] = x
    whole[:, size:] = 0
    return whole[:, :size] if tokens else whole[:, :size].t(), tokens


def _tiled_product(
    a: Tensor, b: Tensor, indptr: Tensor, indices: Tensor, perm: Tensor, out: Tensor, acc: torch.dtype
) -> None:
    (n, T), groups, nnz = a.shape, b.shape[0], indices.numel()
    _check_sizes(tokens=T, features=n, groups=groups)
    config = SAMPLED_TILES[8 if acc == torch.float64 else a.element_size()]
    rows, ranges, splits, per_range, per_split = sampled_grid(config, groups, n, T)
    (a, a_tokens), (b, b_tokens) = _operand(a), _operand(b)
    unit = load_unit(a.element_size())
    partial = out if splits == 1 else torch.empty(splits * nnz, dtype=acc, device=a.device)
    sampled_product_kernel[(rows, ranges, splits)](
        a,
        b,
        indptr,
        indices,
        perm,
        partial,
        T,
        n,
        groups,
        a.stride(0 if a_tokens else 1) // unit,
        b.stride(0 if b_tokens else 1) // unit,
        per_split,
        per_range,
        nnz,
        A_TOKENS=a_tokens,
        B_TOKENS=b_tokens,
        SPLIT=splits > 1,
        UNIT=unit,
        DOT=tl.float64 if acc == torch.float64 else _TL[a.dtype],
        ACC=_TL[acc],
        **config.launch(),
    )
    if splits > 1:
        reduce_partials_kernel[(triton.cdiv(nnz, FLAT["BLOCK"]),)](
            partial, perm, out, out, splits, nnz, nnz, NEED_DLAM=False, NEED_DVALUES=True, ACC=_TL[acc], **FLAT
        )


def sampled_product(
    a: Tensor, b: Tensor, indptr: Tensor, indices: Tensor, perm: Tensor, dtype: torch.dtype, tiled: bool = False
) -> Tensor:
    """``frodkernels::sampled_product`` on a CUDA device: a [n, T], b [groups, T] -> [nnz] in `dtype`.

    ``tiled``: products of dense blocks, of which only the entries are kept, instead of one inner product an entry.
    """
    with _device_guard(a, "a"):
        _check_plan({"a": a, "b": b}, indptr, indices, perm)
        groups, nnz = indptr.numel() - 1, indices.numel()
        if b.shape != (groups, a.shape[1]):
            raise ValueError(f"b must be [{groups}, {a.shape[1]}], got {list(b.shape)}")
        if b.dtype != a.dtype:
            raise ValueError(f"a is {a.dtype}, b is {b.dtype}: they must share a dtype")
        if not tiled:
            # the backward of the sparse core, asked for dvalues alone: of the values it needs the dtype
            values = a.new_empty(1, dtype=dtype).expand(nnz)
            return sparse_core_backward(a, b, None, values, indptr, indices, perm, [False, False, True])[2]
        out = a.new_empty(nnz, dtype=dtype)
        if nnz == 0 or a.shape[1] == 0:
            return out.zero_()
        acc = torch.float64 if dtype == torch.float64 else accumulator(a, b)
        _tiled_product(a, b, indptr, indices, perm, out, acc)
        return out


def scatter_values_(
    weight: Tensor,
    values: Tensor,
    indptr: Tensor,
    indices: Tensor,
    perm: Tensor,
    scale: float,
    accumulate: bool,
    old: Tensor | None,
) -> None:
    """``frodkernels::scatter_values_`` on a CUDA device, in place: weight [groups, n], values and old [nnz].

    Without ``accumulate``, with scale 1 and equal dtypes bits are copied; into ``old`` they always are.
    """
    with _device_guard(weight, "weight"):
        _check_plan({"weight": weight, "values": values, "old": old}, indptr, indices, perm)
        groups, nnz = indptr.numel() - 1, indices.numel()
        if weight.shape[0] != groups:
            raise ValueError(f"weight must be [{groups}, n], got {list(weight.shape)}")
        if old is not None and old.dtype != weight.dtype:
            raise ValueError(f"old must have weight's dtype, {weight.dtype}, got {old.dtype}")
        if nnz == 0:
            return
        acc = accumulator(weight, values)
        copy = not accumulate and scale == 1.0 and values.dtype == weight.dtype
        if copy:
            bits = _BITS[weight.element_size()]
            weight, values, old = weight.view(bits), values.view(bits), None if old is None else old.view(bits)
        scatter_values_kernel[(triton.cdiv(nnz, SCATTER["BLOCK"]),)](
            weight,
            values,
            indptr,
            indices,
            perm,
            old,
            float(scale),
            nnz,
            groups,
            (groups - 1).bit_length(),
            weight.stride(0),
            weight.stride(1),
            values.stride(0),
            0 if old is None else old.stride(0),
            COPY=copy,
            ACCUMULATE=accumulate,
            HAS_OLD=old is not None,
            ACC=_TL[acc],
            **SCATTER,
        )
