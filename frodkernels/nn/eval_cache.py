# SPDX-License-Identifier: Apache-2.0
"""The dense weight of an adapted layer, kept between two changes of its parameters.

In evaluation ``W = U (S + diag lam) V^T`` (FRoD) or ``W + scale S`` (SHiRA) changes only when a parameter does, so a
layer that holds it serves a decode step at the price of one linear layer. A stale one is a silently wrong answer, so
validity is proved on every call:

* CPU: copies of the parameters are compared bit for bit with them (n + nnz numbers). Version counters alone would
  miss ``p.data.copy_()``, which is how averaged weights are written.
* CUDA: the parameters are the same tensors at the same address with the same version counter; comparing bits there
  would wait for the device. Writes through ``.data`` need an explicit ``drop()``.
* What is frozen (U and V, or W), everywhere: same tensors, addresses and version counters.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from frodkernels.pattern import SparsePattern

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_members = threading.Lock()  # a WeakSet may not grow in one thread while another walks it
_SPARE = 0.1  # of a CUDA device's memory that a cache without a limit leaves free


def version(tensor: Tensor) -> int:
    """The version counter; -1 for tensors made under inference_mode, which have none."""
    return -1 if tensor.is_inference() else tensor._version


class _Identity(NamedTuple):
    """Which tensor this was, and in which state, as far as the host can tell without reading it."""

    ref: weakref.ref[Tensor]
    version: int
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Identity:
        return cls(weakref.ref(tensor), version(tensor), tensor.data_ptr())

    def holds(self, tensor: Tensor) -> bool:
        return self.ref() is tensor and self.version == version(tensor) and self.address == tensor.data_ptr()


class _Bits(NamedTuple):
    """The content of a host tensor."""

    copy: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Bits:
        return cls(tensor.detach().clone())

    def holds(self, tensor: Tensor) -> bool:
        if tensor.dtype != self.copy.dtype or tensor.shape != self.copy.shape or tensor.device != self.copy.device:
            return False
        bits = _BITS[tensor.element_size()]  # NaN equals itself and -0 differs from 0 this way
        return torch.equal(tensor.detach().view(bits), self.copy.view(bits))


class _Key(NamedTuple):
    dtype: torch.dtype
    constants: tuple[SparsePattern | float, ...]
    tensors: tuple[_Identity | _Bits, ...]  # frozen ones first: their check is the cheap one

    def holds(self, dtype: torch.dtype, constants: tuple[SparsePattern | float, ...], tensors: list[Tensor]) -> bool:
        if dtype != self.dtype or constants != self.constants or len(tensors) != len(self.tensors):
            return False
        return all(mark.holds(tensor) for mark, tensor in zip(self.tensors, tensors, strict=True))


class CacheBudget:
    """How many bytes the caches of one model may hold together.

    Args:
        limit: bytes; 0 turns caching off; None sets no limit but what a CUDA device has free (a tenth is left alone).
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ValueError(f"limit must be a number of bytes >= 0, or None, got {limit!r}")
        self.limit = limit
        self._caches: weakref.WeakSet[EvalCache] = weakref.WeakSet()

    @property
    def used(self) -> int:
        with _members:
            caches = list(self._caches)
        return sum(cache.nbytes for cache in caches)

    def _admits(self, nbytes: int, device: torch.device) -> bool:
        if self.limit is not None:
            return self.used + nbytes <= self.limit
        if device.type != "cuda":
            return True
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return nbytes + _SPARE * total <= free

    def __repr__(self) -> str:
        limit = "no limit" if self.limit is None else "off" if self.limit == 0 else f"{self.limit} bytes"
        return f"CacheBudget({limit}, {self.used} bytes used)"


class EvalCache:
    """One layer's dense weight. Not copied, not pickled: it belongs to the tensors it was made from.

    Args:
        budget: shared by all layers of a model; None means no limit.
    """

    __slots__ = ("__weakref__", "_entry", "budget")

    def __init__(self, budget: CacheBudget | None = None) -> None:
        self.budget = CacheBudget() if budget is None else budget
        with _members:
            self.budget._caches.add(self)
        self._entry: tuple[_Key, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._entry is None else self._entry[1].nbytes

    def drop(self) -> None:
        """Forget the weight; the next use builds it from the parameters as they are then."""
        self._entry = None

    def get(
        self,
        parameters: Sequence[Tensor],
        frozen: Sequence[Tensor],
        constants: tuple[SparsePattern | float, ...],
        build: Callable[[], Tensor],
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """The weight in ``dtype`` for these tensors, or None when the budget has no room for it.

        It is built at the first call already: were it built at a later one, two calls with the same input would
        differ in the last bits. Ask :func:`may_cache` first.

        Args:
            parameters, frozen, constants: what the weight is made of: small tensors that training changes, large ones
                that it does not, patterns and numbers. The weight [m, n] has the rows of the first frozen tensor and
                the columns of the last.
            build: returns the weight; called without gradients, inference mode and autocast.
            dtype: of the weight; the first frozen tensor's when None.
        """
        if self.budget.limit == 0:
            return None
        first, last = frozen[0], frozen[-1]
        dtype = first.dtype if dtype is None else dtype
        tensors = [*frozen, *parameters]
        entry = self._entry
        if entry is not None and entry[0].holds(dtype, constants, tensors):
            return entry[1]
        self.drop()
        if not self.budget._admits(first.shape[0] * last.shape[-1] * dtype.itemsize, first.device):
            return None
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            marks = [_Identity.of(t) for t in frozen]
            marks_of_parameters = [(_Bits if t.device.type == "cpu" else _Identity).of(t) for t in parameters]
            key = _Key(dtype, constants, (*marks, *marks_of_parameters))
            weight = build().to(dtype)
        self._entry = key, weight  # at once: another thread sees both or neither
        return weight

    def __deepcopy__(self, memo: dict) -> EvalCache:
        return EvalCache(self.budget)

    def __reduce__(self) -> tuple:
        return EvalCache, ()


def _in_transform() -> bool:
    """Inside torch.func (vmap, grad, jvp, ...) or forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def may_cache(x: Tensor, *parameters: Tensor) -> bool:
    """Whether a call may be served from a cached weight at all.

    Not while a gradient is wanted, a graph is compiled, exported, traced or captured (it would hold a weight that
    the parameters have left behind), a function transform is active, or a tensor is not a plain one.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _in_transform():
        return False
    tensors = (x, *parameters)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if any(type(t) not in (Tensor, torch.nn.Parameter) or t.device != x.device for t in tensors):
        return False
    if x.device.type == "cuda":
        # without a version counter a change cannot be seen from the host
        return not (any(t.is_inference() for t in parameters) or torch.cuda.is_current_stream_capturing())
    return x.device.type == "cpu"
