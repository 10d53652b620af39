# SPDX-License-Identifier: Apache-2.0
"""A pattern as the ops take it: both compressed views, each with the tiles of its device's tensor-core kernels.

A view is (indptr, indices, perm), or these and seven tensors of tiles; autograd Functions get both views in one flat
tuple, the rows' view (CSR) first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from frodkernels import _backends
from frodkernels.ops import sampled
from frodkernels.ops import sparse_core as ops
from frodkernels.pattern import SparsePattern

_TILED = (torch.bfloat16, torch.float16)
_TILED_DENSITY = 0.35  # denser ones take long to cut; Ada, the last to, is modelled to multiply densely from 0.33 on


_blocks: dict[tuple[torch.device, int], int] = {}


def _block(device: torch.device, columns: int) -> int:
    """Features of a feature block for the native kernels of ``device``; 0: they take no tiles."""
    known = _blocks.get((device, columns))
    if known is not None:
        return known
    if device.type != "cuda" or _backends.unavailable(ops.FORWARD, device.type, "native") is not None:
        return 0
    like = torch.empty(0, device=device)
    if isinstance(like, FakeTensor):  # no device to ask, and not an answer to remember
        return 0
    return _blocks.setdefault((device, columns), torch.ops.frodkernels.native_tile_block(like, columns))


def prepare(pattern: SparsePattern) -> None:
    """Build what calls with 16-bit features on the pattern's device will need, so that no first step waits for it.

    A traced call (``torch.compile``, ``torch.export``) cannot build it, and takes slower kernels where it is missing.
    """
    for transpose in (False, True):
        _built(pattern, transpose)


def _built(pattern: SparsePattern, transpose: bool) -> tuple[Tensor, ...]:
    if pattern.density > _TILED_DENSITY:
        return ()
    block = _block(pattern.device, pattern.shape[0 if transpose else 1])
    return pattern.tiles(transpose, block) if block else ()


def _tiles(pattern: SparsePattern, transpose: bool, features: Tensor) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling() or isinstance(features, FakeTensor):
        return pattern.ready_tiles(transpose)
    return _built(pattern, transpose)


def both_views(pattern: SparsePattern, features: Tensor) -> tuple[Tensor, ...]:
    """The flat tuple of both views of ``pattern`` for ``features`` of its device."""
    if features.dtype not in _TILED:
        return (*pattern.csr, *pattern.csc)
    return (*pattern.csr, *_tiles(pattern, False, features), *pattern.csc, *_tiles(pattern, True, features))


def rows_view(views: Sequence[Tensor]) -> Sequence[Tensor]:
    """The CSR view of the flat tuple: for products with the matrix."""
    return views[: _cut(views)]


def columns_view(views: Sequence[Tensor]) -> Sequence[Tensor]:
    """The CSC view of the flat tuple: for products with the transpose, and for gradients."""
    return views[_cut(views) :]


def _cut(views: Sequence[Tensor]) -> int:
    # 3 + 3 tensors; 10 + 10 with tiles; one view alone may be too large for tiles, and the tiles' first tensor is 2-D
    return 10 if len(views) > 6 and views[3].dim() == 2 else 3


def product(z: Tensor, lam: Tensor | None, values: Tensor, view: Sequence[Tensor], token_major: bool = False) -> Tensor:
    """``ops.sparse_core`` of one view."""
    return ops.sparse_core(z, lam, values, *view[:3], token_major, list(view[3:]) or None)


def gradients(
    u: Tensor,
    z: Tensor,
    lam: Tensor | None,
    values: Tensor,
    view: Sequence[Tensor],
    needs: list[bool],
    token_major: bool = False,
) -> tuple[Tensor | None, ...]:
    """``ops.sparse_core_backward`` of the columns' view: (dz, dlam, dvalues), None where not needed."""
    grads = ops.sparse_core_backward(u, z, lam, values, *view[:3], needs, token_major, list(view[3:]) or None)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def sample(u: Tensor, z: Tensor, view: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(u z^T) at the pattern's positions, in COO order, for u [m, T] and z [n, T]: of the columns' view."""
    return sampled.sampled_product(u, z, *view[:3], dtype, None, list(view[3:]) or None)
