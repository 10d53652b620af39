# SPDX-License-Identifier: Apache-2.0
"""Kernels of the sparse core; ``sparse_core.py`` launches them and ``docs/triton.md`` tells how the work is laid out.

Matrices of features are [features, T] with adjacent tokens adjacent in memory. Loads are cast to the accumulator ACC
(fp32, or fp64 where an operand is fp64), stores round once. T and the strides of inputs come in units of UNIT elements,
which is how the compiler learns, for any T, that loads may be UNIT elements wide. Tokens and slots are counted in 32
bits, offsets into matrices of features in 64.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["nnz"])
def gather_values_kernel(
    values_ptr,  # [nnz] any float, COO order
    perm_ptr,  # [nnz] int32
    slot_values_ptr,  # [nnz] fp32 or fp64, slot order
    nnz,
    BLOCK: tl.constexpr,
):
    """slot_values[p] = values[perm[p]], so that the permutation is paid once, not once per token tile.

    Program b owns slots [b BLOCK, (b + 1) BLOCK).
    """
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = p < nnz
    k = tl.load(perm_ptr + p, mask=live, other=0)
    value = tl.load(values_ptr + k, mask=live, other=0.0)
    tl.store(slot_values_ptr + p, value.to(slot_values_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["T", "z_stride"])
def sparse_core_fwd_kernel(
    z_ptr,  # [n_in, T], row stride z_stride, token stride 1
    lam_ptr,  # [n_out] any float
    slot_values_ptr,  # [nnz] ACC
    indptr_ptr,  # [n_out + 1] int32
    indices_ptr,  # [nnz] uint16 or int32
    out_ptr,  # [n_out, T]; TOKEN_MAJOR: strides (1, n_out), else contiguous
    T,  # in units of UNIT
    n_out,
    z_stride,  # in units of UNIT
    HAS_LAM: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """out[i, t] = lam[i] z[i, t] + sum_p slot_values[p] z[indices[p], t],  indptr[i] <= p < indptr[i + 1].

    Program (r, b) owns rows [r BLOCK_R, (r + 1) BLOCK_R) of token tiles b, b + num_programs, ... Rows are the fast grid
    dimension, so programs that run together gather from one token tile of z, which stays in L2. BLOCK_S slots of every
    row are in flight at a time, and the indices and values of the next BLOCK_S are fetched under them. Slots are summed
    in ascending groups of BLOCK_S, in ACC. A masked slot loads nothing: what S does not store is never multiplied.
    """
    T *= UNIT
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    row64 = row[:, None].to(tl.int64)  # [R, 1]
    row_live = row < n_out
    start = tl.load(indptr_ptr + row, mask=row_live, other=0)
    end = tl.load(indptr_ptr + row + 1, mask=row_live, other=0)
    longest = tl.max(end - start, axis=0)

    for tile in range(tl.program_id(1), tl.cdiv(T, BLOCK_T), tl.num_programs(1)):
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
        t_live = t < T
        live = row_live[:, None] & t_live[None, :]
        acc = tl.zeros([BLOCK_R, BLOCK_T], dtype=ACC)
        if HAS_LAM:
            lam = tl.load(lam_ptr + row, mask=row_live, other=0.0).to(ACC)
            z_row = tl.load(z_ptr + row64 * z_stride * UNIT + t[None, :], mask=live, other=0.0)
            acc += lam[:, None] * z_row.to(ACC)
        p = start[None, :] + tl.arange(0, BLOCK_S)[:, None]  # [S, R]
        p_live = p < end[None, :]
        other = tl.load(indices_ptr + p, mask=p_live, other=0)
        value = tl.load(slot_values_ptr + p, mask=p_live, other=0.0)
        for _ in range(0, longest, BLOCK_S):
            p_live = p < end[None, :]  # compared anew: carried over, the masks cost more than the comparison
            p += BLOCK_S
            next_live = p < end[None, :]
            next_other = tl.load(indices_ptr + p, mask=next_live, other=0)
            next_value = tl.load(slot_values_ptr + p, mask=next_live, other=0.0)
            z_other = tl.load(
                z_ptr + other.to(tl.int64)[:, :, None] * z_stride * UNIT + t[None, None, :],
                mask=p_live[:, :, None] & t_live[None, None, :],
                other=0.0,
            )  # [S, R, T]
            acc += tl.sum(value[:, :, None] * z_other.to(ACC), axis=0)
            other, value = next_other, next_value
        if TOKEN_MAJOR:
            out_ptrs = out_ptr + t[None, :].to(tl.int64) * n_out + row64
        else:
            out_ptrs = out_ptr + row64 * T + t[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["T", "u_stride", "z_stride", "tiles_per_split", "first_dlam", "width"])
def sparse_core_bwd_kernel(
    u_ptr,  # [m, T], row stride u_stride, token stride 1
    z_ptr,  # [n, T], row stride z_stride, token stride 1
    lam_ptr,  # [n] any float
    slot_values_ptr,  # [nnz] ACC
    indptr_ptr,  # [n + 1] int32
    indices_ptr,  # [nnz] uint16 or int32
    dz_ptr,  # [n, T]; TOKEN_MAJOR: strides (1, n), else contiguous
    partial_ptr,  # [splits, width] ACC: a row holds dvalues in slot order, then dlam; what is not needed is left out
    T,  # in units of UNIT
    n,
    u_stride,  # in units of UNIT
    z_stride,  # in units of UNIT
    tiles_per_split,
    first_dlam,  # where dlam starts in a row of partial sums
    width,  # of a row of partial sums
    HAS_LAM: tl.constexpr,
    NEED_DZ: tl.constexpr,
    NEED_DLAM: tl.constexpr,
    NEED_DVALUES: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dz of one token split, and the split's share of dvalues and dlam, from one gather of u.

    dz[j, t] = lam[j] u[j, t] + sum_p slot_values[p] u[indices[p], t];  partial[s, p] = sum_t u[indices[p], t] z[j, t];
    partial[s, first_dlam + j] = sum_t u[j, t] z[j, t],  with p over the slots of column j and t over split s.

    Program (r, s) owns columns [r BLOCK_R, (r + 1) BLOCK_R) of the tokens of split s, and with them their part of row s
    of the partial sums. It holds z of its columns; every gathered tile of u serves the sum for dz and the dot product
    for dvalues. Where a split is several tiles, the program adds to its own partial sums, tiles ascending.
    """
    T *= UNIT
    col = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    col64 = col[:, None].to(tl.int64)  # [R, 1]
    col_live = col < n
    start = tl.load(indptr_ptr + col, mask=col_live, other=0)
    end = tl.load(indptr_ptr + col + 1, mask=col_live, other=0)
    longest = tl.max(end - start, axis=0)
    partial_ptr += tl.program_id(1).to(tl.int64) * width
    dlam = tl.zeros([BLOCK_R], dtype=ACC)
    summed = start  # [R] where the slots end that hold partial sums already: none before the first tile

    first_tile = tl.program_id(1) * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(T, BLOCK_T))):
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
        t_live = t < T
        live = col_live[:, None] & t_live[None, :]
        dz = tl.zeros([BLOCK_R, BLOCK_T], dtype=ACC)
        if NEED_DLAM or NEED_DVALUES:
            z_col = tl.load(z_ptr + col64 * z_stride * UNIT + t[None, :], mask=live, other=0.0).to(ACC)
        if HAS_LAM and (NEED_DZ or NEED_DLAM):
            u_col = tl.load(u_ptr + col64 * u_stride * UNIT + t[None, :], mask=live, other=0.0).to(ACC)
            if NEED_DZ:
                dz += tl.load(lam_ptr + col, mask=col_live, other=0.0).to(ACC)[:, None] * u_col
            if NEED_DLAM:
                dlam += tl.sum(u_col * z_col, axis=1)
        if NEED_DZ or NEED_DVALUES:
            p = start[None, :] + tl.arange(0, BLOCK_S)[:, None]  # [S, R]
            p_live = p < end[None, :]
            other = tl.load(indices_ptr + p, mask=p_live, other=0)
            if NEED_DZ:
                value = tl.load(slot_values_ptr + p, mask=p_live, other=0.0)
            for _ in range(0, longest, BLOCK_S):
                p_live = p < end[None, :]  # compared anew, as in the forward
                u_other = tl.load(
                    u_ptr + other.to(tl.int64)[:, :, None] * u_stride * UNIT + t[None, None, :],
                    mask=p_live[:, :, None] & t_live[None, None, :],
                    other=0.0,
                ).to(ACC)  # [S, R, T]
                # fetched before the stores of this round: the compiler cannot lift a load over a store
                next_p = p + BLOCK_S
                next_live = next_p < end[None, :]
                other = tl.load(indices_ptr + next_p, mask=next_live, other=0)
                if NEED_DZ:
                    dz += tl.sum(value[:, :, None] * u_other, axis=0)
                    value = tl.load(slot_values_ptr + next_p, mask=next_live, other=0.0)
                if NEED_DVALUES:
                    dot = tl.sum(u_other * z_col[None, :, :], axis=2)  # [S, R]
                    dot += tl.load(partial_ptr + p, mask=p < summed[None, :], other=0.0)
                    tl.store(partial_ptr + p, dot, mask=p_live)
                p = next_p
        if NEED_DZ:
            if TOKEN_MAJOR:
                dz_ptrs = dz_ptr + t[None, :].to(tl.int64) * n + col64
            else:
                dz_ptrs = dz_ptr + col64 * T + t[None, :]
            tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=live)
        if NEED_DVALUES:
            summed = end
            tl.debug_barrier()  # the next tile reads back partial sums that another lane may have written
    if NEED_DLAM:
        tl.store(partial_ptr + first_dlam + col, dlam, mask=col_live)


@triton.jit(do_not_specialize=["splits", "first_dlam", "width"])
def reduce_partials_kernel(
    partial_ptr,  # [splits, width] ACC: a row holds dvalues in slot order, then dlam; what is not needed is left out
    perm_ptr,  # [nnz] int32
    dvalues_ptr,  # [nnz] any float, COO order
    dlam_ptr,  # [n] any float
    splits,
    first_dlam,  # where dlam starts in a row of partial sums
    width,  # of a row of partial sums
    NEED_DLAM: tl.constexpr,
    NEED_DVALUES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dvalues[perm[p]] = sum_s partial[s, p] and dlam[j] = sum_s partial[s, first_dlam + j], splits ascending.

    Program b owns sums [b BLOCK, (b + 1) BLOCK).
    """
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = k < width
    total = tl.zeros([BLOCK], dtype=ACC)
    for _ in range(splits):
        total += tl.load(partial_ptr + k, mask=live, other=0.0)
        partial_ptr += width
    is_dlam = k >= first_dlam
    if NEED_DVALUES:
        at = tl.load(perm_ptr + k, mask=live & ~is_dlam, other=0)
        tl.store(dvalues_ptr + at, total.to(dvalues_ptr.dtype.element_ty), mask=live & ~is_dlam)
    if NEED_DLAM:
        tl.store(dlam_ptr + (k - first_dlam), total.to(dlam_ptr.dtype.element_ty), mask=live & is_dlam)
