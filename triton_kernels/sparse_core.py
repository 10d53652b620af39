# SPDX-License-Identifier: Apache-2.0
"""The sparse core in Triton: w = (S + diag lam) z and its fused backward, features by tokens.

    sparse_core           out[i, t]  = lam[i] z[i, t] + sum_p values[perm[p]] z[indices[p], t]
    sparse_core_backward  dz[j, t]   = lam[j] u[j, t] + sum_p values[perm[p]] u[indices[p], t]
                          dlam[j]    = sum_t u[j, t] z[j, t]
                          dvalues[k] = sum_t u[indices[p], t] z[j, t],  k = perm[p]

with p over the slots indptr[i] .. indptr[i + 1] - 1 of a group. Every output has one owner and no atomic is used: two
runs give the same bits. ``docs/triton.md`` tells how the work is laid out and why.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from frodkernels.reference.sparse_core import accumulator, new_features

from ._config import FLAT, MAX_GRID_Y, TileConfig, tile_config, token_splits
from .sparse_core_kernels import (
    gather_values_kernel,
    reduce_partials_kernel,
    sparse_core_bwd_kernel,
    sparse_core_fwd_kernel,
)

_LIMIT = 2**31 - 1024  # tokens and slots are counted in 32 bits, and a program looks a few past its last

INTERPRETED = not isinstance(sparse_core_fwd_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at import


def _device_guard(features: Tensor, name: str) -> contextlib.AbstractContextManager:
    if features.is_cuda:
        return torch.cuda.device(features.device)
    if INTERPRETED and features.device.type == "cpu":
        return contextlib.nullcontext()
    raise ValueError(f"{name} is on {features.device}: the Triton backend runs on CUDA (and ROCm) devices only")


def _check_plan(named: dict[str, Tensor | None], indptr: Tensor, indices: Tensor, perm: Tensor) -> None:
    """One device for everything, the first of `named`; a plan that can be read as it is, of entries that fit."""
    first, tensor = next(iter(named.items()))
    device = tensor.device
    plan = {"indptr": indptr, "indices": indices, "perm": perm}
    for name, other in {**named, **plan}.items():
        if other is not None and other.device != device:
            raise ValueError(f"{name} is on {other.device}, {first} is on {device}")
    nnz = indices.numel()
    for name, other in (("values", named.get("values")), ("old", named.get("old")), ("perm", perm)):
        if other is not None and other.shape != (nnz,):
            raise ValueError(f"{name} must be [{nnz}], got {list(other.shape)}")
    for name, other in plan.items():
        if not other.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if nnz > _LIMIT:
        raise ValueError(f"{nnz} entries exceed the Triton backend's limit of {_LIMIT}")


def _check(
    features: dict[str, Tensor], lam: Tensor | None, values: Tensor, indptr: Tensor, indices: Tensor, perm: Tensor
) -> None:
    """What memory safety needs; the registered op has checked the rest."""
    _check_plan({**features, "lam": lam, "values": values}, indptr, indices, perm)
    tokens, groups = next(iter(features.values())).shape[1], indptr.numel() - 1
    if tokens > _LIMIT:
        raise ValueError(f"{tokens} tokens exceed the Triton backend's limit of {_LIMIT}")
    if lam is not None and lam.shape != (groups,):
        raise ValueError(f"lam must be [{groups}], got {list(lam.shape)}")


def _token_rows(features: Tensor) -> Tensor:
    """Rows of adjacent tokens: gathering any other layout would move a whole sector for every element."""
    return features if features.stride(1) == 1 or features.shape[1] == 1 else features.contiguous()


def _unit(itemsize: int, *sizes: int) -> int:
    """The widest load, in elements, that every one of `sizes` is a multiple of: 16 bytes at most."""
    unit = 16 // itemsize
    while any(size % unit for size in sizes):
        unit //= 2
    return unit


def _config(features: Tensor, acc: torch.dtype, token_major: bool) -> TileConfig:
    itemsize = 8 if acc == torch.float64 else features.element_size()
    lanes = 64 if torch.version.hip is not None else 32
    return tile_config(itemsize, features.shape[1], token_major, lanes)


def _gather_values(values: Tensor, perm: Tensor, acc: torch.dtype) -> Tensor:
    slot_values = torch.empty(values.numel(), dtype=acc, device=values.device)
    if values.numel():
        grid = (triton.cdiv(values.numel(), FLAT["BLOCK"]),)
        gather_values_kernel[grid](values.contiguous(), perm, slot_values, values.numel(), **FLAT)
    return slot_values


_TL = {torch.float32: tl.float32, torch.float64: tl.float64}


def sparse_core(
    z: Tensor,
    lam: Tensor | None,
    values: Tensor,
    indptr: Tensor,
    indices: Tensor,
    perm: Tensor,
    token_major: bool = False,
) -> Tensor:
    """``frodkernels::sparse_core`` on a CUDA device: z [n_in, T] -> [n_out, T] in z's dtype."""
    with _device_guard(z, "z"):
        _check({"z": z}, lam, values, indptr, indices, perm)
        T, n_out = z.shape[1], indptr.numel() - 1
        out = new_features(z, n_out, token_major)
        if out.numel() == 0:
            return out
        if lam is None and values.numel() == 0:
            return out.zero_()
        z = _token_rows(z)
        acc = accumulator(z, values)
        config = _config(z, acc, token_major)
        unit = _unit(z.element_size(), T, z.stride(0))
        grid = (triton.cdiv(n_out, config.block_r), min(triton.cdiv(T, config.block_t), MAX_GRID_Y))
        sparse_core_fwd_kernel[grid](
            z,
            None if lam is None else lam.contiguous(),
            _gather_values(values, perm, acc),
            indptr,
            indices,
            out,
            T // unit,
            n_out,
            z.stride(0) // unit,
            HAS_LAM=lam is not None,
            TOKEN_MAJOR=token_major,
            UNIT=unit,
            ACC=_TL[acc],
            **config.launch(),
        )
        return out


def sparse_core_backward(
    u: Tensor,
    z: Tensor,
    lam: Tensor | None,
    values: Tensor,
    indptr: Tensor,
    indices: Tensor,
    perm: Tensor,
    needs: list[bool],
    token_major: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``frodkernels::sparse_core_backward`` on a CUDA device: (dz, dlam, dvalues), empty where not needed."""
    with _device_guard(u, "u"):
        _check({"u": u, "z": z}, lam, values, indptr, indices, perm)
        T, n, nnz = u.shape[1], indptr.numel() - 1, indices.numel()
        if z.shape != (n, T):
            raise ValueError(f"z must be [{n}, {T}], got {list(z.shape)}")
        acc = accumulator(u, values)
        dz = new_features(u, n, token_major) if needs[0] else u.new_empty(0)
        if lam is None:
            dlam = values.new_empty(0, dtype=acc)
        else:
            dlam = lam.new_empty(n if needs[1] else 0)
        dvalues = values.new_empty(nnz if needs[2] else 0)
        need_dz, need_dlam, need_dvalues = dz.numel() > 0, dlam.numel() > 0, dvalues.numel() > 0
        if T == 0 or not (need_dz or need_dlam or need_dvalues):
            return dz, dlam.zero_(), dvalues.zero_()
        u, z = _token_rows(u), _token_rows(z)
        config = _config(u, acc, token_major and need_dz)
        unit = _unit(max(u.element_size(), z.element_size()), T, u.stride(0), z.stride(0))
        groups = triton.cdiv(n, config.block_r)
        splits, tiles_per_split = token_splits(triton.cdiv(T, config.block_t), groups)
        first_dlam = nnz if need_dvalues else 0
        width = first_dlam + (n if need_dlam else 0)
        partial = torch.empty(splits * width, dtype=acc, device=u.device)
        sparse_core_bwd_kernel[(groups, splits)](
            u,
            z,
            None if lam is None else lam.contiguous(),
            _gather_values(values, perm, acc) if need_dz else None,
            indptr,
            indices,
            dz,
            partial,
            T // unit,
            n,
            u.stride(0) // unit,
            z.stride(0) // unit,
            tiles_per_split,
            first_dlam,
            width,
            HAS_LAM=lam is not None,
            NEED_DZ=need_dz,
            NEED_DLAM=need_dlam,
            NEED_DVALUES=need_dvalues,
            TOKEN_MAJOR=token_major,
            UNIT=unit,
            ACC=_TL[acc],
            **config.launch(),
        )
        if width:
            reduce_partials_kernel[(triton.cdiv(width, FLAT["BLOCK"]),)](
                partial,
                perm,
                dvalues,
                dlam,
                splits,
                first_dlam,
                width,
                NEED_DLAM=need_dlam,
                NEED_DVALUES=need_dvalues,
                ACC=_TL[acc],
                **FLAT,
            )
        return dz, dlam, dvalues
