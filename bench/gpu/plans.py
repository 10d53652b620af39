# SPDX-License-Identifier: Apache-2.0
"""How the ops are called here: with the plan of the tensor-core kernels wherever an op takes one.

Which plan serves a call is the library's own choice where it makes one; these are the arguments of a direct call.
"""

from __future__ import annotations

from typing import Any

import torch

import frodkernels as fk

BLOCK = 512  # features of a block: fits the 99 KB of shared memory that every supported GPU has


def takes_tiles(op: Any) -> bool:
    """Whether the operator's schema has the tensor-core plan."""
    return any(argument.name == "tiles" for argument in op._schema.arguments)


def tiles_for(op: Any, pattern: fk.SparsePattern, transpose: bool, block: int = BLOCK) -> dict[str, Any]:
    """``{"tiles": [...]}`` for ops that take one, ``{}`` for others. Built once per pattern and remembered there."""
    if not takes_tiles(op):
        return {}
    return {"tiles": list(pattern.tiles(transpose, block))}


def sixteen_bits(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
