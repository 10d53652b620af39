# SPDX-License-Identifier: Apache-2.0
"""The contestants of stage "micro": those of the CPU benchmarks, each backend by itself, and what a GPU adds.

auto           what a user gets: the backend, the kernel (and for a layer the path) that the library chooses
native         sparse core: the native kernel itself, with the tensor cores' plan where there is one; layer: the native
               backend forced, path "activation"
native:fma     sparse core in 16 bits: the native kernel without that plan
triton         the same op with the Triton backend forced
input, output  HRA layer: from that side of the weight; torch:factor: plain torch with W H made in every call
peft           PEFT's own way: in 16 bits S is densified in every call, in float32 it is torch.sparse.mm
dense:once     S + diag lam is a ready dense matrix: the dense product alone, the rival of every sparse kernel
floor          sparse core: streaming the operands once; layer: the bare GEMMs of its cheapest order
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import frodkernels as fk
from bench import _plain_torch as plain
from bench import _truth, frod, householder, hra, sparse_core
from bench._case import Case, make_case
from bench._interleave import FLOOR, Contestant, Entry, Group, Unavailable
from bench._timing import Clock
from bench.gpu.shapes import Job
from bench.suites import DTYPES
from frodkernels import _backends, _ops
from frodkernels.functional import _views

BACKENDS = ("native", "triton")
OPS = ("sparse_core", "sparse_core_backward")
REFLECTION_OPS = ("householder", "householder_backward", "householder_gradient")


def forced(made: Contestant, backend: str, device: str, ops: Sequence[str] = OPS) -> Contestant:
    """The same contestant with every op, which are among ``ops``, served by ``backend``."""
    reason = next(filter(None, (_backends.unavailable(op, device, backend) for op in ops)), None)
    if reason is not None:
        raise Unavailable(reason)
    run, answers, saved = made.run, made.answers, made.saved

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with fk.backend(backend):
                return function(*arguments)

        return call

    made.run = inside(run)
    made.answers = None if answers is None else inside(answers)
    made.saved = None if saved is None else inside(saved)
    made.detail = made.detail or backend
    return made


def _ours(case: Case, mode: str) -> Contestant:
    """The op as the library's own functions call it."""
    views = _views.both_views(case.pattern, case.z)
    rows, columns = _views.rows_view(views), _views.columns_view(views)
    z, u, lam, values = case.z, case.u, case.lam, case.values
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: _views.product(z, lam, values, rows),
        "transpose": lambda: _views.product(u, lam, values, columns),
        "parameters": lambda: _views.gradients(u, z, lam, values, columns, PARAMETERS)[1:],
        "backward": lambda: _views.gradients(u, z, lam, values, columns, [True, True, True]),
    }
    return sparse_core._without_grad(runs[mode], NAMES[mode])


def _kernel(case: Case, mode: str, tiled: bool) -> Contestant:
    """The native operator itself: no dispatcher, which may prefer a dense product."""
    device = case.device.type
    reason = next(filter(None, (_backends.unavailable(op, device, "native") for op in OPS)), None)
    if reason is not None:
        raise Unavailable(reason)
    views = _views.both_views(case.pattern, case.z)
    rows, columns = _views.rows_view(views), _views.columns_view(views)
    row_tiles, column_tiles = (list(view[3:]) if tiled else [] for view in (rows, columns))
    if not tiled and len(rows) == 3:
        raise Unavailable("the plain kernel is the only one here")
    z, u, lam, values = case.z, case.u, case.lam, case.values
    forward, backward = _ops.native("sparse_core"), _ops.native("sparse_core_backward")
    needs = [True, True, True]
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(z, lam, values, *rows[:3], False, row_tiles),
        "transpose": lambda: forward(u, lam, values, *columns[:3], False, column_tiles),
        "parameters": lambda: backward(u, z, lam, values, *columns[:3], PARAMETERS, False, column_tiles)[1:],
        "backward": lambda: backward(u, z, lam, values, *columns[:3], needs, False, column_tiles),
    }
    return sparse_core._without_grad(runs[mode], NAMES[mode], "tensor cores" if row_tiles else "fused multiply-add")


NAMES = {
    "forward": ("w",), "transpose": ("dz",), "parameters": ("dlam", "dvalues"), "backward": sparse_core.GRADIENTS
}  # fmt: skip
PARAMETERS = [False, True, True]  # needs


def core_truth(case: Case, mode: str) -> _truth.Truth:
    """Besides the modes of the CPU benchmarks: "transpose", (S + diag lam)^T u, the product of a backward that trains
    nothing; "parameters", the gradients of lam and values alone, of a layer whose input needs none."""

    def answers(dtype: torch.dtype) -> _truth.Answers:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        if mode == "transpose":
            return {"dz": (_truth._middle(case, acc).t() @ case.u.to(acc)).to(dtype)}
        return _truth._parameters(case.u.to(acc) @ case.z.to(acc).t(), case, dtype)

    return answers if mode in ("transpose", "parameters") else _truth.core(case, mode)


def _plain(case: Case, mode: str, form: str) -> Contestant:
    if mode not in ("transpose", "parameters"):
        return sparse_core._plain(case, mode, form)
    plan, z, u, lam, values = plain.Plan(case), case.z, case.u, case.lam, case.values
    if mode == "parameters":
        entries: dict[str, Callable[[], Any]] = {
            "csr": lambda: (*reversed(plain.csr_entries(plan, u, z)),),
            "dense": lambda: (*reversed(plain.dense_entries(plan, u @ z.t())),),
        }
        return sparse_core._without_grad(entries[form], NAMES[mode], form)
    if form == "csr":
        run: Callable[[], Tensor] = lambda: plain.csr_product(plan, u, lam, values, plan.transposed)  # noqa: E731
    else:
        run = lambda: plan.dense(values, lam, u.dtype).t() @ u  # noqa: E731
    return sparse_core._without_grad(run, ("dz",), form)


def _once(case: Case, mode: str) -> Contestant:
    plan, z, u = plain.Plan(case), case.z, case.u
    M = plan.dense(case.values, case.lam, z.dtype)
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: M @ z,
        "transpose": lambda: M.t() @ u,
        "backward": lambda: (M.t() @ u, *reversed(plain.dense_entries(plan, u @ z.t()))),
    }
    return sparse_core._without_grad(runs[mode], NAMES[mode], "dense, made before")


class _Ready(plain.Plan):
    """A plan whose dense middle was made before."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._ready = super().dense(case.values, case.lam, case.dtype)

    def dense(self, values: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
        return self._ready


def _layer_once(case: Case, mode: str) -> Contestant:
    plan = _Ready(case)
    lam, values = frod._trainable(case, mode)
    function = plain.layer("dense", case, plan)
    made = frod.contestant(lambda x: function(x, lam, values), case, mode, {"dlam": lam, "dvalues": values})
    made.detail = "dense, made before"
    return made


def _core_group(job: Job, case: Case, compile: bool) -> Group:
    mode, device = job.mode, case.device.type
    stream = {"transpose": "forward", "parameters": "backward"}.get(mode, mode)
    makers: dict[str, Callable[[], Contestant]] = {
        FLOOR: lambda: sparse_core._floor(case, stream),
        "auto": lambda: _ours(case, mode),
        "native": lambda: _kernel(case, mode, tiled=True),
        **({"native:fma": lambda: _kernel(case, mode, tiled=False)} if case.z.element_size() == 2 else {}),
        "triton": lambda: forced(_ours(case, mode), "triton", device),
        "dense:once": lambda: _once(case, mode),
        "torch:dense": lambda: _plain(case, mode, "dense"),
        "torch:csr": lambda: _plain(case, mode, "csr"),
    }
    if mode in sparse_core.MODES:  # PEFT and autograd have no transpose and no parameters' gradients by themselves
        makers["peft"] = lambda: sparse_core._peft(case, mode)
        if compile:
            makers["compile"] = lambda: sparse_core._compiled(case, mode)
    if mode == "parameters":
        del makers["dense:once"]  # the same as torch:dense: no matrix is needed
    truth = core_truth(case, mode)
    entries = tuple(Entry(name, make) for name, make in makers.items())
    return Group(job.op, mode, job.shape, case.dtype, truth, entries, sparse_core._least_bytes(case, stream))


def _layer_group(job: Job, case: Case, clock: Clock, compile: bool) -> Group:
    mode, device = job.mode, case.device.type
    paths = ("activation", "fold", "materialize")
    makers: dict[str, Callable[[], Contestant]] = {
        FLOOR: lambda: frod._floor(case, mode, clock),
        "auto": lambda: frod.ours(case, mode, "auto"),
        **{
            name: functools.partial(lambda name: forced(frod.ours(case, mode, "activation"), name, device), name)
            for name in BACKENDS
        },
        **{path: functools.partial(frod.ours, case, mode, path) for path in paths},
        "peft": lambda: frod._peft(case, mode, accelerated=False),
        "accelerated": lambda: frod._peft(case, mode, accelerated=True),
        "dense:once": lambda: _layer_once(case, mode),
        "torch": lambda: frod._plain(case, mode, clock),
        "lora8": lambda: frod._lora(case, mode),
    }
    if compile:
        makers["compile"] = lambda: frod._compiled(case, mode, clock)
    return Group(
        job.op, mode, job.shape, case.dtype, _truth.layer(case, mode), tuple(map(Entry, makers, makers.values()))
    )


def _reflections_group(job: Job, device: torch.device, clock: Clock, compile: bool) -> Group:
    """The contestants of the CPU benchmarks, ours with each backend forced beside them; u in float32."""
    made: Group = (householder if job.op == "householder" else hra).group(
        job.shape, job.mode, DTYPES[job.dtype], clock, device, compile, torch.float32
    )
    entries = [Entry("auto", e.make) if e.impl == "frodkernels" else e for e in made.entries]
    ours = next(e for e in entries if e.impl == "auto")
    for backend in BACKENDS:
        make = functools.partial(lambda name: forced(ours.make(), name, device.type, REFLECTION_OPS), backend)
        entries.append(Entry(backend, make))
    return dataclasses.replace(made, entries=tuple(entries))


def build(job: Job, device: torch.device, clock: Clock, compile: bool) -> Group:
    """The group of one job, its operands on ``device``."""
    if job.op in ("householder", "hra_linear"):
        return _reflections_group(job, device, clock, compile)
    case = make_case(job.shape, DTYPES[job.dtype], device)
    return _core_group(job, case, compile) if job.op == "sparse_core" else _layer_group(job, case, clock, compile)
