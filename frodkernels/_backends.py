# SPDX-License-Identifier: Apache-2.0
"""Which implementation serves which op on which device, and why.

Three backends implement every op: ``native`` (C++ on the CPU; on CUDA, CUDA C++, or a dense product where that is
faster, see ``dense.py``), ``triton`` and ``reference`` (plain PyTorch, the definition). The first that is available, in
that order, serves; :func:`backend` overrides the choice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

from frodkernels import _native, _ops

BACKENDS = ("native", "triton", "reference")
FAMILIES = {  # op -> module that implements it
    "sparse_core": "sparse_core",
    "sparse_core_backward": "sparse_core",
    "householder": "householder",
    "householder_backward": "householder",
    "householder_gradient": "householder",
    "sampled_product": "sampled",
    "scatter_values_": "sampled",
}
DEVICES = ("cpu", "cuda")
_INTERPRETER = "TRITON_INTERPRET"

# A plain global and not a context variable: autograd runs backward passes in threads of its own, which would not
# inherit one, and a forced backend must hold there too.
_current = "auto"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get(_INTERPRETER) == "1"


def unavailable(op: str, device: str, name: str) -> str | None:
    """Why backend ``name`` cannot serve ``op`` on ``device``; None when it can."""
    if name == "reference":
        return None
    if name == "native":
        if not _native.load():
            return _native.why_not() or "the native library is not loaded"
        if not _ops.native_serves(op, device):
            return f"the native library has no {device} kernel of {op}"
        return _native.cuda_why_not() if device == "cuda" else None
    if device not in DEVICES:
        return f"the triton kernels do not run on {device}"
    if not _has_triton():
        return "triton is not installed (pip install triton)"
    if device == "cpu" and not _interpreting():
        return f"triton runs on the CPU only in its interpreter ({_INTERPRETER}=1, for tests)"
    return None


def _default(op: str, device: str) -> str:
    for name in BACKENDS:
        if name == "triton" and device == "cpu":
            continue  # the interpreter is for tests: never chosen, only asked for
        if unavailable(op, device, name) is None:
            return name
    raise AssertionError("the reference is always available")


_default_cached = functools.cache(_default)


def select(op: str, device: str) -> str:
    """The backend that serves ``op`` on ``device`` now.

    Raises:
        RuntimeError: a backend was asked for by :func:`backend` and cannot serve this op here; says why.
    """
    if _current == "auto":
        return _default_cached(op, device)
    reason = unavailable(op, device, _current)
    if reason is not None:
        raise RuntimeError(f"backend '{_current}' was asked for but cannot serve {op} on {device}: {reason}")
    return _current


@functools.cache
def _load(op: str, name: str) -> Callable[..., Any]:
    if name == "native":
        return _ops.native(op)
    package = "frodkernels.triton_kernels" if name == "triton" else "frodkernels.reference"
    return getattr(importlib.import_module(f"{package}.{FAMILIES[op]}"), op)


def implementation(op: str, device: str) -> tuple[str, Callable[..., Any]]:
    """The backend that serves ``op`` on ``device`` now, and its callable."""
    name = select(op, device)
    return name, _load(op, name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every op with backend ``name`` inside the block: "auto", "reference", "native" or "triton".

    Applies to the whole process (autograd's threads included) until the block ends.

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: from an op inside the block that this backend cannot serve; says why.
    """
    global _current
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"name must be 'auto', 'reference', 'native' or 'triton', got {name!r}")
    previous, _current = _current, name
    try:
        yield
    finally:
        _current = previous


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """What is available: ``{op: {device: {backend: "available" or the reason why not, "chosen": backend}}}``."""
    table: dict[str, dict[str, dict[str, str]]] = {}
    for op in FAMILIES:
        table[op] = {}
        for device in DEVICES:
            row = {name: unavailable(op, device, name) or "available" for name in BACKENDS}
            row["chosen"] = _default(op, device) if _current == "auto" else _current
            table[op][device] = row
    return table
