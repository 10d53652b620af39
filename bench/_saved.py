# SPDX-License-Identifier: Apache-2.0
"""Bytes that a forward keeps for its backward, parameters and frozen tensors not counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def _pieces(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that a tensor of any layout consists of."""
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout == torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes. A view keeps the whole of its storage alive, so the whole counts."""
    found = {}
    for tensor in tensors:
        for piece in _pieces(tensor):
            storage = piece.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _kept(forward: Callable[[], object]) -> tuple[dict[int, int], object]:
    """What autograd holds after ``forward()``, and what keeps it alive."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    return _storages(kept), (result, kept)


def saved_bytes(forward: Callable[[], object], inputs: Iterable[Tensor]) -> int:
    """What one call adds to what autograd holds; tensors that share memory count once.

    Two calls are held at once: what both keep at the same address (parameters, frozen factors, plans) belongs to the
    layer and not to the call. ``inputs`` count where they are kept: they could be freed otherwise.
    """
    first, alive = _kept(forward)
    second, also_alive = _kept(forward)
    given = _storages(inputs)
    total = sum(size for address, size in first.items() if address not in second or address in given)
    del alive, also_alive
    return total
