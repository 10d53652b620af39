# SPDX-License-Identifier: Apache-2.0
"""Where other ways win against the tensor-core kernels, as modelled: the dense product above some density, the fused
multiply-add kernel below some number of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.kernels.counts import Case
from bench.roofline import model
from bench.roofline.devices import Device
from bench.roofline.model import Work

SIZES = (1024, 2048, 4096, 9216)
TOKENS = (32, 128, 512, 2048, 8192)
FEW_TOKENS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
DENSITIES = (0.01, 0.03)  # counted; what a kernel asks of each resource is a line through them
LARGE, FEW_DENSITIES = 8192, (0.01, 0.02)  # from so many features on


def case_of(n: int, density: float, T: int, tiles: bool = True) -> Case:
    return Case("forward", n, int(n * n * density), T, tiles=tiles)


def between(low: Work, high: Work, share: float) -> Work:
    """The work ``share`` of the way from ``low`` to ``high``, or beyond."""
    if low.kernel != high.kernel:
        raise ValueError(f"{low.kernel} and {high.kernel} are not one kernel")
    amounts = {
        f.name: max(getattr(low, f.name) + share * (getattr(high, f.name) - getattr(low, f.name)), 0.0)
        for f in dataclasses.fields(Work)
        if f.type == "float"
    }
    return dataclasses.replace(low if share < 0.5 else high, **amounts)


def sparse(n: int, T: int, device: Device) -> Callable[[float], float]:
    """density -> seconds of the faster sparse kernels; those without tensor cores are looked at where T is small."""
    densities = FEW_DENSITIES if n > LARGE else DENSITIES
    ways = []
    for tiles in (True, False) if T <= 512 else (True,):
        low, high = (model.works(case_of(n, density, T, tiles), device) for density in densities)
        if [w.kernel for w in low] == [w.kernel for w in high]:
            ways.append((low, high))

    def seconds(density: float) -> float:
        share = (density - densities[0]) / (densities[1] - densities[0])
        return min(
            model.seconds([between(a, b, share) for a, b in zip(low, high, strict=True)], device) for low, high in ways
        )

    return seconds


def dense(n: int, T: int, device: Device) -> Callable[[float], float]:
    return lambda density: sum(model.dense(case_of(n, density, T), device).values())


@dataclass(frozen=True)
class BreakEven:
    """The dense product is modelled to be faster above ``density``; 1.0: never."""

    device: str
    n: int
    T: int
    density: float


def break_even(n: int, T: int, device: Device) -> BreakEven:
    ours, theirs = sparse(n, T, device), dense(n, T, device)
    return BreakEven(device.name, n, T, crossing(lambda density: theirs(density) - ours(density)))


def crossing(gain: Callable[[float], float], low: float = 0.001, high: float = 1.0) -> float:
    """Where a falling ``gain`` crosses zero."""
    if gain(low) <= 0:
        return low
    if gain(high) > 0:
        return high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return high


@dataclass(frozen=True)
class FewTokens:
    """Modelled microseconds of both sparse kernels at 1 %."""

    device: str
    n: int
    T: int
    tensor_us: float
    fma_us: float


def few_tokens(n: int, device: Device, tokens: Sequence[int] = FEW_TOKENS) -> Iterator[FewTokens]:
    for T in tokens:
        tensor, fma = (
            model.seconds(model.works(case_of(n, 0.01, T, tiles), device), device) for tiles in (True, False)
        )
        yield FewTokens(device.name, n, T, 1e6 * tensor, 1e6 * fma)


def fma_below(rows: Sequence[FewTokens]) -> int:
    """The least T from which on the tensor-core kernel is faster at every T that was looked at; 0: at all of them."""
    slower = [row.T for row in rows if row.tensor_us > row.fma_us]
    return min((row.T for row in rows if row.T > max(slower)), default=rows[-1].T + 1) if slower else 0
