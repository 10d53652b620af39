# SPDX-License-Identifier: Apache-2.0
"""One timed call, cold or warm, on the CPU or on a GPU; and the order in which contestants take turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

CPU_FLUSH = 64 * 2**20  # bytes: twice the last-level cache of the machines at hand
GPU_FLUSH = 256 * 2**20


class Clock(Protocol):
    """Seconds that ``run(state)`` takes."""

    cache: str  # "warm" or "cold"

    def __call__(self, run: Callable[[Any], Any], state: Any) -> float: ...


class CpuClock:
    """Wall clock. ``cold``: a buffer larger than the caches is rewritten before each call, outside the time."""

    def __init__(self, cold: bool = False) -> None:
        self.cache = "cold" if cold else "warm"
        self._flush = torch.zeros(CPU_FLUSH // 4) if cold else None

    def __call__(self, run: Callable[[Any], Any], state: Any) -> float:
        if self._flush is not None:
            self._flush.add_(1)
        start = time.perf_counter()
        run(state)
        return time.perf_counter() - start


class CudaClock:
    """Device time between two events, caches always cold.

    Rewriting the flush buffer keeps the device busy while the host queues the call, so that what is timed is the
    kernels, and launches only where they take longer than that.
    """

    cache = "cold"

    def __init__(self) -> None:
        self._flush = torch.zeros(GPU_FLUSH // 4, device="cuda")

    def __call__(self, run: Callable[[Any], Any], state: Any) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        run(state)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def make_clock(device: torch.device, cold: bool = False) -> Clock:
    return CudaClock() if device.type == "cuda" else CpuClock(cold)


def orders(k: int) -> list[list[int]]:
    """Williams' design: rounds of k contestants, each of which follows every other equally often.

    Plain rotation would keep every contestant behind the same neighbour, with its caches and its memory.
    """
    first = [0]
    for i in range(1, k):
        first.append((i + 1) // 2 if i % 2 else k - i // 2)
    rows = [[(place + shift) % k for place in first] for shift in range(k)]
    return rows if k % 2 == 0 else rows + [row[::-1] for row in rows]
