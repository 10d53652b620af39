# SPDX-License-Identifier: Apache-2.0
"""The shapes that are modelled, and a record for each op, shape and device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.kernels.counts import Case
from bench.roofline import model
from bench.roofline.devices import LAUNCH_GAP, Device
from bench.shapes import SPARSE_RATE

Record = dict[str, Any]
OPS = ("forward", "transpose", "parameters", "backward")  # parameters: dvalues and dlam
BUSIEST = 0.85  # the share of its peak that the busiest resource reaches in the column beside the model's


@dataclass(frozen=True)
class Shape:
    """z is [n, T]; S is [n, n] with nnz entries."""

    name: str
    n: int
    T: int
    nnz: int

    @classmethod
    def of(cls, name: str, n: int, T: int) -> Shape:
        return cls(name, n, T, int(n * n * SPARSE_RATE))


REACH = (
    Shape("Llama-3-8B hidden", 4096, 8192, 167772),
    Shape("FLUX.2-klein mlp_out", 9216, 4608, 849347),
)
SHAPES = (
    *REACH,
    Shape.of("Llama-3.2-3B hidden", 3072, 3072),
    Shape.of("Llama-3.2-3B mlp", 8192, 3072),
    Shape.of("FLUX.2-klein hidden", 3072, 4608),
)


def calls(op: str, shape: Shape) -> list[Case]:
    """The library calls of an op; a backward is the transpose and the gradient, one after the other."""
    parts = {"parameters": ("gradient",), "backward": ("transpose", "gradient")}.get(op, (op,))
    return [Case(part, shape.n, shape.nnz, shape.T) for part in parts]


def record(op: str, shape: Shape, device: Device) -> Record:
    """Microseconds, all modelled."""
    cases = calls(op, shape)
    times = [t for case in cases for t in model.times(case, device)]
    gaps = LAUNCH_GAP * (len(times) - 1)
    seconds = sum(t.seconds() for t in times) + gaps
    slower = sum(t.seconds(BUSIEST) for t in times) + gaps
    floors = {name: sum(model.floors(case, device)[name] for case in cases) for name in model.floors(cases[0], device)}
    if op == "backward":  # u and z need to come once
        floors["HBM"] *= 3 / 4
    dense = {name: sum(model.dense(case, device)[name] for case in cases) for name in ("write", "gemm")}
    main = max(times, key=lambda t: t.seconds())
    highest = max(floors.values())
    return {
        "label": "modelled",
        "device": device.name,
        "op": op,
        "mode": op,
        "impl": "native",
        "dtype": cases[0].dtype,
        "shape": shape.name,
        "n": shape.n, "T": shape.T, "nnz": shape.nnz,
        "modelled_us": _us(seconds),
        "modelled_us_at_85": _us(slower),
        "bound": main.bound,
        "floors_us": {name: _us(value) for name, value in floors.items()},
        "floor_us": _us(highest),
        "over_floor": round(seconds / highest, 3),
        "dense_write_us": _us(dense["write"]),
        "gemm_us": _us(dense["gemm"]),
        "dense_us": _us(sum(dense.values())),
        "over_dense": round(seconds / sum(dense.values()), 3),
        "kernels": [
            {
                "kernel": t.work.kernel,
                "modelled_us": _us(t.seconds()),
                "bound": t.bound,
                "parts_us": {name: _us(value) for name, value in t.parts.items()},
                "start_us": _us(t.start),
                "grid": t.work.grid,
                "rounds": t.work.rounds,
                "blocks_per_sm": t.work.per_sm,
                "limiter": t.work.limiter,
                "l2_bytes": round(t.work.l2_bytes),
            }
            for t in times
        ],
    }  # fmt: skip


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def records(shapes: Sequence[Shape], devices: Sequence[Device], ops: Sequence[str] = OPS) -> Iterator[Record]:
    for shape in shapes:
        for device in devices:
            for op in ops:
                yield record(op, shape, device)
