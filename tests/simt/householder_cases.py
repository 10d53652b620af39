# SPDX-License-Identifier: Apache-2.0
"""Cases of the Householder ops for the executor, their exact answers, and plain torch's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from frodkernels.reference import householder as reference
from tests.simt.coverage import base_name
from tests.support import assert_no_worse_than_torch

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# dtype of the tokens, of factors and sums
PAIRS = [(F32, F32), (F64, F64), (BF16, F32), (F16, F32), (F32, F64), (BF16, F64), (F16, F64)]
PAIR_IDS = ["-".join(str(t).removeprefix("torch.") for t in pair) for pair in PAIRS]
NARROW = [BF16, F16]
ALL = [True, True]

FMA = {"householder_pad_kernel", "householder_fma_kernel"}
FMA_GRADIENT = {"householder_pad_kernel", "householder_gradient_fma_kernel", "reduce_sources_kernel"}
MMA = {"householder_pack_kernel", "householder_mma_kernel"}
MMA_GRADIENT = {"householder_pack_kernel", "householder_gradient_mma_kernel", "reduce_sources_kernel"}

SCHEDULES = [
    dict(order="reverse"),
    dict(order="random", seed=3),
    dict(order="random", seed=4, yield_permille=50),
    dict(lazy_copies=False),
]


@dataclass
class Case:
    """x, dx [T, n]; out, g [T, m]. Without ``base`` (of the forward) and ``dx_base`` (of the backward), m = n."""

    x: Tensor
    g: Tensor
    left: Tensor  # [n, r]
    right: Tensor  # [m, r]
    base: Tensor | None
    g_left: Tensor  # [m, r]
    x_right: Tensor  # [n, r]
    dx_base: Tensor | None
    coefficients: Tensor  # [T, r]

    @property
    def forward(self) -> tuple:
        return self.x, self.left, self.right, self.base

    @property
    def backward(self) -> tuple:
        """Up to ``needs``."""
        return self.g, self.x, self.coefficients, self.g_left, self.x_right, self.dx_base

    def to(self, tokens: torch.dtype, sums: torch.dtype) -> Case:
        kinds = {"x": tokens, "g": tokens, "base": tokens, "dx_base": tokens}
        return Case(**{k: v if v is None else v.to(kinds.get(k, sums)) for k, v in vars(self).items()})

    def with_tokens(self, change) -> Case:
        """The same numbers, their token matrices laid out by ``change``."""
        names = [name for name in ("x", "g", "base", "dx_base") if getattr(self, name) is not None]
        return replace(self, **{name: change(getattr(self, name)) for name in names})


def make(T: int, n: int, r: int, tokens=F32, sums=F32, m: int | None = None, seed: int = 0) -> Case:
    """Random numbers; with ``m`` the bases are given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    width = n if m is None else m
    made = Case(
        x=draw(T, n), g=draw(T, width), left=draw(n, r) / max(n, 1) ** 0.5, right=draw(width, r),
        base=None if m is None else draw(T, m), g_left=draw(width, r) / max(width, 1) ** 0.5, x_right=draw(n, r),
        dx_base=None if m is None else draw(T, n), coefficients=draw(T, r),
    )  # fmt: skip
    return made.to(tokens, sums)


def ops(module):
    return torch.ops.simt_check if module.checked else torch.ops.simt


def outputs(module, case: Case, needs=ALL) -> tuple[Tensor, ...]:
    """(out, coefficients, dx, q, sum_x, sum_g)"""
    found = ops(module)
    return *found.native_householder(*case.forward), *found.native_householder_backward(*case.backward, needs)


def plain_outputs(case: Case) -> tuple[Tensor, ...]:
    return *reference.householder(*case.forward), *reference.householder_backward(*case.backward, ALL)


def exact(case: Case) -> tuple[Tensor, ...]:
    """In float64, summed wider where float64 is what is tested."""
    if F64 not in (case.x.dtype, case.left.dtype):
        return plain_outputs(case.to(F64, F64))

    def wide(t):
        return t.double().numpy().astype(np.longdouble)

    def product(x, left, right, base):
        coefficients = wide(x) @ wide(left)
        return wide(x if base is None else base) - coefficients @ wide(right).T, coefficients

    out, coefficients = product(*case.forward)
    dx, q = product(case.g, case.g_left, case.x_right, case.dx_base)
    sum_x, sum_g = wide(case.x).T @ q, wide(case.g).T @ wide(case.coefficients)
    if case.dx_base is None:
        sum_x, sum_g = sum_x + sum_g, sum_g[:0, 0]
    return tuple(torch.from_numpy(t.astype(np.float64)) for t in (out, coefficients, dx, q, sum_x, sum_g))


def check(module, *cases: Case) -> None:
    """No worse than plain torch; errors of several cases make one norm, since a lone number may round luckily."""
    got = [outputs(module, case) for case in cases]
    plain = [plain_outputs(case) for case in cases]
    right = [exact(case) for case in cases]
    for ours, torchs, truth in zip(*(zip(*them, strict=True) for them in (got, plain, right)), strict=True):
        assert [t.shape for t in ours] == [t.shape for t in truth]
        assert all(t.is_contiguous() for t in ours)
        assert_no_worse_than_torch(*(torch.cat([t.flatten() for t in ts]) for ts in (ours, truth, torchs)))


def launched(module) -> set[str]:
    return {base_name(name) for name in module.launches()}


def grid_of(module, kernel: str) -> int:
    (found,) = [k for name, k in module.kernels().items() if base_name(name) == kernel]
    return found["grid"]
