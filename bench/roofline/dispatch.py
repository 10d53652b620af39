# SPDX-License-Identifier: Apache-2.0
"""Where other ways win against the tensor-core kernels, as modelled: the dense product above some density, the fused
multiply-add kernel below some number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.kernels.counts import Case
from bench.roofline import model
from bench.roofline.devices import Device

SIZES = (1024, 2048, 4096, 9216)
TOKENS = (32, 128, 512, 2048, 8192)
# Counted; between and beyond them the sparse kernels' times are taken for linear. Large patterns stop early.
DENSITIES, FEW_DENSITIES, LARGE = (0.01, 0.02, 0.04), (0.005, 0.01, 0.02), 8192
FEW_TOKENS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def case_of(n: int, density: float, T: int, tiles: bool = True) -> Case:
    return Case("forward", n, int(n * n * density), T, tiles=tiles)


def sparse(n: int, density: float, T: int, device: Device) -> float:
    """Seconds of the faster sparse kernel; the one without tensor cores is looked at where tokens are few."""
    ways = (True, False) if T <= 512 else (True,)
    return min(model.seconds(case_of(n, density, T, tiles), device) for tiles in ways)


def dense(n: int, density: float, T: int, device: Device) -> float:
    return sum(model.dense(case_of(n, density, T), device).values())


@dataclass(frozen=True)
class BreakEven:
    """The dense product is modelled to be faster above ``density``; 1.0: never."""

    device: str
    n: int
    T: int
    density: float
    sparse_us: float  # at the first counted density
    dense_us: float


def break_even(n: int, T: int, device: Device) -> BreakEven:
    """Where the lines through the counted densities meet the dense product's."""
    densities = FEW_DENSITIES if n > LARGE else DENSITIES
    gains = [dense(n, d, T, device) - sparse(n, d, T, device) for d in densities]
    last = len(densities) - 2
    met = 1.0
    for i in range(last + 1):
        (d0, d1), (g0, g1) = densities[i : i + 2], gains[i : i + 2]
        if g0 <= 0:
            met = d0
            break
        if g1 < g0 and (g1 <= 0 or i == last):
            met = d0 + (d1 - d0) * g0 / (g0 - g1)
            break
    first = densities[0]
    return BreakEven(
        device.name, n, T, min(met, 1.0), 1e6 * sparse(n, first, T, device), 1e6 * dense(n, first, T, device)
    )


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
        tensor, fma = (model.seconds(case_of(n, 0.01, T, tiles), device) for tiles in (True, False))
        yield FewTokens(device.name, n, T, 1e6 * tensor, 1e6 * fma)


def fma_below(rows: Sequence[FewTokens]) -> int:
    """The least T from which on the tensor-core kernel is faster at every T that was looked at; 0: at all of them."""
    slower = [row.T for row in rows if row.tensor_us > row.fma_us]
    return min((row.T for row in rows if row.T > max(slower)), default=rows[-1].T + 1) if slower else 0
