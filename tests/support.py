# SPDX-License-Identifier: Apache-2.0
"""Cases, layouts, exact answers and the error bar that the tests of every backend share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import frodkernels as fk

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# storage dtype, parameter dtype: same, float32 beside 16 bits (the usual case), float64 parameters, and the odd one out
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.float64),
    (torch.float64, torch.float32),
]


def names(*dtypes: torch.dtype) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in dtypes)


DTYPE_IDS = [names(*pair) for pair in DTYPES]


def assert_no_worse_than_torch(
    got: Tensor, exact: Tensor, torch_same_dtype: Tensor, factor: float = 1.5, ulps: float = 0.5
) -> None:
    """The error in norm against float64 is at most ``factor`` times plain torch's in the same dtype, plus rounding."""
    assert got.dtype == torch_same_dtype.dtype, f"{got.dtype} but plain torch gives {torch_same_dtype.dtype}"
    assert got.shape == exact.shape == torch_same_dtype.shape
    assert torch.isfinite(got).all(), "not finite: wrong, or an element was never written"
    error = (got.double() - exact).norm()
    torch_error = (torch_same_dtype.double() - exact).norm()
    floor = ulps * torch.finfo(got.dtype).eps * exact.norm()
    assert error <= factor * torch_error + floor, f"{error=:.3e} {torch_error=:.3e} {floor=:.3e}"


# ---- patterns --------------------------------------------------------------------------------------------------------

KINDS = ("empty", "one", "gaps", "full_row", "full_column", "dense", "random")


def coo(kind: str, m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows and columns of a pattern, in a shuffled order (adapter files promise none)."""
    g = torch.Generator().manual_seed(seed)
    flat = torch.arange(m * n)
    rows, cols = flat // max(n, 1), flat % max(n, 1)
    rank = torch.randperm(m * n, generator=g)
    few, half = rank < 0.15 * m * n, rank < 0.5 * m * n
    keep = {
        "empty": torch.zeros(m * n, dtype=torch.bool),
        "one": flat == m * n // 2,
        "gaps": half & (rows % 3 != 1) & (cols % 3 != 2) & (rows != m - 1) & (cols != n - 1),
        "full_row": few | (rows == m // 2),
        "full_column": few | (cols == n // 2),
        "dense": torch.ones(m * n, dtype=torch.bool),
        "random": few,
    }[kind]
    flat = flat[keep]
    flat = flat[torch.randperm(flat.numel(), generator=g)]
    return flat // max(n, 1), flat % max(n, 1)


# ---- layouts of a [features, T] matrix -------------------------------------------------------------------------------


def _in_buffer(x: Tensor, strides: tuple[int, int], offset: int) -> Tensor:
    """``x`` inside a larger buffer of NaN: whoever reads past an element shows it."""
    size = offset + strides[0] * x.shape[0] + strides[1] * x.shape[1] + 1
    return x.new_full((size,), float("nan")).as_strided(x.shape, strides, offset).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "feature_major": lambda x: x.contiguous(),
    "token_major": lambda x: x.t().contiguous().t(),
    "feature_pitched": lambda x: _in_buffer(x, (x.shape[1] + 5, 1), 1),
    "token_pitched": lambda x: _in_buffer(x, (1, x.shape[0] + 3), 1),
    "strided": lambda x: _in_buffer(x, (2 * x.shape[1] + 3, 2), 3),
    "expanded_tokens": lambda x: x[:, :1].expand(-1, x.shape[1]) if x.shape[1] else x,
    "expanded": lambda x: x.flatten()[:1].reshape(1, 1).expand(x.shape) if x.numel() else x,
}


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """w = (S + D) z with S [m, n], and a gradient u = dL/dw. Square when there is a diagonal."""

    u: Tensor  # [m, T]
    z: Tensor  # [n, T]
    lam: Tensor | None
    values: Tensor
    rows: Tensor
    cols: Tensor
    pattern: fk.SparsePattern

    @property
    def forward(self) -> tuple:
        """The arguments of ``sparse_core`` for w = (S + D) z."""
        return self.z, self.lam, self.values, *self.pattern.csr

    @property
    def transpose(self) -> tuple:
        """The arguments of ``sparse_core`` for (S + D)^T u."""
        return self.u, self.lam, self.values, *self.pattern.csc

    @property
    def backward(self) -> tuple:
        """The arguments of ``sparse_core_backward``, up to ``needs``."""
        return self.u, self.z, self.lam, self.values, *self.pattern.csc

    def matrix(self) -> Tensor:
        """S + D in float64, dense."""
        dense = torch.zeros(self.pattern.shape, dtype=torch.float64)
        dense[self.rows, self.cols] = self.values.double()
        return dense if self.lam is None else dense + torch.diag(self.lam.double())

    def _exact(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b rounded to float64; summed wider where float64 is what is tested."""
        a, b = a.double(), b.double()
        if torch.float64 not in (self.z.dtype, self.values.dtype):
            return a @ b
        return torch.from_numpy((a.numpy().astype(np.longdouble) @ b.numpy().astype(np.longdouble)).astype(np.float64))

    def exact_forward(self) -> Tensor:
        return self._exact(self.matrix(), self.z)

    def exact_transpose(self) -> Tensor:
        return self._exact(self.matrix().t(), self.u)

    def exact_backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dz, dlam, dvalues); dlam is [0] without a diagonal."""
        products = self._exact(self.u, self.z.t())  # [m, n]: every pair of features, summed over the tokens
        dlam = products.new_zeros(0) if self.lam is None else products.diagonal()
        return self.exact_transpose(), dlam, products[self.rows, self.cols]

    def laid_out(self, layout: str) -> Case:
        """The same case with u and z in another layout (an expanded one changes their numbers)."""
        change = LAYOUTS[layout]
        return Case(change(self.u), change(self.z), self.lam, self.values, self.rows, self.cols, self.pattern)


def make_case(
    m: int,
    n: int,
    T: int,
    kind: str = "random",
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype = torch.float32,
    *,
    lam: bool | None = None,
    seed: int = 0,
) -> Case:
    """A case with random numbers; a diagonal where S is square, unless ``lam`` says otherwise."""
    g = torch.Generator().manual_seed(seed)
    rows, cols = coo(kind, m, n, seed)
    with_lam = m == n if lam is None else lam
    u, z = (torch.randn(k, T, generator=g, dtype=torch.float64).to(dtype) for k in (m, n))
    diagonal = torch.randn(n, generator=g, dtype=torch.float64).to(param_dtype) if with_lam else None
    values = torch.randn(rows.numel(), generator=g, dtype=torch.float64).to(param_dtype)
    return Case(u, z, diagonal, values, rows, cols, fk.SparsePattern(rows, cols, (m, n)))
