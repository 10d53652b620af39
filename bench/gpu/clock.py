# SPDX-License-Identifier: Apache-2.0
"""Device time of one call with cold caches, without the time the host takes to queue it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bench._timing import GPU_FLUSH, Clock, CpuClock

LONGEST_HEAD_START = 0.03  # seconds


class DeviceClock:
    """CUDA events around the call, in a stream that is kept busy until the call is queued.

    The stream first spins for 1.5 times what the host took to queue this call the last time, then a buffer larger than
    the L2 cache is rewritten, then comes the call: what lies between the events is the device's work, with cold caches.
    A call that waits for the device by itself (PEFT's coalescing does) is timed with its waiting.
    """

    cache = "cold"

    def __init__(self, device: str = "cuda") -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = max(GPU_FLUSH, 3 * getattr(properties, "L2_cache_size", 0))
        self._flush = torch.zeros(size // 4, device=device)
        self._hertz = 1e3 * (getattr(properties, "clock_rate", 0) or 1_500_000)
        self._queueing: dict[Callable[[Any], Any], float] = {}

    def __call__(self, run: Callable[[Any], Any], state: Any) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        head_start = min(1.5 * self._queueing.get(run, 1e-3) + 1e-4, LONGEST_HEAD_START)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(head_start * self._hertz))
        self._flush.zero_()
        began = time.perf_counter()
        start.record()
        run(state)
        end.record()
        self._queueing[run] = time.perf_counter() - began
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def make_clock(device: str) -> Clock:
    return DeviceClock() if device == "cuda" else CpuClock()
