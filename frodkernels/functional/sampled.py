# SPDX-License-Identifier: Apache-2.0
"""The sparse COO gradient and its reverse: a product sampled at fixed positions, and values scattered to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frodkernels.functional._common import as_dtype, check_pattern, check_tensor, first_order, without_autocast
from frodkernels.functional._views import both_views, columns_view, product, rows_view, sample
from frodkernels.ops import sampled as ops
from frodkernels.pattern import SparsePattern


class SampledProduct(torch.autograd.Function):
    """out[k] = sum_t a[t, row_k] b[t, col_k];  da = b S^T, db = a S with the entries of S = dL/dout.

    Saves a and b; both gradients are sparse products.
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, a: Tensor, b: Tensor, *views: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, *views)
        return sample(a.t(), b.t(), columns_view(views), a.dtype)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *views = ctx.saved_tensors
        da = product(b.t(), None, g, rows_view(views), True).t() if ctx.needs_input_grad[0] else None
        db = product(a.t(), None, g, columns_view(views), True).t() if ctx.needs_input_grad[1] else None
        return da, db, *(None,) * len(views)


def sampled_product(a: Tensor, b: Tensor, pattern: SparsePattern) -> Tensor:
    """The entries of ``a^T b`` at a pattern's positions: ``out[k] = sum_t a[t, row_k] b[t, col_k]``.

    The gradient of a sparse matrix's entries (FRoD's S, SHiRA), known as SDDMM. The product is never formed: entries
    are inner products of gathered features or, where the pattern is dense enough for that to be faster, dense blocks
    small enough for a cache of which the entries are kept.

    Args:
        a: [T, m]; float32, float64, bfloat16 or float16, any strides. Any number of leading dimensions.
        b: [T, n] with the same leading dimensions. Of two dtypes, the wider one is computed in.
        pattern: [m, n] pattern; m n may exceed 2^31.

    Returns:
        [nnz] in the pattern's COO order, in the wider dtype of a and b; summed in float32 (float64 for float64) and
        rounded once. Same inputs, same bits. Differentiable once in a and b.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or device; names it.
    """
    check_tensor(a, "a")
    check_tensor(b, "b", a.device)
    check_pattern(pattern)
    m, n = pattern.shape
    for name, tensor, size in (("a", a, m), ("b", b, n)):
        if tensor.dim() < 1 or tensor.shape[-1] != size:
            raise ValueError(f"{name} must be [..., {size}] to match the pattern, got {list(tensor.shape)}")
    if a.shape[:-1] != b.shape[:-1]:
        raise ValueError(f"a and b must hold the same tokens, got {list(a.shape)} and {list(b.shape)}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    T = a.shape[:-1].numel()
    a, b = as_dtype(a, dtype).reshape(T, m), as_dtype(b, dtype).reshape(T, n)
    return SampledProduct.apply(a, b, *both_views(pattern.to(a.device), a))


def _shared(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory. Traced calls cannot ask, and keep what is written apart themselves."""
    if torch.compiler.is_compiling() or a.is_meta or not (a.numel() and b.numel()):
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _overlaps(matrix: Tensor) -> bool:
    """Whether two entries of a matrix may have one place: rows that reach into each other."""
    (inner, inner_size), (outer, outer_size) = sorted(zip(matrix.stride(), matrix.shape, strict=True))
    if matrix.numel() == 0 or outer_size == 1:
        return matrix.numel() > 0 and inner_size > 1 and inner == 0
    return (inner_size > 1 and inner == 0) or outer <= inner * (inner_size - 1)


def scatter_values_(
    weight: Tensor,
    values: Tensor,
    pattern: SparsePattern,
    *,
    scale: float = 1.0,
    accumulate: bool = True,
    old: Tensor | None = None,
) -> Tensor:
    """Add values to a matrix at a pattern's positions, in place: ``weight[row_k, col_k] += scale * values[k]``.

    Exact to undo when the old entries are kept::

        old = weight.new_empty(pattern.nnz)
        scatter_values_(weight, values, pattern, scale=scale, old=old)
        scatter_values_(weight, old, pattern, accumulate=False)  # the weight from before, bit for bit

    Args:
        weight: [m, n] matrix, changed in place; float32, float64, bfloat16 or float16, any strides that do not overlap.
        values: [nnz] in the pattern's COO order, any of these dtypes.
        pattern: [m, n] pattern.
        scale: a number that multiplies the values.
        accumulate: add to the entries; False: write ``scale * values`` in their place (bits are copied where the
            dtypes are equal and scale is 1).
        old: [nnz] contiguous tensor in weight's dtype that receives the entries from before, in COO order; it may be
            ``values``, which then change places with the entries.

    Returns:
        ``weight``. Computed in float32 (float64 where an operand is) and rounded once. Not differentiable.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype, device or layout; names it. Nothing has been changed.
        RuntimeError: weight or values require grad and gradients are being recorded.
    """
    check_tensor(weight, "weight")
    check_tensor(values, "values", weight.device)
    check_pattern(pattern)
    if weight.shape != pattern.shape:
        m, n = pattern.shape
        raise ValueError(f"weight must be [{m}, {n}] to match the pattern, got {list(weight.shape)}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"scale must be a number, got {type(scale).__name__}")
    if old is not None:
        check_tensor(old, "old", weight.device)
        if not old.is_contiguous():
            raise ValueError("old must be contiguous")
        if _shared(old, weight):
            raise ValueError("old must not share memory with weight")
    pattern = pattern.to(weight.device)
    ops.check_scatter(weight, values, *pattern.csr, old)
    if _overlaps(weight):
        raise ValueError(f"weight must not be a tensor whose entries share memory, got strides {weight.stride()}")
    if torch.is_grad_enabled() and (weight.requires_grad or values.requires_grad):
        raise RuntimeError("scatter_values_ records no gradient: call it under torch.no_grad()")
    if _shared(values, weight) or (old is not None and _shared(values, old)):
        values = values.clone()  # they are read while the others are written
    with torch.no_grad():
        ops.scatter_values_(weight, values, *pattern.csr, float(scale), bool(accumulate), old)
    if not torch.compiler.is_compiling():
        for changed in (weight, old):  # custom operators leave the version counters to their callers
            if changed is not None and not changed.is_inference():
                torch.autograd.graph.increment_version(changed)
    return weight
