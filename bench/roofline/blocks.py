# SPDX-License-Identifier: Apache-2.0
"""What the model knows of the sampled product by dense blocks, and of the scatter."""

from __future__ import annotations

from bench.kernels.counts import Counts, Sampling
from bench.roofline.devices import Device

PLAIN = "sampled_fma_kernel"
EQUAL = ("sampled_mma_kernel", PLAIN)  # their blocks do equal shares, but for the last split
SMALL = ("scatter_values_kernel",)  # many small blocks

# As csrc/cuda/sampled_{mma,fma}.cuh and sampled.cu have it.
MOST_BLOCKS = 32

AROUND = 10  # instructions, half of them integer, of an access of PLAIN outside of its inner loop: read off the code


def inner(c: Counts) -> int:
    """Requests of PLAIN's inner loop: chunks of features from shared memory."""
    return c.total("requests", lambda s: s.space == "shared" and not s.write and s.bytes == 16)


def block(dtype: str) -> tuple[int, int, int]:
    """Rows, columns and tokens of a tile."""
    return {"float32": (128, 128, 16), "float64": (64, 64, 16)}.get(dtype, (128, 192, 32))


def grid(case: Sampling, device: Device) -> tuple[int, int]:
    """Row blocks and ranges of columns; a grid is their product times the token splits."""
    rows, columns, _ = block(case.dtype)
    row_blocks, column_blocks = -(-case.n // rows), -(-case.n // columns)
    each = -(-column_blocks // min(column_blocks, max(MOST_BLOCKS * device.sms // row_blocks, 1)))
    return row_blocks, -(-column_blocks // each)


def mean(c: Counts, case: Sampling, device: Device) -> float:
    """The mean block's work over that of the first, which ran: the last split may be shorter."""
    row_blocks, ranges = grid(case, device)
    splits, rest = divmod(c.grid, row_blocks * ranges)
    if rest:
        raise RuntimeError(f"a grid of {c.grid} blocks is not what the model knows")
    tiles = -(-case.T // block(case.dtype)[2])
    return tiles / splits / -(-tiles // splits)


def hbm_bytes(case: Sampling, device: Device, rounds: int, features: float) -> float:
    """One side's features once; the other's, whose blocks run side by side, in each round that finds them gone."""
    return features * (1 + (rounds if features > device.cache / 2 else 1))
