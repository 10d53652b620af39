# SPDX-License-Identifier: Apache-2.0
"""Random positions of a sparse matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from frodkernels.pattern import SparsePattern


def distinct(room: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` distinct numbers below ``room``, [count] int64, uniformly at random, in no particular order.

    Few of many are drawn without a permutation of all: draw, drop repeats, draw the rest.
    """
    if 2 * count > room:
        return torch.randperm(room, generator=generator)[:count]
    ids = torch.empty(0, dtype=torch.int64)
    while ids.numel() < count:
        more = torch.randint(room, (count - ids.numel() + 16,), generator=generator)
        ids = torch.unique(torch.cat([ids, more]))
        if ids.numel() > count:  # unique sorts: drop at random, not the largest
            ids = ids[torch.randperm(ids.numel(), generator=generator)[:count]]
    return ids


def random_positions(m: int, n: int, nnz: int, generator: torch.Generator | None = None) -> SparsePattern:
    """``nnz`` distinct positions of an m x n matrix, uniformly at random.

    Raises:
        ValueError: nnz is negative or more than m n.
    """
    if not 0 <= nnz <= m * n:
        raise ValueError(f"nnz must be between 0 and m n = {m * n}, got {nnz}")
    ids = distinct(m * n, nnz, generator)
    rows = torch.div(ids, max(n, 1), rounding_mode="floor")
    return SparsePattern(rows, ids - rows * n, (m, n))
