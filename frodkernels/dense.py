# SPDX-License-Identifier: Apache-2.0
"""The sparse core by way of a dense matrix: write S + diag lam as an [n, n] matrix, multiply with the GEMM library.

The native backend takes this way on CUDA where S is so dense that a GEMM, which runs at the full rate of the tensor
cores, costs less than gathering: under "native" and, as that is what "auto" chooses there, under "auto" alike. It needs
an n x n buffer for the call, and multiplies the zeros of S too: a NaN or an infinity in a feature reaches every output
of its token, as in any dense layer. ``fk.backend("triton")`` and ``fk.backend("reference")`` never take it.
"""

from __future__ import annotations

import bisect
import functools
from itertools import pairwise

import torch
from torch import Tensor

from frodkernels.reference.sparse_core import accumulator, new_features

# Density of S + diag lam above which the dense product of bfloat16 features is faster, by compute capability: a row for
# each of SIZES, a column for each of TOKENS; 1.0: never. Modelled, not measured: the table of docs/kernels.md
# (Dispatch), from `python -m bench.roofline --dispatch`. 80 is its A100, 90 its H100, 100 its B200. 89 is its RTX 4090:
# on an L40S, an 89 too, gathering is modelled to win up to higher densities at T = 2048, but only with tiles, and
# patterns as dense as that have none.
SIZES = (1024, 2048, 4096, 9216)
TOKENS = (128, 512, 2048, 8192)
BREAK_EVEN = {
    80: (
        (0.148, 0.144, 0.083, 0.079),
        (1.000, 0.206, 0.096, 0.080),
        (1.000, 0.210, 0.096, 0.081),
        (1.000, 0.212, 0.088, 0.074),
    ),
    89: (
        (1.000, 1.000, 0.326, 0.200),
        (1.000, 1.000, 0.322, 0.197),
        (1.000, 1.000, 0.325, 0.197),
        (1.000, 1.000, 0.331, 0.200),
    ),
    90: (
        (0.001, 0.001, 0.033, 0.039),
        (1.000, 0.098, 0.048, 0.041),
        (1.000, 0.124, 0.050, 0.042),
        (1.000, 0.112, 0.047, 0.039),
    ),
    100: (
        (0.001, 0.001, 0.001, 0.010),
        (0.001, 0.001, 0.014, 0.016),
        (0.068, 0.026, 0.018, 0.019),
        (0.134, 0.030, 0.020, 0.018),
    ),
}
BREAK_EVEN[86] = BREAK_EVEN[120] = BREAK_EVEN[89]  # assumed: no model of them
NEVER = 1.0
# Multiply-adds below which it is never taken. The model counts two kernels; in truth ten small ones make the matrix,
# and it takes a GEMM of tens of microseconds to hide them.
DENSE_WORK = 2**34
DENSE_BYTES = 2**31  # a larger matrix, in the gradient's float32, is never written

# The nearest entry in log2 changes where x passes sqrt(a b) of two neighbours, so x^2 is looked up among a b.
_SIZE_EDGES = [a * b for a, b in pairwise(SIZES)]
_TOKEN_EDGES = [a * b for a, b in pairwise(TOKENS)]


def _on_cuda(features: Tensor) -> bool:
    return features.is_cuda


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def break_even(capability: int, area: int, T: int) -> float:
    """The modelled density above which the dense product is faster, for n = sqrt(area); ``NEVER`` where it never is.

    That of the table entry nearest in log2 of n and of T. A device that is not in the table is taken for the highest
    known one below it; one below all of them, and fewer tokens than the table begins with, never multiply densely.
    """
    known = [key for key in BREAK_EVEN if key <= capability]
    if T < TOKENS[0] or not known:
        return NEVER
    row = BREAK_EVEN[max(known)][bisect.bisect_left(_SIZE_EDGES, area)]
    return row[bisect.bisect_left(_TOKEN_EDGES, T * T)]


def dense_is_faster(z: Tensor, lam: Tensor | None, values: Tensor, indptr: Tensor) -> bool:
    """The choice for features z [columns, T]; never on the CPU, whose kernels gather from caches at any density.

    Only for bfloat16: wider types gain little from a dense product, and parameters may not fit float16's range, which
    the native kernels scale them into. Nor for float64 entries, whose gradients would be sums in float32.
    """
    if not _on_cuda(z) or z.dtype != torch.bfloat16 or values.dtype == torch.float64:
        return False
    columns, T = z.shape
    rows = indptr.numel() - 1
    area = rows * columns
    if area * 4 > DENSE_BYTES or area * T < DENSE_WORK:
        return False
    density = break_even(_capability(z.device), area, T)
    entries = values.numel() + (0 if lam is None else rows)  # more than area, maybe: S may hold a diagonal of its own
    return density < NEVER and entries > density * area


def _matrix(lam: Tensor | None, values: Tensor, view: tuple[Tensor, ...], columns: int, dtype: torch.dtype) -> Tensor:
    """S + diag lam, [rows, columns]; and nothing waits for the device."""
    matrix = values.new_zeros(view[0].numel() - 1, columns, dtype=dtype)
    owner, index, order = _entries(*view)
    matrix[owner, index] = values[order].to(dtype)
    if lam is not None:
        matrix.diagonal().add_(lam)  # the pattern may hold diagonal entries of its own
    return matrix


def _entries(indptr: Tensor, indices: Tensor, perm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(indptr.numel() - 1, device=indptr.device)
    owner = torch.repeat_interleave(rows, indptr.diff().to(torch.int64), output_size=indices.numel())
    return owner, indices.to(torch.int64), perm.to(torch.int64)


def sparse_core(z, lam, values, indptr, indices, perm, token_major=False):
    """As ``reference.sparse_core``; entries are rounded to z's dtype before they are multiplied."""
    matrix = _matrix(lam, values, (indptr, indices, perm), z.shape[0], z.dtype)
    out = new_features(z, matrix.shape[0], token_major)
    return out.copy_(matrix @ z) if token_major else torch.matmul(matrix, z, out=out)


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, as the sums of it are: gradients of float32 parameters are not rounded to 16 bits."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def sparse_core_backward(u, z, lam, values, indptr, indices, perm, needs, token_major=False):
    """As ``reference.sparse_core_backward``; parameter gradients are picked from the dense u z^T."""
    acc = accumulator(u, values)
    dz = u.new_empty(0)
    dlam = values.new_empty(0, dtype=acc if lam is None else lam.dtype)
    dvalues = values.new_empty(0)
    if needs[0]:
        dz = sparse_core(u, lam, values, indptr, indices, perm, token_major)
    if needs[1] and lam is not None:
        dlam = torch.empty_like(lam).copy_((u.to(acc) * z.to(acc)).sum(1))
    if needs[2]:
        product = _float_product(z, u.t())  # [rows, columns] of the view
        owner, index, order = _entries(indptr, indices, perm)
        dvalues = torch.empty_like(values).index_put_((order,), product[owner, index].to(values.dtype))
    return dz, dlam, dvalues
