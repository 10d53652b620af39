# SPDX-License-Identifier: Apache-2.0
"""``frodkernels::sparse_core`` and ``frodkernels::sparse_core_backward``: schema, checks, shapes.

Features are rows: a matrix of features is logically [features, T], with any strides. The plan (indptr, indices, perm)
is one compressed view of a :class:`~frodkernels.SparsePattern`; see ``reference/sparse_core.py`` for the formulas.
``tiles`` is the view's plan for tensor-core kernels (``csrc/tiles/tiles.h``); only the native CUDA kernels read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frodkernels import _backends, _ops, dense
from frodkernels.ops.sampled_way import tiled_is_faster
from frodkernels.reference.sparse_core import accumulator, new_features

FORWARD = "sparse_core"
BACKWARD = "sparse_core_backward"

# From so many tokens, and products of an entry with a token, the tensor-core kernels are the faster ones on CUDA: with
# fewer, packing the entries and filling the pipeline cost more. Modelled, by `python -m bench.roofline --dispatch`.
TENSOR_CORE_TOKENS = 96
TENSOR_CORE_WORK = 15 * 10**6

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_features(features: Tensor, name: str, rows: int | None = None) -> None:
    """``features`` must be a [rows, T] floating-point matrix."""
    if features.dim() != 2 or (rows is not None and features.shape[0] != rows):
        raise ValueError(f"{name} must be [{'features' if rows is None else rows}, T], got {list(features.shape)}")
    if features.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {features.dtype}")


def check_entries(lam: Tensor | None, values: Tensor, nnz: int, n: int) -> None:
    """``lam`` must be [n] and ``values`` [nnz], floating point."""
    for name, tensor, size in (("lam", lam, n), ("values", values, nnz)):
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.shape[0] != size:
            raise ValueError(f"{name} must be [{size}], got {list(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def _check_plan(indptr: Tensor, indices: Tensor, perm: Tensor) -> None:
    if indptr.dim() != 1 or indptr.shape[0] < 1 or indptr.dtype != torch.int32:
        raise ValueError(f"indptr must be a 1-D int32 tensor, got {indptr.dtype} {list(indptr.shape)}")
    if indices.dim() != 1 or indices.dtype not in (torch.uint16, torch.int32):
        raise ValueError(f"indices must be a 1-D uint16 or int32 tensor, got {indices.dtype} {list(indices.shape)}")
    if perm.shape != indices.shape or perm.dtype != torch.int32:
        raise ValueError(f"perm must be int32 {list(indices.shape)}, got {perm.dtype} {list(perm.shape)}")


def check_forward(z: Tensor, lam: Tensor | None, values: Tensor, indptr: Tensor, indices: Tensor, perm: Tensor) -> None:
    """The shapes and dtypes of ``sparse_core``; ValueError names the argument."""
    _check_plan(indptr, indices, perm)
    groups = indptr.shape[0] - 1
    check_features(z, "z", None if lam is None else groups)
    check_entries(lam, values, indices.shape[0], groups)


def check_backward(
    u: Tensor, z: Tensor, lam: Tensor | None, values: Tensor, indptr: Tensor, indices: Tensor, perm: Tensor
) -> None:
    """The shapes and dtypes of ``sparse_core_backward``; ValueError names the argument."""
    _check_plan(indptr, indices, perm)
    groups = indptr.shape[0] - 1
    check_features(z, "z", groups)
    check_features(u, "u", None if lam is None else groups)
    if u.shape[1] != z.shape[1]:
        raise ValueError(f"u and z must hold equally many tokens, got {u.shape[1]} and {z.shape[1]}")
    if u.dtype != z.dtype:
        raise ValueError(f"u and z must share a dtype, got {u.dtype} and {z.dtype}")
    check_entries(lam, values, indices.shape[0], groups)


def _forward_fake(z, lam, values, indptr, indices, perm, token_major=False, tiles=None):
    check_forward(z, lam, values, indptr, indices, perm)
    return new_features(z, indptr.shape[0] - 1, token_major)


def _backward_fake(u, z, lam, values, indptr, indices, perm, needs, token_major=False, tiles=None):
    check_backward(u, z, lam, values, indptr, indices, perm)
    dlam_dtype = accumulator(u, values) if lam is None else lam.dtype
    return (
        new_features(u, indptr.shape[0] - 1, token_major) if needs[0] else u.new_empty(0),
        values.new_empty(z.shape[0] if needs[1] and lam is not None else 0, dtype=dlam_dtype),
        values.new_empty(values.shape[0] if needs[2] else 0),
    )


def _worthwhile(tiles: list[Tensor] | None, features: Tensor, values: Tensor) -> list[Tensor] | None:
    T = features.shape[1]
    return tiles if T >= TENSOR_CORE_TOKENS and values.numel() * T >= TENSOR_CORE_WORK else None


def _forward_kernel(z, lam, values, indptr, indices, perm, token_major=False, tiles=None):
    backend, run = _backends.implementation(FORWARD, z.device.type)
    if backend != "native":
        return run(z, lam, values, indptr, indices, perm, token_major)
    if dense.dense_is_faster(z, lam, values, indptr):
        return dense.sparse_core(z, lam, values, indptr, indices, perm, token_major)
    return run(z, lam, values, indptr, indices, perm, token_major, _worthwhile(tiles, z, values))


def _backward_kernel(u, z, lam, values, indptr, indices, perm, needs, token_major=False, tiles=None):
    backend, run = _backends.implementation(BACKWARD, u.device.type)
    if backend != "native":
        return run(u, z, lam, values, indptr, indices, perm, needs, token_major)
    plan, dvalues = (indptr, indices, perm), None
    if needs[2] and tiled_is_faster(values.numel(), u, z):
        # so many entries that dense blocks sample them faster than the pass that makes dz
        dvalues = _backends.implementation("sampled_product", u.device.type)[1](u, z, *plan, values.dtype, True)
        needs = [needs[0], needs[1], False]
    if dense.dense_is_faster(u, lam, values, indptr):
        dz, dlam, rest = dense.sparse_core_backward(u, z, lam, values, *plan, needs, token_major)
    else:
        dz, dlam, rest = run(u, z, lam, values, *plan, needs, token_major, _worthwhile(tiles, u, values))
    return dz, dlam, rest if dvalues is None else dvalues


_ops.register(
    FORWARD,
    "(Tensor z, Tensor? lam, Tensor values, Tensor indptr, Tensor indices, Tensor perm, bool token_major=False,"
    " Tensor[]? tiles=None) -> Tensor",
    kernel=_forward_kernel,
    fake=_forward_fake,
)
_ops.register(
    BACKWARD,
    "(Tensor u, Tensor z, Tensor? lam, Tensor values, Tensor indptr, Tensor indices, Tensor perm, bool[3] needs,"
    " bool token_major=False, Tensor[]? tiles=None) -> (Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)

sparse_core = torch.ops.frodkernels.sparse_core.default
sparse_core_backward = torch.ops.frodkernels.sparse_core_backward.default


def adds_in_place(features: Tensor, values: Tensor) -> bool:
    """Whether :func:`sparse_core_add_` serves calls like this: eager ones on the CPU that nothing watches."""
    if features.device.type != "cpu" or (values.dtype == torch.float64 and features.dtype != torch.float64):
        return False
    return _ops.unwatched(features, values) and _backends.select(FORWARD, "cpu") == "native"


def sparse_core_add_(out: Tensor, z: Tensor, values: Tensor, plan: Sequence[Tensor]) -> None:
    """``out`` [rows, T] += S z, in place; the sum is rounded to out's dtype twice."""
    _ops.native("sparse_core_add_")(out, z, values, *plan)


def sparse_core_backward_add_(
    dz: Tensor, u: Tensor, z: Tensor, values: Tensor, plan: Sequence[Tensor], want_values: bool
) -> Tensor:
    """``dz`` += S^T u, in place, and dvalues (empty where not wanted) from the same pass; the columns' view."""
    if not (want_values and tiled_is_faster(values.numel(), u, z)):
        return _ops.native("sparse_core_backward_add_")(dz, u, z, values, *plan, want_values)
    _ops.native("sparse_core_backward_add_")(dz, u, z, values, *plan, False)
    return _ops.native("sampled_product")(u, z, *plan, values.dtype, True)
