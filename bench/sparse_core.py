# SPDX-License-Identifier: Apache-2.0
"""The sparse core alone, z (S + diag lam)^T and its backward, at the sizes that layers call it with.

Modes   forward: w from z.  backward: dz, dlam, dvalues from u = dL/dw and z.
Floors  streaming the operands once: a copy of z; u + z, which reads two and writes one.
Every contestant gets its operands in the layout it has them in inside a layer: token-major for PEFT, feature-major
for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import _peft_layers as peft_layers
from bench import _plain_torch as plain
from bench import _truth
from bench._case import Case, make_case
from bench._interleave import FLOOR, Contestant, Entry, Group
from bench._timing import Clock
from bench.shapes import SIZES, Shape, without_outputs
from frodkernels.ops import sparse_core as ops

OP = "sparse_core"
MODES = ("forward", "backward")

GRADIENTS = ("dz", "dlam", "dvalues")


def shapes(size: str) -> Sequence[Shape]:
    return without_outputs(SIZES[size])


def _without_grad(run: Callable[[], Any], names: tuple[str, ...], detail: str = "") -> Contestant:
    def timed(_: Any = None) -> Any:
        with torch.no_grad():
            return run()

    def answers() -> dict[str, Tensor]:
        got = timed()
        return dict(zip(names, got if isinstance(got, tuple) else (got,), strict=True))

    return Contestant(timed, answers=answers, detail=detail)


def _through_autograd(
    product: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case, mode: str, token_major: bool, detail: str
) -> Contestant:
    """``product(z, lam, values)``; in mode "backward" its forward runs before the clock does."""

    def layout(features: Tensor) -> Tensor:
        return features.t().contiguous() if token_major else features

    def back(got: Tensor) -> Tensor:
        return got.t() if token_major else got

    z, u = layout(case.z).detach(), layout(case.u)
    lam, values = case.lam.clone(), case.values.clone()
    if mode == "forward":
        made = _without_grad(lambda: product(z, lam, values), ("w",), detail)
        inner = made.answers
        assert inner is not None
        made.answers = lambda: {"w": back(inner()["w"])}
        return made
    leaves = [t.requires_grad_() for t in (z.clone(), lam, values)]

    def backward(w: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(w, leaves, u)

    def forward() -> Tensor:
        return product(*leaves)

    def answers() -> dict[str, Tensor]:
        dz, dlam, dvalues = backward(forward())
        return {"dz": back(dz), "dlam": dlam, "dvalues": dvalues}

    return Contestant(backward, prepare=forward, answers=answers, detail=detail)


def _frodkernels(case: Case, mode: str) -> Contestant:
    csr, csc = case.pattern.csr, case.pattern.csc
    z, u, lam, values = case.z, case.u, case.lam, case.values
    if mode == "forward":
        return _without_grad(lambda: ops.sparse_core(z, lam, values, *csr), ("w",))
    needs = [True, True, True]
    return _without_grad(lambda: ops.sparse_core_backward(u, z, lam, values, *csc, needs), GRADIENTS)


def _peft(case: Case, mode: str) -> Contestant:
    """What PEFT's forward does between its two GEMMs: sort the pattern, multiply, add the diagonal."""
    layer = peft_layers.frod(case)
    indices, size = torch.stack([case.rows, case.cols]), (case.shape.n, case.shape.n)

    def product(z: Tensor, lam: Tensor, values: Tensor) -> Tensor:
        S = torch.sparse_coo_tensor(indices, values.to(z.dtype), size).coalesce()
        return layer._sparse_activation_mm(z, S) + z * lam.to(z.dtype)

    return _through_autograd(product, case, mode, token_major=True, detail="")


def _plain(case: Case, mode: str, form: str) -> Contestant:
    plan, z, u, lam, values = plain.Plan(case), case.z, case.u, case.lam, case.values
    if form == "csr":
        runs: dict[str, Callable[[], Any]] = {
            "forward": lambda: plain.csr_product(plan, z, lam, values, plan.csr),
            "backward": lambda: (
                plain.csr_product(plan, u, lam, values, plan.transposed),
                *reversed(plain.csr_entries(plan, u, z)),
            ),
        }
    else:
        runs = {
            "forward": lambda: plan.dense(values, lam, z.dtype) @ z,
            "backward": lambda: (
                plan.dense(values, lam, u.dtype).t() @ u,
                *reversed(plain.dense_entries(plan, u @ z.t())),
            ),
        }
    return _without_grad(runs[mode], ("w",) if mode == "forward" else GRADIENTS, form)


def _compiled(case: Case, mode: str) -> Contestant:
    flat = plain.Plan(case).flat

    def dense(z: Tensor, lam: Tensor, values: Tensor) -> Tensor:
        return plain.filled(lam, values, flat, z.dtype) @ z

    return _through_autograd(plain.compiled(dense), case, mode, token_major=False, detail="dense")


def _floor(case: Case, mode: str) -> Contestant:
    run = case.z.clone if mode == "forward" else lambda: case.u + case.z
    return Contestant(_without_grad(run, ()).run, detail="streaming")


def _least_bytes(case: Case, mode: str) -> int:
    """Features once each way, entries and 16-bit indices once; gradients of the entries once."""
    n, T = case.shape.n, case.shape.T
    features = n * T * case.dtype.itemsize
    index = 2 if n <= 65536 else 4
    entries = case.values.nbytes + case.lam.nbytes
    once = case.rows.numel() * index + entries
    return 2 * features + once if mode == "forward" else 3 * features + once + entries


def implementations(mode: str, compile: bool = True) -> tuple[str, ...]:
    """The contestants, in the order of the tables; the same in every mode."""
    return (FLOOR, "peft", "torch:csr", "torch:dense", *(["compile"] if compile else []), "frodkernels")


def group(shape: Shape, mode: str, dtype: torch.dtype, clock: Clock, device: torch.device, compile: bool) -> Group:
    """All contestants for one size, mode and dtype."""
    case = make_case(shape, dtype, device)
    makers: dict[str, Callable[[], Contestant]] = {
        FLOOR: lambda: _floor(case, mode),
        "peft": lambda: _peft(case, mode),
        "torch:csr": lambda: _plain(case, mode, "csr"),
        "torch:dense": lambda: _plain(case, mode, "dense"),
        "compile": lambda: _compiled(case, mode),
        "frodkernels": lambda: _frodkernels(case, mode),
    }
    entries = tuple(Entry(impl, makers[impl]) for impl in implementations(mode, compile))
    return Group(OP, mode, shape, dtype, _truth.core(case, mode), entries, _least_bytes(case, mode))
