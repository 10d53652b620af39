# SPDX-License-Identifier: Apache-2.0
"""What the model knows of the Householder kernels: shares of their blocks, bytes from HBM, floors, plain torch."""

from __future__ import annotations

import re

from bench.kernels import static
from bench.kernels.counts import Counts, Reflections
from bench.roofline.devices import Device

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
MAPS = ("householder_mma_kernel", "householder_fma_kernel")
GRADIENTS = {"householder_gradient_mma_kernel": 32, "householder_gradient_fma_kernel": 16}  # tokens of a piece
EQUAL = (*MAPS, *GRADIENTS)  # their blocks do equal shares, but for a piece of tokens
SMALL = ("householder_pack_kernel", "householder_pad_kernel")  # many small blocks

# As csrc/cuda/householder_{mma,fma}.cuh have it.
MMA_PITCH, MMA_EXCHANGE, MMA_FEATURES = 272, 8 * 16 * 40 * 4, 128
FMA_TOKENS, FMA_PITCH = 32, 528

# Passes over [T, n] that plain torch makes, in bytes a number: each operator reads its operands and writes its result.
#   float32 sums (what the reference computes): x to float32, x left, c right^T, the difference, out to 16 bits; the
#   backward likewise for g, then x to float32 and two products for the sums
#   all in 16 bits: x left, addmm; the backward likewise for g, then two products
WIDE = {"householder": 6 + 4 + 4 + 12 + 6, "householder_backward": 6 + 4 + 4 + 12 + 6 + 6 + 4 + 4}
NARROW = {"householder": 2 + 4, "householder_backward": 2 + 4 + 2 + 2}
WIDE_CALLS, NARROW_CALLS = {"householder": 5, "householder_backward": 9}, {"householder": 2, "householder_backward": 5}


def tiles_of(kernel: static.Kernel) -> int:
    """16-token tiles of a block of an instance of householder_mma_kernel."""
    found = re.search(r"(\d+)>$", kernel.name)
    return int(found.group(1)) if found else 0


def tiles(c: Counts, T: int) -> int:
    """The same, of a launch."""
    return next(k for k in range(1, 6) if -(-T // (16 * k)) == c.grid // c.launches)


def _splits(c: Counts, case: Reflections) -> int:
    groups = 1 if case.rank <= 32 else 2 if case.rank <= 64 else 4
    if c.function == "householder_gradient_mma_kernel":
        groups = 1 if case.rank <= 64 else 2
    return c.grid // -(-case.n // (256 // groups))


def shares(c: Counts, case: Reflections) -> tuple[float, float]:
    """The longest and the mean block's work, over that of the first, which ran."""
    if c.function not in GRADIENTS:
        return 1.0, 1.0
    pieces, splits = -(-case.T // GRADIENTS[c.function]), _splits(c, case)
    first = pieces // splits
    return -(-pieces // splits) / first, pieces / splits / first


def hbm_bytes(c: Counts, case: Reflections, device: Device, resident: int, stores: float) -> float:
    """x (or g) once, what is stored once, and of the rows that the map reads again those that L2 has lost by then.

    Blocks walk back: a round of them finds what is among the last half of L2 that it has read, since it writes as much.
    """
    rows = case.T * case.n * ITEMSIZE[case.dtype]
    if c.function in GRADIENTS:
        return 2 * rows + stores
    if c.function == "householder_mma_kernel":
        tokens, features = 16 * tiles(c, case.T), MMA_FEATURES
        units = -(-case.rank // 16)
        fixed, slot = 2 * tokens * (units * 32 + 16) + MMA_EXCHANGE, tokens * MMA_PITCH
    else:
        tokens, features, acc = FMA_TOKENS, 512 // ITEMSIZE[case.dtype], 8 if case.dtype == "float64" else 4
        groups = 1 if case.rank <= 32 else 2 if case.rank <= 64 else 4
        fixed, slot = tokens * (groups * 32 * acc + 16) + 8 * 4 * 32 * acc, tokens * FMA_PITCH
    kept = (c.shared_bytes - fixed) // slot
    again = tokens * max(-(-case.n // features) - kept, 0) * features * ITEMSIZE[case.dtype]
    together = min(c.grid, device.sms * resident)
    lost = max(together * again - device.cache / 2, 0.0) * c.grid / together
    return rows + stores + lost


def floors(case: Reflections, device: Device) -> dict[str, float]:
    """Seconds that no kernel can beat: each operand once through HBM, and the products once at the tensor cores' peak.

    The backward reads g and x and writes dx; its products are four.
    """
    row = case.T * case.n * ITEMSIZE[case.dtype]
    backward = case.op == "householder_backward"
    factors = (3 if backward else 2) * case.n * case.rank * 4 + (2 if backward else 1) * case.T * case.rank * 4
    flop = (4 if backward else 2) * 2 * case.T * case.n * case.rank
    return {"HBM": ((3 if backward else 2) * row + factors) / device.hbm, "FLOP": flop / device.gemm_peak}


def plain_seconds(case: Reflections, device: Device, gap: float) -> dict[str, float]:
    """Plain torch as passes through HBM, 16-bit tokens: with float32 sums, and all in 16 bits."""
    numbers = case.T * case.n
    return {
        "torch_float32": numbers * WIDE[case.op] / device.hbm + gap * WIDE_CALLS[case.op],
        "torch_16_bits": numbers * NARROW[case.op] / device.hbm + gap * NARROW_CALLS[case.op],
    }
