# SPDX-License-Identifier: Apache-2.0
"""A checked pattern, and the tensor of indices it was made from.

Indices come from adapter files, which nothing else checks: everything a kernel will rely on is checked here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frodkernels.functional._views import prepare
from frodkernels.nn.eval_cache import version
from frodkernels.pattern import SparsePattern


@dataclass(frozen=True, eq=False)
class Plan:
    """The pattern of one adapter of one layer, and the index tensor (in which state) it was made from."""

    indices: Tensor
    version: int
    pattern: SparsePattern

    def current(self, indices: Tensor | None) -> bool:
        """Made from this very tensor, which nothing has written to since."""
        return self.indices is indices and self.version == version(indices)

    def moved(self, device: torch.device) -> Plan:
        """The same plan with its pattern on ``device``."""
        pattern = self.pattern.to(device)
        prepare(pattern)
        return replace(self, pattern=pattern)

    def describes(self, indices: object) -> bool:
        """Made from a tensor of the same content: the model has been moved."""
        return (
            isinstance(indices, Tensor)
            and not (indices.is_meta or self.indices.is_meta)
            and self.version == version(self.indices)
            and self.indices.shape == indices.shape
            and self.indices.dtype == indices.dtype
            and torch.equal(self.indices.to(indices.device), indices)
        )


def integers(tensor: object) -> bool:
    """Whether this is a tensor of whole numbers."""
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype != torch.bool
        and not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
    )


def check_indices(indices: Tensor, shape: tuple[int, int], where: str) -> SparsePattern:
    """The pattern of ``indices`` [2, nnz] in a matrix of ``shape``; every entry checked.

    Raises:
        ValueError: begins with ``where``.
    """
    try:
        return SparsePattern.from_coo(indices, shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def digest(tensor: Tensor) -> bytes:
    """A digest of a tensor's bits."""
    host = tensor.detach().cpu().contiguous()
    return hashlib.blake2b(host.view(torch.uint8).numpy().data, digest_size=16).digest()
