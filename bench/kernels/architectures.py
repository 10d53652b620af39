# SPDX-License-Identifier: Apache-2.0
"""How many thread blocks an SM holds: the limits of each architecture and the rule of NVIDIA's cuda_occupancy.h.

``tests/kernels/test_occupancy.py`` compares the rule with that header, compiled here.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """Of one SM. ``shared_per_block`` is what a block may have after asking (CUDA C++ programming guide)."""

    threads: int
    shared: int
    shared_per_block: int
    blocks: int


LIMITS = {
    80: Limits(2048, 167936, 166912, 32),
    86: Limits(1536, 102400, 101376, 16),
    89: Limits(1536, 102400, 101376, 24),
    90: Limits(2048, 233472, 232448, 32),
    100: Limits(2048, 233472, 232448, 32),
    120: Limits(1536, 102400, 101376, 24),
}
REGISTERS, MOST_REGISTERS = 65536, 255  # of an SM; of a thread
RESERVED_SHARED = 1024  # of every block, by the driver
SHARED_UNIT, REGISTER_UNIT, WARP_UNIT = 128, 256, 4  # what is allocated at least, and in multiples of


class Occupancy(NamedTuple):
    """``blocks`` of an SM at once, the ``share`` of its warps they fill, and what keeps more out."""

    blocks: int
    share: float
    limiter: str


def _up(a: int, unit: int) -> int:
    return -(-a // unit) * unit


def occupancy(arch: int, registers: int, shared: int, threads: int) -> Occupancy:
    """Of blocks with ``threads`` threads of ``registers`` registers and ``shared`` bytes, static and dynamic."""
    limits = LIMITS[arch]
    warps = -(-threads // 32)
    room = {"warps": limits.threads // 32 // warps, "blocks": limits.blocks}
    if registers > MOST_REGISTERS:
        room["registers"] = 0
    elif registers:
        each = _up(registers * 32, REGISTER_UNIT)  # of a warp; the SM's four parts have a quarter of the registers each
        room["registers"] = REGISTERS // WARP_UNIT // each * WARP_UNIT // warps
        if each * _up(warps, WARP_UNIT) > REGISTERS:
            room["registers"] = 0
    fits = shared <= limits.shared_per_block
    room["shared"] = limits.shared // _up(shared + RESERVED_SHARED, SHARED_UNIT) if fits else 0
    blocks = min(room.values())
    limiter = "+".join(name for name, most in room.items() if most == blocks)
    return Occupancy(blocks, blocks * warps * 32 / limits.threads, limiter)
