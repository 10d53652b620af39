# SPDX-License-Identifier: Apache-2.0
"""FRoD in plain torch, as well as it can be written: the forms a good programmer would try before writing a kernel.

Every form treats the diagonal as n more nonzeros of S, plans the pattern once, and has a hand-written backward that
does no more than it must:

csr     feature-major z, ``torch.sparse`` CSR products, ``sampled_addmm`` for the gradient of the entries. 16-bit
        operands go through float32: torch has no 16-bit CSR product on the CPU.
dense   S + diag lam filled into an [n, n] matrix, then GEMMs: 3 forward, 4 backward.
weight  the whole [m, n] weight, then one GEMM: 3 forward, 4 backward, two in each direction without T.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bench._case import Case

for _notice in ("Sparse CSR tensor support is in beta", "Sparse invariant checks are implicitly disabled"):
    warnings.filterwarnings("ignore", message=_notice)


class Plan:
    """Positions of S + diag lam: flat ids, and CSR of it and of its transpose. Entries are ``cat(values, lam)``."""

    def __init__(self, case: Case) -> None:
        n = case.shape.n
        diagonal = torch.arange(n, device=case.device)
        self.n, self.nnz = n, case.rows.numel()
        self.rows = torch.cat([case.rows, diagonal])
        self.cols = torch.cat([case.cols, diagonal])
        self.flat = self.rows * n + self.cols
        self.csr = self._compress(self.rows, self.cols)
        self.transposed = self._compress(self.cols, self.rows)

    def _compress(self, groups: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = torch.argsort(groups * self.n + others)
        pointers = torch.zeros(self.n + 1, dtype=torch.int32, device=groups.device)
        pointers[1:] = torch.bincount(groups, minlength=self.n).cumsum(0)
        return pointers, others[order].to(torch.int32), order

    def sparse(self, entries: Tensor, view: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        pointers, others, order = view
        return torch.sparse_csr_tensor(pointers, others, entries[order], (self.n, self.n), check_invariants=False)

    @functools.cached_property
    def pattern_only(self) -> Tensor:
        """Zeros at every position: what sampled_addmm samples at."""
        return self.sparse(torch.zeros(self.flat.numel(), device=self.flat.device), self.csr)

    def dense(self, values: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
        entries = torch.cat([values, lam]).to(dtype)
        return entries.new_zeros(self.n * self.n).index_copy_(0, self.flat, entries).view(self.n, self.n)

    def split(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """(dvalues, dlam), float32, from gradients of the entries."""
        entries = entries.float()
        return entries[: self.nnz], entries[self.nnz :]


def csr_product(plan: Plan, z: Tensor, lam: Tensor, values: Tensor, view: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return (plan.sparse(torch.cat([values, lam]), view) @ z.float()).to(z.dtype)


def csr_entries(plan: Plan, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(dvalues, dlam) = (u z^T) at the pattern."""
    sampled = torch.sparse.sampled_addmm(plan.pattern_only, u.float(), z.t().float(), beta=0.0).values()
    return plan.split(torch.empty_like(sampled).index_copy_(0, plan.csr[2], sampled))


def dense_entries(plan: Plan, dM: Tensor) -> tuple[Tensor, Tensor]:
    return plan.split(dM.reshape(-1)[plan.flat])


class _Csr(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, V: Tensor, lam: Tensor, values: Tensor, bias: Any, plan: Plan
    ) -> Tensor:
        z = V.t() @ x.t()
        w = csr_product(plan, z, lam, values, plan.csr).t()
        ctx.save_for_backward(z, U, V, lam, values)
        ctx.plan = plan
        return w @ U.t() if bias is None else torch.addmm(bias, w, U.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, U, V, lam, values = ctx.saved_tensors
        u = U.t() @ g.t()
        dz = csr_product(ctx.plan, u, lam, values, ctx.plan.transposed)
        dvalues, dlam = csr_entries(ctx.plan, u, z)
        return dz.t() @ V.t(), None, None, dlam, dvalues, None, None


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, V: Tensor, lam: Tensor, values: Tensor, bias: Any, plan: Plan
    ) -> Tensor:
        M = plan.dense(values, lam, x.dtype)
        z = x @ V
        ctx.save_for_backward(z, M, U, V)
        ctx.plan = plan
        w = z @ M.t()
        return w @ U.t() if bias is None else torch.addmm(bias, w, U.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, M, U, V = ctx.saved_tensors
        u = g @ U
        dvalues, dlam = dense_entries(ctx.plan, u.t() @ z)
        return (u @ M) @ V.t(), None, None, dlam, dvalues, None, None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, V: Tensor, lam: Tensor, values: Tensor, bias: Any, plan: Plan
    ) -> Tensor:
        W = (U @ plan.dense(values, lam, x.dtype)) @ V.t()
        ctx.save_for_backward(x, W, U, V)
        ctx.plan = plan
        return torch.nn.functional.linear(x, W, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, U, V = ctx.saved_tensors
        dvalues, dlam = dense_entries(ctx.plan, U.t() @ ((g.t() @ x) @ V))
        return g @ W, None, None, dlam, dvalues, None, None


FORMS = {"csr": _Csr, "dense": _Dense, "weight": _Weight}


def layer(form: str, case: Case, plan: Plan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``f(x, lam, values)`` in one of FORMS."""
    return lambda x, lam, values: FORMS[form].apply(x, case.U, case.V, lam, values, case.bias, plan)


def filled(lam: Tensor, values: Tensor, flat: Tensor, dtype: torch.dtype) -> Tensor:
    n = lam.numel()
    entries = torch.cat([values, lam]).to(dtype)
    return entries.new_zeros(n * n).index_put((flat,), entries).view(n, n)


def compilable(form: str, case: Case, plan: Plan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``dense`` or ``weight`` in torch's own differentiable operations, for torch.compile to derive and fuse."""
    U, V, bias, flat = case.U, case.V, case.bias, plan.flat

    def dense(x: Tensor, lam: Tensor, values: Tensor) -> Tensor:
        w = (x @ V) @ filled(lam, values, flat, x.dtype).t()
        return torch.nn.functional.linear(w, U, bias)

    def weight(x: Tensor, lam: Tensor, values: Tensor) -> Tensor:
        W = (U @ filled(lam, values, flat, x.dtype)) @ V.t()
        return torch.nn.functional.linear(x, W, bias)

    return {"dense": dense, "weight": weight}[form]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile with its default backend, for the shapes at hand."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # a pool of compiler processes would compete with what is measured
    torch._dynamo.reset()  # every group compiles the same code for other shapes
    return torch.compile(function, fullgraph=True, dynamic=False)
