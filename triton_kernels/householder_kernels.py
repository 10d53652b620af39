# SPDX-License-Identifier: Apache-2.0
"""Kernels of the chained reflections; ``householder.py`` launches them and ``docs/triton.md`` tells how and why.

Matrices of features are [T, features] with adjacent features adjacent in memory; coefficients and the factors left and
right are contiguous [rows, RANK] in ACC (fp32, or fp64 where an operand is fp64), padded in registers to BLOCK_R ranks.
Masked elements are loaded as zeros, and a row of one token meets no row of another except in the sums over tokens.

Products run on the tensor cores. Those multiply 16-bit numbers, so an fp32 operand is cut into parts that are bfloat16
numbers: three sum to the number itself, two to its leading 16 bits and more. PART is bfloat16 on a device, and float32
in the interpreter, whose bfloat16 is wrong: the parts are the same numbers there. fp64 is multiplied as it is. Tokens
and features are counted in 32 bits, offsets that multiply by T in 64.
"""

import triton
import triton.language as tl


@triton.jit
def _cut(value, PART: tl.constexpr):
    """fp32 `value` rounded to a bfloat16 number, as PART, and the rest, exact, as fp32. An infinity's rest is NaN."""
    if PART == tl.float32:  # what the cast does, in integers
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        leading = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    else:
        leading = value.to(PART)
    return leading, value - leading.to(tl.float32)


@triton.jit
def _parts(value, PARTS: tl.constexpr, PART: tl.constexpr, ACC: tl.constexpr):
    """`value` as the sum of PARTS parts, largest first; those past PARTS stand for nothing. fp64 is one part."""
    if ACC == tl.float64:
        first = value.to(tl.float64)
        second, third = first, first
    elif PARTS == 1:
        first = value.to(PART)
        second, third = first, first
    else:
        first, rest = _cut(value.to(tl.float32), PART)
        second, rest = _cut(rest, PART)
        third, rest = _cut(rest, PART)
    return first, second, third


@triton.jit
def _product(a0, a1, a2, b0, b1, b2, A_PARTS: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """a @ b in ACC, from the PARTS largest orders of the products of parts (b has PARTS parts, a has A_PARTS).

    The small products come first. The sum starts at zero and the caller adds it up in ACC: tensor cores truncate as
    they add, and a sum over thousands of features or tokens would show it.
    """
    if ACC == tl.float64:
        total = tl.dot(a0, b0, out_dtype=tl.float64)
    else:
        if PARTS == 3:
            total = tl.dot(a0, b2)
            if A_PARTS > 1:
                total = tl.dot(a1, b1, total)
            if A_PARTS > 2:
                total = tl.dot(a2, b0, total)
            total = tl.dot(a0, b1, total)
        else:
            total = tl.dot(a0, b1)
        if A_PARTS > 1:
            total = tl.dot(a1, b0, total)
        total = tl.dot(a0, b0, total)
    return total


@triton.jit
def _project(
    x_ptr, left_ptr, t, T, n, x_stride, first, last,
    RANK: tl.constexpr, X_PARTS: tl.constexpr, PART: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, BLOCK_R] the sum over features first .. last - 1 of x[t, f] left[f, k], features ascending."""
    k = tl.arange(0, BLOCK_R)
    rows = x_ptr + t[:, None].to(tl.int64) * x_stride
    total = tl.zeros([BLOCK_T, BLOCK_R], dtype=ACC)
    for start in range(first, last, BLOCK_N):
        f = start + tl.arange(0, BLOCK_N)
        x = tl.load(rows + f[None, :], mask=(t < T)[:, None] & (f < n)[None, :], other=0.0)
        live = (f < n)[:, None] & (k < RANK)[None, :]
        left = tl.load(left_ptr + f[:, None] * RANK + k[None, :], mask=live, other=0.0)
        x0, x1, x2 = _parts(x, X_PARTS, PART, ACC)
        left0, left1, left2 = _parts(left, 3, PART, ACC)
        total += _product(x0, x1, x2, left0, left1, left2, X_PARTS, 3, ACC)
    return tl.where((k < RANK)[None, :], total, 0.0)  # a padded rank of a NaN token is NaN * 0


@triton.jit
def _update(
    coefficients, base_ptr, right_ptr, out_ptr, t, T, m, base_stride, first, last,
    RANK: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[t, f] = base[t, f] - sum_k coefficients[t, k] right[f, k] for features first .. last - 1.

    Blocks of features descend: what the projection has read last, of x = base, is what the caches still hold.
    """
    k = tl.arange(0, BLOCK_R)
    t_live = (t < T)[:, None]
    base_rows = base_ptr + t[:, None].to(tl.int64) * base_stride
    out_rows = out_ptr + t[:, None].to(tl.int64) * m
    c0, c1, c2 = _parts(coefficients, PARTS, PART, ACC)
    blocks = tl.cdiv(last - first, BLOCK_N)
    f = first + (blocks - 1) * BLOCK_N + tl.arange(0, BLOCK_N)
    base = tl.load(base_rows + f[None, :], mask=t_live & ((f >= first) & (f < m))[None, :], other=0.0)
    for _ in range(0, blocks):
        # fetched before the store of this round: the compiler cannot lift a load over a store
        next_f = f - BLOCK_N
        next_base = tl.load(base_rows + next_f[None, :], mask=t_live & (next_f >= first)[None, :], other=0.0)
        live = (f < m)[None, :] & (k < RANK)[:, None]
        right = tl.load(right_ptr + f[None, :] * RANK + k[:, None], mask=live, other=0.0)  # [BLOCK_R, BLOCK_N]
        r0, r1, r2 = _parts(right, PARTS, PART, ACC)
        out = base.to(ACC) - _product(c0, c1, c2, r0, r1, r2, PARTS, PARTS, ACC)
        tl.store(out_rows + f[None, :], out.to(out_ptr.dtype.element_ty), mask=t_live & (f < m)[None, :])
        f, base = next_f, next_base


@triton.jit(do_not_specialize=["T"])
def householder_kernel(
    x_ptr,  # [T, n], row stride x_stride, feature stride 1
    left_ptr,  # [n, RANK] ACC
    right_ptr,  # [m, RANK] ACC
    base_ptr,  # [T, m], row stride base_stride, feature stride 1
    coefficients_ptr,  # [T, RANK] ACC
    out_ptr,  # [T, m]
    T,
    n,
    m,
    x_stride,
    base_stride,
    RANK: tl.constexpr,
    X_PARTS: tl.constexpr,  # parts of x; of coefficients and right PARTS
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """coefficients[t, k] = sum_f x[t, f] left[f, k];  out[t, f] = base[t, f] - sum_k coefficients[t, k] right[f, k].

    Program b owns tokens [b BLOCK_T, (b + 1) BLOCK_T): it reads their x twice, the second time out of the caches, and
    keeps the coefficients in registers between. Sums over features ascend in blocks of BLOCK_N, in ACC; out is rounded
    once. No atomics: runs repeat bit for bit.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_R)
    coefficients = _project(
        x_ptr, left_ptr, t, T, n, x_stride, 0, n, RANK, X_PARTS, PART, ACC, BLOCK_T, BLOCK_N, BLOCK_R
    )
    tl.store(
        coefficients_ptr + t[:, None].to(tl.int64) * RANK + k[None, :],
        coefficients,
        mask=(t < T)[:, None] & (k < RANK)[None, :],
    )
    _update(
        coefficients, base_ptr, right_ptr, out_ptr, t, T, m, base_stride, 0, m, RANK, PARTS, PART, ACC, BLOCK_N, BLOCK_R
    )


@triton.jit(do_not_specialize=["T", "blocks_per_split"])
def householder_project_kernel(
    x_ptr,  # [T, n], row stride x_stride, feature stride 1
    left_ptr,  # [n, RANK] ACC
    partial_ptr,  # [splits, T, RANK] ACC; the coefficients where there is one split
    T,
    n,
    x_stride,
    blocks_per_split,
    RANK: tl.constexpr,
    X_PARTS: tl.constexpr,
    PART: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partial[s, t, k] = sum_f x[t, f] left[f, k] over the features f of split s.

    Program (b, s) owns tokens [b BLOCK_T, (b + 1) BLOCK_T) of split s, which is blocks_per_split blocks of features.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * blocks_per_split * BLOCK_N
    last = tl.minimum(first + blocks_per_split * BLOCK_N, n)
    total = _project(
        x_ptr, left_ptr, t, T, n, x_stride, first, last, RANK, X_PARTS, PART, ACC, BLOCK_T, BLOCK_N, BLOCK_R
    )
    row = tl.program_id(1).to(tl.int64) * T + t[:, None]
    tl.store(partial_ptr + row * RANK + k[None, :], total, mask=(t < T)[:, None] & (k < RANK)[None, :])


@triton.jit(do_not_specialize=["T", "blocks_per_split"])
def householder_update_kernel(
    partial_ptr,  # [SPLITS, T, RANK] ACC
    right_ptr,  # [m, RANK] ACC
    base_ptr,  # [T, m], row stride base_stride, feature stride 1
    coefficients_ptr,  # [T, RANK] ACC
    out_ptr,  # [T, m]
    T,
    m,
    base_stride,
    blocks_per_split,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """coefficients[t, k] = sum_s partial[s, t, k];  out[t, f] = base[t, f] - sum_k coefficients[t, k] right[f, k].

    Program (b, s) owns tokens [b BLOCK_T, (b + 1) BLOCK_T) and blocks_per_split blocks of features. Each adds up the
    partial sums of its tokens, splits ascending; the programs of s = 0 own the coefficients in memory. m may be 0.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_R)
    live = (t < T)[:, None] & (k < RANK)[None, :]
    at = t[:, None].to(tl.int64) * RANK + k[None, :]
    coefficients = tl.load(partial_ptr + at, mask=live, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        partial_ptr += T.to(tl.int64) * RANK
        coefficients += tl.load(partial_ptr + at, mask=live, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(coefficients_ptr + at, coefficients, mask=live)
    first = tl.program_id(1) * blocks_per_split * BLOCK_N
    last = tl.minimum(first + blocks_per_split * BLOCK_N, m)
    _update(
        coefficients, base_ptr, right_ptr, out_ptr, t, T, m, base_stride, first, last,
        RANK, PARTS, PART, ACC, BLOCK_N, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _sum_tokens(
    total, x_ptr, q_ptr, f, n, x_stride, first, last, T,
    RANK: tl.constexpr, X_PARTS: tl.constexpr, PART: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """total + [BLOCK_N, BLOCK_R] the sum over tokens first .. last - 1 of x[t, f] q[t, k], tokens ascending."""
    k = tl.arange(0, BLOCK_R)
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        t64 = t.to(tl.int64)
        x = tl.load(
            x_ptr + t64[None, :] * x_stride + f[:, None], mask=(t < T)[None, :] & (f < n)[:, None], other=0.0
        )  # [BLOCK_N, BLOCK_T]
        q = tl.load(q_ptr + t64[:, None] * RANK + k[None, :], mask=(t < T)[:, None] & (k < RANK)[None, :], other=0.0)
        x0, x1, x2 = _parts(x, X_PARTS, PART, ACC)
        q0, q1, q2 = _parts(q, 3, PART, ACC)
        total += _product(x0, x1, x2, q0, q1, q2, X_PARTS, 3, ACC)
    return total


@triton.jit(do_not_specialize=["T", "tiles_per_split"])
def householder_gradient_kernel(
    x_ptr,  # [T, n], row stride x_stride, feature stride 1
    q_ptr,  # [T, RANK] ACC
    g_ptr,  # [T, n], row stride g_stride, feature stride 1
    coefficients_ptr,  # [T, RANK] ACC
    partial_ptr,  # [splits, n, RANK] ACC; the sums where there is one split
    T,
    n,
    x_stride,
    g_stride,
    tiles_per_split,
    HAS_G: tl.constexpr,
    RANK: tl.constexpr,
    X_PARTS: tl.constexpr,
    PART: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partial[s, f, k] = sum_t x[t, f] q[t, k] (+ sum_t g[t, f] coefficients[t, k] with HAS_G), t over split s.

    Program (b, s) owns features [b BLOCK_N, (b + 1) BLOCK_N) of split s, which is tiles_per_split tiles of BLOCK_T
    tokens. Features are the fast grid dimension: programs that run together read whole rows of x, and one q.
    """
    f = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * tiles_per_split * BLOCK_T
    last = tl.minimum(first + tiles_per_split * BLOCK_T, T)
    total = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    total = _sum_tokens(total, x_ptr, q_ptr, f, n, x_stride, first, last, T, RANK, X_PARTS, PART, ACC, BLOCK_T, BLOCK_R)
    if HAS_G:
        total = _sum_tokens(
            total, g_ptr, coefficients_ptr, f, n, g_stride, first, last, T, RANK, X_PARTS, PART, ACC, BLOCK_T, BLOCK_R
        )
    row = tl.program_id(1).to(tl.int64) * n + f[:, None]
    tl.store(partial_ptr + row * RANK + k[None, :], total, mask=(f < n)[:, None] & (k < RANK)[None, :])


@triton.jit(do_not_specialize=["splits"])
def householder_reduce_kernel(
    partial_ptr,  # [splits, width] ACC
    sums_ptr,  # [width] ACC
    splits,
    width,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums[i] = sum_s partial[s, i], splits ascending. Program b owns sums [b BLOCK, (b + 1) BLOCK)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < width
    total = tl.zeros([BLOCK], dtype=ACC)
    for _ in range(splits):
        total += tl.load(partial_ptr + i, mask=live, other=0.0)
        partial_ptr += width
    tl.store(sums_ptr + i, total, mask=live)
