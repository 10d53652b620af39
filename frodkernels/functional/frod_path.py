# SPDX-License-Identifier: Apache-2.0
"""Which association order of FRoD is cheapest, from a measured cost model.

Costs are counted in GEMM multiply-adds. A multiply-add with a nonzero of S costs SPARSE_COST of them; the constants
are ratios measured by ``python -m bench.calibrate`` (per dtype: 16-bit GEMMs are several times faster, the sparse
product hardly at all), so they move little between machines.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATHS = ("activation", "fold", "materialize")

# GEMM multiply-adds in the time of one sparse multiply-add: (product alone, fused backward).
SPARSE_COST = {
    torch.float32: (2.7, 6.5),
    torch.float64: (2.7, 6.5),
    torch.bfloat16: (6.9, 15.0),
    torch.float16: (6.9, 15.0),
}

# Under torch.compile the choice may not depend on the number of tokens: a branch on it would recompile as it changes.
NOMINAL_TOKENS = 2048


# The same on a GPU, whose tensor cores leave everything else behind. Modelled, not measured: `python -m bench.roofline`
# (16 bits: between an A100's 20 and 40, and an H100's 33 and 70).
GPU_SPARSE_COST = {
    torch.float32: (3.7, 7.0),
    torch.float64: (3.7, 7.0),
    torch.bfloat16: (26.0, 55.0),
    torch.float16: (26.0, 55.0),
}


def costs(
    T: int, m: int, n: int, nnz: int, dtype: torch.dtype, *, needs_x: bool, needs_parameters: bool, device: str = "cpu"
) -> dict[str, float]:
    """Cost of a forward, plus a backward where a gradient is needed, of each path in GEMM multiply-adds."""
    forward, backward = (SPARSE_COST if device in ("cpu", "meta") else GPU_SPARSE_COST)[dtype]
    sparse = nnz + n  # the diagonal is n more nonzeros
    square, wide, build = T * n * n, T * m * n, m * n * n
    cost = {
        "activation": square + wide + forward * sparse * T,
        "fold": square + wide + forward * sparse * m,
        "materialize": build + wide + forward * sparse * m,
    }
    if needs_x or needs_parameters:
        cost["activation"] += wide + backward * sparse * T + square * needs_x
        cost["fold"] += (wide + square) * needs_x + (wide + backward * sparse * T) * needs_parameters
        cost["materialize"] += wide * needs_x + (wide + build + backward * sparse * m) * needs_parameters
    return cost


def choose(x: Tensor, m: int, nnz: int, parameters_train: bool) -> str:
    """The cheapest path for ``x`` [T, n] in the current grad mode; static under torch.compile and export."""
    n = x.shape[1]
    T = NOMINAL_TOKENS if torch.compiler.is_compiling() else x.shape[0]
    grad = torch.is_grad_enabled()
    needs = dict(needs_x=grad and x.requires_grad, needs_parameters=grad and parameters_train)
    cost = costs(T, m, n, nnz, x.dtype, **needs, device=x.device.type)
    if x.dtype == torch.float16 and grad and parameters_train:
        # its g^T x sums over all tokens before S is sampled: that overflows float16 where no other path does
        cost["materialize"] = float("inf")
    best = PATHS[0]
    for path in PATHS[1:]:  # dynamo does not trace min(..., key=...)
        if cost[path] < cost[best]:
            best = path
    return best
