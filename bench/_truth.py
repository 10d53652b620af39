# SPDX-License-Identifier: Apache-2.0
"""What the right answers are, and how wrong a contestant may be: a wrong answer gets no time.

The yardstick is the dense chain below in the contestant's own dtype, against the same chain in float64. A contestant
may err FACTOR times as much, in norm and at its worst element, plus half a rounding of the result. The longest chain
among the contestants (PEFT in 16 bits) rounds seven times where the yardstick rounds three, and independent roundings
add up in squares: sqrt(7 / 3) = 1.5; the rest of FACTOR is room for the spread of worst elements and other orders of
summation. A transposed S, a missing diagonal or bias, or stale values are far beyond it (tests/bench).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench._case import Case

FACTOR = 4.0

Answers = dict[str, Tensor]
Truth = Callable[[torch.dtype], Answers]


def _middle(case: Case, dtype: torch.dtype) -> Tensor:
    """S + diag lam, dense."""
    entries = torch.diag(case.lam.to(dtype))
    entries[case.rows, case.cols] = case.values.to(dtype)
    return entries


def _parameters(dM: Tensor, case: Case, dtype: torch.dtype) -> Answers:
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return {"dlam": dM.diagonal().to(kept, copy=True), "dvalues": dM[case.rows, case.cols].to(kept)}


def layer(case: Case, mode: str) -> Truth:
    """y, and for a step dx, dlam and dvalues, of the layer. Dense: exact in float64 and quick at every size."""

    def answers(dtype: torch.dtype) -> Answers:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        x, U, V, g = (t.to(dtype) for t in (case.x, case.U, case.V, case.g))
        M = _middle(case, acc)
        z = x @ V
        y = (z.to(acc) @ M.t()).to(dtype) @ U.t()
        out = {"y": y if case.bias is None else y + case.bias.to(dtype)}
        if mode == "step":
            u = g @ U
            out["dx"] = (u.to(acc) @ M).to(dtype) @ V.t()
            out |= _parameters(u.to(acc).t() @ z.to(acc), case, dtype)
        return out

    return answers


def core(case: Case, mode: str) -> Truth:
    """The sparse core alone, feature-major: w, or the gradients for u = dL/dw."""

    def answers(dtype: torch.dtype) -> Answers:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        M, z = _middle(case, acc), case.z.to(acc)
        if mode == "forward":
            return {"w": (M @ z).to(dtype)}
        u = case.u.to(acc)
        return {"dz": (M.t() @ u).to(dtype), **_parameters(u @ z.t(), case, dtype)}

    return answers


class Judge:
    """Holds the exact answers and the yardstick's errors of one truth."""

    def __init__(self, truth: Truth, dtype: torch.dtype) -> None:
        exact, rounded = truth(torch.float64), truth(dtype)
        self._exact = exact
        self._eps = torch.finfo(dtype).eps
        self._yardstick = {name: self._sizes(rounded[name].double() - exact[name]) for name in exact}

    @staticmethod
    def _sizes(tensor: Tensor) -> tuple[float, float]:
        """Norm and largest element."""
        return float(tensor.norm()), float(tensor.abs().max()) if tensor.numel() else 0.0

    def error(self, got: Answers) -> tuple[float, str | None]:
        """The largest relative error in norm, and what is wrong (None when nothing is)."""
        worst, complaint = 0.0, None
        missing = set(self._exact) - set(got)
        if missing:
            return float("inf"), f"no {', '.join(sorted(missing))}"
        for name, exact in self._exact.items():
            answer = got[name]
            if answer.shape != exact.shape:
                return float("inf"), f"{name} is {list(answer.shape)}, not {list(exact.shape)}"
            if not bool(torch.isfinite(answer).all()):
                return float("inf"), f"{name} is not finite"
            sizes, errors = self._sizes(exact), self._sizes(answer.double() - exact)
            worst = max(worst, errors[0] / max(sizes[0], 1e-300))
            for kind, error, allowed, size in zip(
                ("in norm", "at worst"), errors, self._yardstick[name], sizes, strict=True
            ):
                limit = FACTOR * allowed + 0.5 * self._eps * size
                if error > limit and complaint is None:
                    complaint = f"{name} errs by {error:.2e} {kind}, {limit:.2e} allowed"
        return worst, complaint
