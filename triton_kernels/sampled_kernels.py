# SPDX-License-Identifier: Apache-2.0
"""Kernels of the sampled product and the scatter; ``sampled.py`` launches them, ``docs/triton.md`` tells how and why.

The pattern comes as one compressed view: the slots of group g are indptr[g] .. indptr[g + 1] - 1, and the indices of a
group ascend. Groups, features, tokens and slots are counted in 32 bits; offsets that multiply by T, and those into the
weight, in 64.
"""

import triton
import triton.language as tl


@triton.jit
def _first_slot(indices_ptr, start, end, feature, PROBES: tl.constexpr):
    """[R] the first of the slots start .. end - 1 whose index is at least `feature`; end where there is none.

    A binary search, but with PROBES probes of every row in flight: a round costs one latency.
    """
    probe = tl.arange(0, PROBES)[None, :]
    while tl.max(end - start, axis=0) > 0:
        step = tl.maximum(tl.cdiv(end - start, PROBES), 1)
        p = start[:, None] + (probe + 1) * step[:, None] - 1  # the last slot of each of PROBES parts
        index = tl.load(indices_ptr + p, mask=p < end[:, None], other=0).to(tl.int32)
        below = (p < end[:, None]) & (index < feature)
        start += tl.sum(below.to(tl.int32), axis=1) * step  # past the parts that lie below as a whole
        end = tl.minimum(start + step - 1, end)  # the last slot of the part after them does not
    return start


@triton.jit
def _features(x_ptr, row, rows, t, T, stride, TOKENS: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr):
    """x[row, t] as DOT, in the shape that `row` and `t` broadcast to; zeros past the last row and the last token.

    TOKENS: adjacent tokens are adjacent in memory and `stride` is of rows; else it is the other way round. Along the
    adjacent axis x is stored up to a multiple of UNIT, with zeros where it has none, and `stride` comes in units of
    UNIT: the compiler learns that loads may be UNIT elements wide.
    """
    if TOKENS:
        offsets = row.to(tl.int64) * stride * UNIT + t
        live = (row < rows) & (t < tl.cdiv(T, UNIT) * UNIT)
    else:
        offsets = t.to(tl.int64) * stride * UNIT + row
        live = (row < tl.cdiv(rows, UNIT) * UNIT) & (t < T)
    return tl.load(x_ptr + offsets, mask=live, other=0.0).to(DOT)


@triton.jit(
    do_not_specialize=["T", "n", "groups", "a_stride", "b_stride", "tiles_per_split", "blocks_per_range", "nnz"]
)
def sampled_product_kernel(
    a_ptr,  # [n, T]; A_TOKENS: strides (a_stride, 1), else (1, a_stride)
    b_ptr,  # [groups, T]; B_TOKENS: strides (b_stride, 1), else (1, b_stride)
    indptr_ptr,  # [groups + 1] int32
    indices_ptr,  # [nnz] uint16 or int32, ascending within a group
    perm_ptr,  # [nnz] int32
    out_ptr,  # SPLIT: [splits, nnz] ACC, slot order; else [nnz] any float, COO order
    T,
    n,
    groups,
    a_stride,  # in units of UNIT
    b_stride,  # in units of UNIT
    tiles_per_split,
    blocks_per_range,
    nnz,
    A_TOKENS: tl.constexpr,
    B_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    FOLD: tl.constexpr,
    PROBES: tl.constexpr,
):
    """out[perm[p]] = sum_t a[indices[p], t] b[g, t],  indptr[g] <= p < indptr[g + 1], from products of dense blocks.

    Program (r, j, s) owns groups [r BLOCK_R, (r + 1) BLOCK_R), of the features range j of blocks_per_range blocks of
    BLOCK_N, of the tokens split s of tiles_per_split tiles of BLOCK_T. It goes from one block of features that has an
    entry to the next: the block's product stays in registers, and BLOCK_S entries of every row are taken out of it at a
    time. Blocks without an entry cost nothing. A tile's product starts from zero and is added up in ACC outside of the
    tensor cores, which truncate as they add: FOLD tiles to a part, and the parts, both ascending, so that the error
    grows with the root of T / FOLD only. Entries have one owner in every split; no atomics.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    row_live = row < groups
    slot = tl.load(indptr_ptr + row, mask=row_live, other=0)
    end = tl.load(indptr_ptr + row + 1, mask=row_live, other=0)
    first_feature = tl.program_id(1) * blocks_per_range * BLOCK_N
    last_feature = tl.minimum(first_feature + blocks_per_range * BLOCK_N, n)
    if first_feature > 0:
        slot = _first_slot(indices_ptr, slot, end, first_feature, PROBES)
    first_token = tl.program_id(2) * tiles_per_split * BLOCK_T
    last_token = tl.minimum(first_token + tiles_per_split * BLOCK_T, T)
    if SPLIT:
        out_ptr += tl.program_id(2).to(tl.int64) * nnz

    index = tl.load(indices_ptr + slot, mask=slot < end, other=0).to(tl.int32)
    feature = tl.min(tl.where(slot < end, index, last_feature), axis=0)  # the first one that has an entry
    while feature < last_feature:
        block = feature // BLOCK_N * BLOCK_N
        f = block + tl.arange(0, BLOCK_N)
        product = tl.zeros([BLOCK_R, BLOCK_N], dtype=ACC)
        part = tl.zeros([BLOCK_R, BLOCK_N], dtype=ACC)
        for start in range(first_token, last_token, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            b = _features(b_ptr, row[:, None], groups, t[None, :], T, b_stride, B_TOKENS, UNIT, DOT)
            a = _features(a_ptr, f[None, :], n, t[:, None], T, a_stride, A_TOKENS, UNIT, DOT)
            # a limit of imprecise sums says nothing of these types, but keeps the addition out of the tensor cores
            part += tl.dot(b, a, input_precision="ieee", max_num_imprecise_acc=BLOCK_T, out_dtype=ACC)
            if start % (FOLD * BLOCK_T) == (FOLD - 1) * BLOCK_T:
                product += part
                part = tl.zeros([BLOCK_R, BLOCK_N], dtype=ACC)
        product += part
        taken = tl.full([BLOCK_R], BLOCK_S, dtype=tl.int32)
        while tl.max(taken, axis=0) == BLOCK_S:
            p = slot[:, None] + tl.arange(0, BLOCK_S)[None, :]  # [R, S]
            at = tl.load(indices_ptr + p, mask=p < end[:, None], other=0).to(tl.int32) - block
            inside = (p < end[:, None]) & (at < BLOCK_N)
            value = tl.gather(product, tl.where(inside, at, 0), axis=1)
            to = p if SPLIT else tl.load(perm_ptr + p, mask=inside, other=0)
            tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty), mask=inside)
            taken = tl.sum(inside.to(tl.int32), axis=1)
            slot += taken
        index = tl.load(indices_ptr + slot, mask=slot < end, other=0).to(tl.int32)
        feature = tl.min(tl.where(slot < end, index, last_feature), axis=0)


@triton.jit(
    do_not_specialize=["nnz", "groups", "rounds", "row_stride", "feature_stride", "values_stride", "old_stride"]
)
def scatter_values_kernel(
    weight_ptr,  # [groups, n], strides (row_stride, feature_stride); any float, COPY: integers of its size
    values_ptr,  # [nnz] any float, stride values_stride; COPY: as weight
    indptr_ptr,  # [groups + 1] int32
    indices_ptr,  # [nnz] uint16 or int32
    perm_ptr,  # [nnz] int32
    old_ptr,  # [nnz] as weight, stride old_stride
    scale: tl.float64,
    nnz,
    groups,
    rounds,  # of a binary search among the groups
    row_stride,
    feature_stride,
    values_stride,
    old_stride,
    COPY: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    HAS_OLD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight[g, indices[p]] = scale values[perm[p]] (ACCUMULATE: + what it was),  indptr[g] <= p < indptr[g + 1].

    COPY: weight[g, indices[p]] = values[perm[p]], bit for bit. HAS_OLD: old[perm[p]] = what it was, bit for bit.
    Program b owns slots [b BLOCK, (b + 1) BLOCK), however their groups divide them, and with each its place in the
    weight: entries are unique. The group of a slot is found by binary search.
    """
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = p < nnz
    group = tl.zeros([BLOCK], dtype=tl.int32)  # indptr[group] <= p < indptr[after]
    after = tl.zeros([BLOCK], dtype=tl.int32) + groups
    for _ in range(rounds):
        middle = group + (after - group) // 2
        holds = tl.load(indptr_ptr + middle, mask=live, other=0) <= p
        group = tl.where(holds, middle, group)
        after = tl.where(holds, after, middle)
    feature = tl.load(indices_ptr + p, mask=live, other=0).to(tl.int64)
    entry = weight_ptr + (group.to(tl.int64) * row_stride + feature * feature_stride)
    k = tl.load(perm_ptr + p, mask=live, other=0).to(tl.int64)
    value = tl.load(values_ptr + k * values_stride, mask=live, other=0)
    if HAS_OLD or ACCUMULATE:
        before = tl.load(entry, mask=live, other=0)
    if HAS_OLD:
        tl.store(old_ptr + k * old_stride, before, mask=live)
    if not COPY:
        value = tl.full([BLOCK], scale, dtype=ACC) * value.to(ACC)
        if ACCUMULATE:
            value = before.to(ACC) + value
    tl.store(entry, value.to(weight_ptr.dtype.element_ty), mask=live)
