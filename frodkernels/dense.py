# SPDX-License-Identifier: Apache-2.0
"""The sparse core by way of a dense matrix: write S + diag lam as an [n, n] matrix, multiply with the GEMM library.

The native backend takes this way on CUDA where S is so dense that a GEMM, which runs at the full rate of the tensor
cores, costs less than gathering. It needs an n x n buffer for the call, and multiplies the zeros of S too: a NaN or an
infinity in a feature reaches every output of its token, as in any dense layer.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from frodkernels.reference.sparse_core import accumulator, new_features

# Density of S + diag lam above which the dense product of bfloat16 features is faster, by compute capability, and the
# fewest tokens it is worth it for: with few, writing the matrix costs more than any product. Modelled, by
# `python -m bench.roofline --dispatch`; no device was at hand to measure it.
BREAK_EVEN = {80: 0.08, 86: 0.25, 89: 0.25, 90: 0.04, 100: 0.018, 120: 0.25}
DENSE_TOKENS = 2048
DENSE_BYTES = 2**31  # a larger matrix is never written


@functools.cache
def _break_even(device: torch.device) -> float:
    major, minor = torch.cuda.get_device_capability(device)
    known = [key for key in BREAK_EVEN if key <= 10 * major + minor]
    return BREAK_EVEN[max(known)] if known else 1.0


def wins(T: int, rows: int, columns: int, entries: int, dtype: torch.dtype, break_even: float) -> bool:
    """Whether the dense product of ``entries`` nonzeros is the faster one for T tokens of ``dtype``.

    Only for bfloat16: wider types gain little from a dense product, and parameters may not fit float16's range, which
    the native kernels scale them into.
    """
    if T < DENSE_TOKENS or dtype != torch.bfloat16 or rows * columns * 4 > DENSE_BYTES:
        return False
    return entries > break_even * rows * columns


def dense_is_faster(z: Tensor, lam: Tensor | None, values: Tensor, indptr: Tensor) -> bool:
    """The choice for features z [columns, T]; never on the CPU, whose kernels gather from caches at any density."""
    if not z.is_cuda or values.dtype == torch.float64:
        return False
    rows = indptr.numel() - 1
    entries = values.numel() + (0 if lam is None else rows)
    return wins(z.shape[1], rows, z.shape[0], entries, z.dtype, _break_even(z.device))


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
    need_lam = needs[1] and lam is not None
    if needs[2] or need_lam:
        product = _float_product(z, u.t())  # [rows, columns] of the view
        if needs[2]:
            owner, index, order = _entries(indptr, indices, perm)
            dvalues = torch.empty_like(values).index_put_((order,), product[owner, index].to(values.dtype))
        if need_lam:
            dlam = torch.empty_like(lam).copy_(product.diagonal())
    return dz, dlam, dvalues
