# SPDX-License-Identifier: Apache-2.0
"""``frodkernels::sampled_product`` and ``frodkernels::scatter_values_``: schema, checks, shapes.

Features are rows: ``a`` is [n, T], ``b`` [groups, T], with any strides. The plan (indptr, indices, perm) is one
compressed view of a :class:`~frodkernels.SparsePattern`; see ``reference/sampled.py`` for the formulas. ``tiled`` asks
for dense products of small blocks of which the entries are kept, instead of one inner product an entry; None takes the
faster (``sampled_way.py``), here and not in the callers, where a traced graph has no sizes to compare. ``tiles`` is the
view's plan for tensor-core kernels (``csrc/tiles/tiles.h``); only the native CUDA kernels read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frodkernels import _backends, _ops
from frodkernels.ops.sampled_way import tiled_is_faster
from frodkernels.ops.sparse_core import (
    FLOATS,
    TENSOR_CORE_TOKENS,
    TENSOR_CORE_WORK,
    _check_plan,
    check_features,
)

SAMPLED = "sampled_product"
SCATTER = "scatter_values_"


def check_sampled(a: Tensor, b: Tensor, indptr: Tensor, indices: Tensor, perm: Tensor, dtype: torch.dtype) -> None:
    """The shapes and dtypes of ``sampled_product``; ValueError names the argument."""
    _check_plan(indptr, indices, perm)
    check_features(a, "a")
    check_features(b, "b", indptr.shape[0] - 1)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must hold equally many tokens, got {a.shape[1]} and {b.shape[1]}")
    if a.dtype != b.dtype:
        raise ValueError(f"a and b must share a dtype, got {a.dtype} and {b.dtype}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")


def check_scatter(
    weight: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, perm: Tensor, old: Tensor | None
) -> None:
    """The shapes and dtypes of ``scatter_values_``; ValueError names the argument."""
    _check_plan(indptr, indices, perm)
    nnz, groups = indices.shape[0], indptr.shape[0] - 1
    if weight.dim() != 2 or weight.shape[0] != groups:
        raise ValueError(f"weight must be [{groups}, n], got {list(weight.shape)}")
    for name, tensor in (("weight", weight), ("values", values), ("old", old)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    for name, tensor in (("values", values), ("old", old)):
        if tensor is not None and tensor.shape != (nnz,):
            raise ValueError(f"{name} must be [{nnz}], got {list(tensor.shape)}")
    if old is not None and old.dtype != weight.dtype:
        raise ValueError(f"old must have weight's dtype, {weight.dtype}, got {old.dtype}")


def _sampled_fake(a, b, indptr, indices, perm, dtype, tiled=None, tiles=None):
    check_sampled(a, b, indptr, indices, perm, dtype)
    return a.new_empty(indices.shape[0], dtype=dtype)


def _sampled_kernel(a, b, indptr, indices, perm, dtype, tiled=None, tiles=None):
    tiled = tiled_is_faster(indices.numel(), a, b) if tiled is None else tiled
    backend, run = _backends.implementation(SAMPLED, a.device.type)
    if backend != "native":
        return run(a, b, indptr, indices, perm, dtype, tiled)
    worthwhile = a.shape[1] >= TENSOR_CORE_TOKENS and indices.numel() * a.shape[1] >= TENSOR_CORE_WORK
    return run(a, b, indptr, indices, perm, dtype, tiled, tiles if worthwhile else None)


def _scatter_fake(weight, values, indptr, indices, perm, scale, accumulate, old):
    check_scatter(weight, values, indptr, indices, perm, old)


def _scatter_kernel(weight, values, indptr, indices, perm, scale, accumulate, old):
    _backends.implementation(SCATTER, weight.device.type)[1](
        weight, values, indptr, indices, perm, scale, accumulate, old
    )


_ops.register(
    SAMPLED,
    "(Tensor a, Tensor b, Tensor indptr, Tensor indices, Tensor perm, ScalarType dtype, bool? tiled=None,"
    " Tensor[]? tiles=None) -> Tensor",
    kernel=_sampled_kernel,
    fake=_sampled_fake,
)
_ops.register(
    SCATTER,
    "(Tensor(a!) weight, Tensor values, Tensor indptr, Tensor indices, Tensor perm, float scale, bool accumulate,"
    " Tensor(b!)? old) -> ()",
    kernel=_scatter_kernel,
    fake=_scatter_fake,
)

sampled_product = torch.ops.frodkernels.sampled_product.default
scatter_values_ = torch.ops.frodkernels.scatter_values_.default
