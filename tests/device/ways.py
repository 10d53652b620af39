# SPDX-License-Identifier: Apache-2.0
"""The ways of the native backend on CUDA, each forced: sizes of tests are below those from which it would choose them.

On the CPU the native backend has one kernel and no tiles: there "tensor cores" and "multiply-adds" are the plain call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from frodkernels import dense
from frodkernels.functional import _views
from frodkernels.ops import sparse_core as ops
from tests.device.places import Place
from tests.support import Case

TENSOR, FMA, DENSE = "tensor cores", "multiply-adds", "dense"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# way, dtype, param_dtype; the dense way is never taken for float16
WAYS = [
    *((way, *pair) for way in (TENSOR, FMA) for pair in ((BF16, F32), (BF16, BF16), (F16, F32), (F16, F16))),
    (DENSE, BF16, F32),
    (DENSE, BF16, BF16),
]
PRODUCT, GRADIENT = "product_mma_kernel", "gradient_mma_kernel"
NEVER = 2**62  # tokens


class Way:
    """The forced way; ``watch`` proves on CUDA that it is taken."""

    def __init__(self, name: str, place: Place) -> None:
        self.name, self.place = name, place

    def __repr__(self) -> str:
        return self.name

    @property
    def exact(self) -> bool:
        """Whether every launch gives the same bits; the GEMM library may choose by stream and workspace."""
        return self.name != DENSE or self.place.type == "cpu"

    @contextlib.contextmanager
    def watch(self, product: bool = True, gradient: bool = True) -> Iterator[None]:
        """On CUDA: what runs inside must launch the way's kernels, and no other way's."""
        if self.place.type != "cuda":
            yield
            return
        with self.place.kernels() as names:
            yield
        wanted = {kernel for kernel, asked in ((PRODUCT, product), (GRADIENT, gradient)) if asked}
        if not (product or gradient):
            return
        assert names, "the profiler saw no kernel at all"
        launched = {kernel for kernel in (PRODUCT, GRADIENT) if any(kernel in name for name in names)}
        assert launched == (wanted if self.name == TENSOR else set()), sorted(names)
        ours = any("frodkernels" in name for name in names)
        assert ours == (self.name != DENSE), sorted(names)


def force(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> Way:
    limit = 0 if name == TENSOR else NEVER
    monkeypatch.setattr(ops, "TENSOR_CORE_TOKENS", limit)
    monkeypatch.setattr(ops, "TENSOR_CORE_WORK", limit)
    monkeypatch.setattr(dense, "dense_is_faster", lambda *_, **__: name == DENSE)
    return Way(name, place)


def tiles_of(case: Case) -> tuple[Any, Any]:
    """The tiles of both views, None where the library has none."""
    views = _views.both_views(case.pattern, case.z)
    return tuple(list(view[3:]) or None for view in (_views.rows_view(views), _views.columns_view(views)))


def call_of(case: Case, token_major: bool = False) -> Callable[[], tuple]:
    """() -> (w, S^T u, dz, dlam, dvalues), with tiles where there are any, made beforehand."""
    rows, columns = tiles_of(case)
    if case.z.is_cuda:
        assert rows and columns, "the case must have tiles on CUDA"

    def call() -> tuple:
        w = ops.sparse_core(*case.forward, token_major, rows)
        v = ops.sparse_core(*case.transpose, token_major, columns)
        return w, v, *ops.sparse_core_backward(*case.backward, [True] * 3, token_major, columns)

    return call
