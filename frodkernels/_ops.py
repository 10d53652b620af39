# SPDX-License-Identifier: Apache-2.0
"""The operator namespace, spelled once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "frodkernels"


def qualified(op: str) -> str:
    """``op`` with the namespace in front, as ``torch.library`` wants it."""
    return f"{NAMESPACE}::{op}"


def register(op: str, schema: str, *, kernel: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define ``frodkernels::<op>``: its schema, its kernel for tensors of any device, and its shape function.

    ``define`` + ``register_kernel`` costs about 4 us a call, ``custom_op`` about 6.
    """
    torch.library.define(qualified(op), schema)
    torch.library.register_kernel(qualified(op), None, kernel)
    torch.library.register_fake(qualified(op), fake)


def native(op: str) -> Callable[..., Tensor]:
    """The compiled operator ``native_<op>``; AttributeError when the native library is not loaded."""
    return getattr(getattr(torch.ops, NAMESPACE), f"native_{op}").default


def native_serves(op: str, device: str) -> bool:
    """Whether the loaded native library has a kernel of ``op`` for ``device`` ("cpu" or "cuda")."""
    name, key = qualified(f"native_{op}"), device.upper()
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    except RuntimeError:  # no such operator: the library is not loaded
        return False


_PLAIN = (Tensor, torch.nn.Parameter)
_modes_before_dispatch: Callable[[], int] = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", lambda: 0)


def unwatched(*tensors: Tensor) -> bool:
    """Whether nothing but the kernels would see a call: then an op may be left out that only compilers need."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or _modes_before_dispatch() > 0:
        return False
    return all(type(tensor) in _PLAIN for tensor in tensors)
