# SPDX-License-Identifier: Apache-2.0
"""Does a layer's U belong to the V beside it, and the U that does.

FRoD's U is the column-normalised ``B = W V^-T``. PEFT never saves it: on load it solves for U against a V it has just
regenerated from the base weights, and then overwrites V with the file's. Where the two differ (another number of
threads or another LAPACK flips the signs of eigenvectors, or turns whole eigenspaces) the layer is silently wrong.

Three tests, cheapest first, decide per layer:

1. provenance: a digest of the V that U was made from, kept since the adapter was injected, against the V in place;
2. an untrained adapter reconstructs its own W: ``p^T U diag(lam) V^T = p^T W`` for a few probes p (no solve);
3. ``V^-1 (W^T p)`` against ``U^T p``, which must agree column by column up to a positive factor: one LU of V per
   category, a few right-hand sides per layer.

Only a layer that fails is solved in full, with the very arithmetic PEFT uses (same bits), and U is replaced only if
it really differs.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from frodkernels.nn.eval_cache import version
from frodkernels.peft.plan import digest

PROBES = 8
FRESH = 1e-4  # relative residual of an untrained adapter's reconstruction, float32
SAME = 1e-5  # relative difference below which U is left alone, float32
HALF = 8  # in 16-bit storage: this many eps of reconstruction error are rounding, not a foreign V


@dataclass(frozen=True)
class Origin:
    """The V that a layer's U was made from."""

    V: weakref.ref[Tensor]
    version: int
    digest: bytes
    dtype: torch.dtype

    def at_rest(self, V: Tensor) -> bool:
        """V is that very tensor and nothing has written to it since."""
        return self.V() is V and self.version == version(V)


_DIGESTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # V -> (version, digest)


def origin_of(V: Tensor) -> Origin:
    """V as it is now, as the origin of a U made from it."""
    known = _DIGESTS.get(V)
    if known is None or known[0] != version(V):
        known = _DIGESTS[V] = (version(V), digest(V))
    return Origin(weakref.ref(V), known[0], known[1], V.dtype)


@dataclass
class _Factored:
    """``V`` in float64 with its LU, as ``torch.linalg.solve`` factors it (the transpose, used adjointly)."""

    lu: Tensor | None
    pivots: Tensor

    def solve(self, rhs: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self.lu, self.pivots, rhs, adjoint=True)


class Bases:
    """The factors of each V, computed once for all its layers. Large, so it lives for one call."""

    def __init__(self) -> None:
        self._factors: dict[tuple[int, int], tuple[Tensor, _Factored]] = {}

    def factored(self, V: Tensor) -> _Factored:
        key = (id(V), version(V))
        if key not in self._factors:
            v = V.detach().to(torch.float64).cpu()
            lu, pivots, info = torch.linalg.lu_factor_ex(v.mT)
            # V itself too: the reference keeps its id from being reused
            self._factors[key] = (V, _Factored(None if int(info) else lu, pivots))
        return self._factors[key][1]


def base_weight(layer: Any) -> Tensor | None:
    """The layer's own W [m, n], also while an adapter is merged into it; None when its data are elsewhere."""
    weight = layer.get_base_layer().weight
    if layer.merged and layer._base_weight_before_merge is not None:
        weight = layer._base_weight_before_merge
    if weight.is_meta or not weight.is_floating_point() or weight.dim() != 2:
        return None
    weight = weight.detach()
    return weight.T if layer.fan_in_fan_out else weight


def _probes(m: int) -> Tensor:
    generator = torch.Generator().manual_seed(0x5EED)
    return torch.randn(m, PROBES, generator=generator, dtype=torch.float64)


def _storage_eps(*tensors: Tensor) -> float:
    """The rounding unit of the coarsest storage involved; a float32 tensor that holds bfloat16 numbers is coarse."""
    worst = 0.0
    for tensor in tensors:
        dtype = tensor.dtype
        for narrow in (torch.bfloat16, torch.float16, torch.float32):
            if narrow.itemsize < dtype.itemsize and torch.equal(tensor.to(narrow).to(dtype), tensor):
                dtype = narrow
                break
        worst = max(worst, torch.finfo(dtype).eps)
    return worst


def _reconstructs(layer: Any, adapter: str, W: Tensor) -> bool:
    """Whether the untrained adapter gives W back: then U belongs to V wherever it matters."""
    lam, values = layer.frod_lambda_l[adapter].detach(), layer.frod_lambda_s_values[adapter].detach()
    if lam.is_meta or bool(values.any()):
        return False
    U, V = layer.frod_U[adapter], layer.frod_V[adapter]
    p = _probes(W.shape[0])
    compute = torch.float32
    left = (U.to(compute).T @ p.to(U.device, compute)).to(lam.device) * lam.to(compute)[:, None]
    got = V.to(compute) @ left.to(V.device)
    want = W.to(compute).T @ p.to(W.device, compute)
    off = float((got.cpu() - want.cpu()).norm() / want.norm().clamp_min(1e-30))
    return off <= FRESH or off <= HALF * _storage_eps(U, V)


def _aligned(U: Tensor, V: Tensor, W: Tensor, bases: Bases) -> bool:
    """Columns of U point where those of W V^-T do, judged by probes; doubtful columns count as no."""
    factored = bases.factored(V)
    if factored.lu is None:
        return False
    p = _probes(W.shape[0])
    want = factored.solve(W.to(torch.float64).cpu().T @ p)  # [n, probes] = (p^T B)^T
    got = U.to(torch.float64).cpu().T @ p
    # B = U diag(d): the best d, which must be positive where U is not zero
    length = got.square().sum(1)
    scale = (want * got).sum(1) / length.clamp_min(1e-300)
    off = (want - scale[:, None] * got).norm(dim=1) / want.norm(dim=1).clamp_min(1e-300)
    empty = (U == 0).all(0).cpu()
    tolerance = 8 * _storage_eps(U)
    return bool(((off <= tolerance) & (scale > 0) | empty).all())


def derive(W: Tensor, V: Tensor, bases: Bases) -> tuple[Tensor, Tensor]:
    """(U [m, n] float32, column norms of W V^-T in float64), bit for bit what PEFT computes for this V."""
    w = W.detach().to(torch.float64).cpu()
    factored = bases.factored(V)
    if factored.lu is None:  # singular: PEFT's fallback
        b = w @ torch.linalg.pinv(V.detach().to(torch.float64).cpu(), rtol=1e-6).T
    else:
        b = factored.solve(w.T).T
    norms = torch.linalg.norm(b, dim=0)
    u = torch.zeros_like(b)
    nonzero = norms > 1e-12
    u[:, nonzero] = b[:, nonzero] / norms[nonzero]
    return u.float(), norms


@dataclass(frozen=True)
class Verdict:
    """What to do with one adapter of one layer: its origin from now on, and a U to put in place (None: keep)."""

    origin: Origin
    U: Tensor | None = None
    off: float = 0.0


def judge(layer: Any, adapter: str, known: Origin | None, bases: Bases) -> Verdict | None:
    """Whether the U of ``adapter`` belongs to the V in place; changes nothing. None: W is out of reach, unknown."""
    U, V = layer.frod_U[adapter], layer.frod_V[adapter]
    if known is not None and known.at_rest(V):
        return Verdict(known)
    origin = origin_of(V)
    if known is not None and known.digest == origin.digest:
        return Verdict(origin)
    W = base_weight(layer)
    if W is None:
        return None
    certain = known is not None and known.V() is V  # V was overwritten where it stands: U cannot belong to it
    if not certain and (_reconstructs(layer, adapter, W) or _aligned(U, V, W, bases)):
        return Verdict(origin)
    derived, norms = derive(W, V, bases)
    stored = derived.to(device=U.device, dtype=U.dtype)
    if torch.equal(stored, U):
        return Verdict(origin)
    exact = derived.to(torch.float64)
    difference = U.to(torch.float64).cpu() - exact
    off = float(difference.norm() / exact.norm().clamp_min(1e-300))
    eps = _storage_eps(U, V, W)
    if eps > torch.finfo(torch.float32).eps and not certain:
        # 16-bit storage may have been rounded since U was made, and directions that W hardly reaches turn freely
        # under rounding; what counts there is whether W comes back.
        error = (difference * norms) @ V.to(torch.float64).cpu().T
        off = float(error.norm() / W.to(torch.float64).norm().clamp_min(1e-300))
        if off <= HALF * eps:
            return Verdict(origin)
    elif off <= SAME:
        return Verdict(origin)
    return Verdict(origin, stored, off)
