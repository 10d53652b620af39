# SPDX-License-Identifier: Apache-2.0
"""From counts to modelled time.

A kernel takes as long as its busiest resource, plus what comes before its pipelines are full. Per SM: the data pipe of
shared memory and L1, the tensor cores, the schedulers' issue slots, the pipes of integers and of multiply-adds. For the
whole device: bytes from L2 to the SMs, and bytes from HBM.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.kernels import architectures, counts, patterns, static
from bench.kernels.architectures import occupancy
from bench.kernels.counts import FIRST, AnyCase, Case, Counts, Reflections, Sampling, Scatter
from bench.roofline import blocks, householder
from bench.roofline.devices import ALU_LANES, LATENCY, LAUNCH_GAP, MMA_FLOP, SCHEDULERS, SECTOR, Device

ROOT = static.ROOT
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
DEPENDENT_LOADS = 3  # latencies in a row before a kernel works: indices, features, and the last store's way out
TOKENS = 32  # of a tile of the tensor-core kernels


@dataclass(frozen=True)
class Work:
    """What a launch asks of its busiest SM (cycles) and of the device (bytes); see Counts for the words."""

    kernel: str
    grid: int
    per_sm: int  # blocks an SM holds at once
    rounds: int
    wavefronts: float  # of shared memory and L1, busiest SM
    gather: float  # those of them that gather features
    mma: float  # instructions, busiest SM
    instructions: float  # of warps, busiest SM
    alu: float  # those of them for integers and logic
    fma: float  # and those for multiply-adds
    l2_bytes: float
    hbm_bytes: float
    first_bytes: float  # copied to shared memory before work begins, all SMs
    limiter: str


@dataclass(frozen=True)
class Time:
    """Seconds by resource; ``seconds`` is the model's answer."""

    work: Work
    parts: dict[str, float]
    start: float

    @property
    def bound(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])

    def seconds(self, busiest: float = 1.0) -> float:
        """With the busiest resource used to that share."""
        return self.parts[self.bound] / busiest + self.start


def time(work: Work, device: Device) -> Time:
    parts = {
        "shared": work.wavefronts / device.clock,
        "tensor": work.mma * MMA_FLOP / device.mma_flops / device.clock,
        "issue": work.instructions / SCHEDULERS / device.clock,
        "ALU": work.alu * 32 / ALU_LANES / device.clock,
        "FMA": work.fma * 32 / device.fma_lanes / device.clock,
        "L2": work.l2_bytes / device.l2,
        "HBM": work.hbm_bytes / device.hbm,
    }
    start = DEPENDENT_LOADS * LATENCY + work.first_bytes / device.l2
    return Time(work, parts, start)


@cache
def compiled(function: str, arch: int, scalar: str, tiles: int = 0) -> static.Kernel:
    """The library's kernel of this name; of several instances the one with most registers.

    ``tiles`` chooses among those of ``householder_mma_kernel``.
    """
    found = [k for k in static.library() if k.function == function and k.arch == arch]
    found = [k for k in found if not tiles or householder.tiles_of(k) == tiles]
    found = [k for k in found if k.scalar == scalar] or [k for k in found if not k.scalar] or found
    if not found:
        raise LookupError(f"the library has no {function} for sm_{arch}")
    return max(found, key=lambda k: (k.registers, k.name))


@cache
def _sources() -> str:
    """A hash of all that works depend on besides case and device."""
    csrc = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".cuh", ".cu", ".cpp", ".h")]
    python = [Path(module.__file__) for module in (counts, patterns, static, architectures, householder, blocks)]
    texts = [p.read_bytes() for p in [*csrc, *python, Path(__file__), static.LIBRARY]]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def _kept(key: str) -> Path:
    return ROOT / "build" / "roofline" / f"{hashlib.sha256((_sources() + key).encode()).hexdigest()[:32]}.json"


# Kernels whose blocks do equal shares: only the first runs, one of those with the longest share. Of those with many
# small blocks, some. Others run in full, since what they write steers the rest.
EQUAL = (
    "product_mma_kernel", "gradient_mma_kernel", "product_tiles_kernel", "gradient_tiles_kernel", *householder.EQUAL,
    *blocks.EQUAL,
)  # fmt: skip
SMALL = ("product_rows_kernel", "gradient_rows_kernel", "reduce_sources_kernel", *householder.SMALL, *blocks.SMALL)
SAMPLE = {**dict.fromkeys(EQUAL, FIRST), **dict.fromkeys(SMALL, 61)}


@dataclass(frozen=True)
class Share:
    """How the counts of the blocks that ran become those of the busiest SM and of the whole grid."""

    busiest: float
    total: float
    rounds: int


def _share(function: str, c: Counts, case: AnyCase, device: Device, resident: int) -> Share:
    grid, longest, mean = c.grid, 1.0, 1.0
    if isinstance(case, Reflections):
        longest, mean = householder.shares(c, case)
    elif isinstance(case, Sampling) and function in blocks.EQUAL:
        mean = blocks.mean(c, case, device)
    elif function == "gradient_mma_kernel" and not isinstance(case, Scatter):
        grid, splits = _gradient_blocks(c, case, device)
        tiles = -(-case.T // TOKENS)
        longest, mean = -(-tiles // splits) / (tiles // splits), tiles / splits / (tiles // splits)
    rounds = -(-grid // (device.sms * resident))
    if function in EQUAL:
        # Whole rounds of what an SM holds at once, or fewer blocks where they do not fill the last round.
        busiest = min(rounds * resident, -(-grid // device.sms)) * longest / c.blocks
        total = grid * mean / c.blocks
        if function == "product_mma_kernel":  # persistent: blocks differ by an item, as their output shows
            total = case.n * case.T * ITEMSIZE[case.dtype] / SECTOR / c.stores
    else:
        busiest, total = c.scale / min(device.sms, grid), c.scale
    return Share(busiest, total, rounds)


def _gradient_blocks(c: Counts, case: Case | Sampling, device: Device) -> tuple[int, int]:
    """Blocks of the gradient's grid that have jobs (the grid is an upper bound), and token splits."""
    plan = counts.plan(case, device.target)
    block, jobs, job_ptr = plan[1].shape[1], plan[5], plan[6]
    cell = 8 * TOKENS * 2  # bytes: the rows of z that each job of each warp keeps beside two blocks of features
    each = (c.shared_bytes - 2 * block * TOKENS * 2) // cell
    splits, rest = divmod(c.grid, jobs.shape[0] // each + plan[1].shape[0])
    if rest:
        raise RuntimeError(f"the gradient's grid of {c.grid} blocks is not what the model knows")
    return splits * sum(-(-int(n) // each) for n in job_ptr.diff()), splits


def work(c: Counts, case: AnyCase, device: Device) -> Work:
    function = c.function
    tiles = householder.tiles(c, case.T) if function == "householder_mma_kernel" else 0
    kernel = compiled(function, device.arch, case.dtype, tiles)
    resident = occupancy(device.arch, kernel.registers, kernel.shared + c.shared_bytes, c.threads)
    share = _share(function, c, case, device, resident.blocks)
    features = case.n * (case.T or 0) * ITEMSIZE[case.dtype]
    # Each byte once: what a kernel reads again is in L2 by then (docs/kernels.md).
    if isinstance(case, Reflections) and function in householder.EQUAL:
        hbm = householder.hbm_bytes(c, case, device, resident.blocks, c.stores * share.total * SECTOR)
    elif isinstance(case, Sampling) and function in blocks.EQUAL:
        hbm = blocks.hbm_bytes(case, device, share.rounds, features) + c.stores * share.total * SECTOR
    elif function in blocks.SMALL:
        hbm = c.of_space("sectors", "global") * share.total * SECTOR  # a place in the matrix is a sector, come and gone
    elif function.startswith("product"):
        hbm = 2 * features + 8 * (case.nnz or 0)
    elif function.startswith("gradient"):
        hbm = 2 * features + c.stores * share.total * SECTOR
    else:
        hbm = c.of_space("sectors_least", "global") * share.total * SECTOR
    wavefronts = c.gather_wavefronts + c.other_wavefronts + c.register_wavefronts
    requests = sum(s.requests for s in c.sites if not (s.copies and s.space == "global"))
    events, around = (requests + c.mma) * share.busiest, 0.0
    if function == blocks.PLAIN:  # most of its accesses are not of its inner loop
        events = blocks.inner(c) * share.busiest
        around = (requests - blocks.inner(c)) * share.busiest * blocks.AROUND
    return Work(
        kernel=c.kernel, grid=c.grid, per_sm=resident.blocks, rounds=share.rounds,
        wavefronts=wavefronts * share.busiest, gather=c.gather_wavefronts * share.busiest, mma=c.mma * share.busiest,
        instructions=events * kernel.per_event["all"] + around, alu=events * kernel.per_event["alu"] + around / 2,
        fma=events * kernel.per_event["fma"],
        l2_bytes=c.loads * share.total * SECTOR, hbm_bytes=hbm,
        first_bytes=c.shared_bytes / 2 * min(c.grid, device.sms * resident.blocks), limiter=resident.limiter,
    )  # fmt: skip


def _works(case: AnyCase, device: Device) -> list[Work]:
    return [work(c, case, device) for c in counts.run(case, device.target, SAMPLE).values()]


def works(case: AnyCase, device: Device) -> list[Work]:
    """What each kernel of the call asks for, counted once and kept in build/roofline."""
    path = _kept(json.dumps([repr(case), repr(device.target)]))
    if path.exists():
        return [Work(**w) for w in json.loads(path.read_text())]
    made = _works(case, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([w.__dict__ for w in made]))
    part.replace(path)
    return made


def times(case: AnyCase, device: Device) -> list[Time]:
    return [time(w, device) for w in works(case, device)]


def seconds(found: Sequence[Work], device: Device, busiest: float = 1.0) -> float:
    """Of kernels that run one after another."""
    return sum(time(w, device).seconds(busiest) for w in found) + LAUNCH_GAP * (len(found) - 1)


def floors(case: Case, device: Device) -> dict[str, float]:
    """Seconds that no kernel of this design can beat. All of them name one resource alone."""
    features = case.n * case.T * ITEMSIZE[case.dtype]
    gathered = case.nnz * case.T * ITEMSIZE[case.dtype]
    return {
        "HBM": 2 * features / device.hbm,
        "L2": 2 * features / device.l2,
        "gather": gathered / device.shared,
        "FLOP": 2 * case.nnz * case.T / device.gemm_peak,
    }


def dense(case: Case, device: Device) -> dict[str, float]:
    """Seconds of writing S + diag lam as a dense matrix, and of the GEMM with it."""
    itemsize = ITEMSIZE[case.dtype]
    matrix = case.n * case.n * itemsize
    # Zeros, then each entry: its value, its place and a sector of the matrix, read and written.
    write = (matrix + case.nnz * (2 * SECTOR + 16)) / device.hbm + 2 * LAUNCH_GAP
    return {"write": write, "gemm": 2 * case.T * case.n**2 / device.gemm + LATENCY * DEPENDENT_LOADS}
