# SPDX-License-Identifier: Apache-2.0
"""Patterns as PEFT samples them: off-diagonal entries, uniformly at random."""

from __future__ import annotations

import functools

import torch

import frodkernels as fk


@functools.lru_cache(maxsize=4)
def uniform(n: int, nnz: int, seed: int = 0) -> fk.SparsePattern:
    """``nnz`` entries off the diagonal of [n, n]."""
    if not 0 <= nnz <= n * (n - 1):
        raise ValueError(f"nnz must be between 0 and {n * (n - 1)}, got {nnz}")
    flat = torch.randperm(n * n - n, generator=torch.Generator().manual_seed(seed))[:nnz]
    row, column = flat // (n - 1), flat % (n - 1)
    return fk.SparsePattern(row, column + (column >= row), (n, n))
