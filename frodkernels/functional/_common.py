# SPDX-License-Identifier: Apache-2.0
"""What every function does to its arguments before any arithmetic."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from frodkernels.ops.sparse_core import FLOATS
from frodkernels.pattern import SparsePattern

Method = TypeVar("Method", bound=Callable[..., Any])


def check_tensor(tensor: object, name: str, device: torch.device | None = None) -> None:
    """A dense floating-point tensor on ``device``; ValueError names the argument."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got {'nested' if tensor.is_nested else tensor.layout}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_pattern(pattern: object, shape: tuple[int, int] | None = None) -> None:
    """A SparsePattern, of ``shape`` when one is given."""
    if not isinstance(pattern, SparsePattern):
        raise ValueError(f"pattern must be a frodkernels.SparsePattern, got {type(pattern).__name__}")
    if shape is not None and pattern.shape != shape:
        raise ValueError(f"pattern must be {shape[0]} x {shape[1]}, got {pattern.shape[0]} x {pattern.shape[1]}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast runs GEMMs in on x's device, or None outside autocast (and for float64, as in torch)."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without the call where there is nothing to do: after a large product even that costs 20 us."""
    return x if x.dtype == dtype else x.to(dtype)


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block without autocast on x's device; "meta" has none."""
    device = x.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def without_autocast(method: Method) -> Method:
    """Run a Function's ``forward(ctx, tensor, ...)`` or ``backward(ctx, grad)`` in the dtypes it was given.

    The public functions cast before the Function. Autocast inside it would cast again, some operands only: a backward
    called in an autocast region for a forward that was outside of it would mix dtypes.
    """

    @functools.wraps(method)
    def run(ctx: Any, first: Tensor, *rest: Any) -> Any:
        device = first.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return method(ctx, first, *rest)
        with torch.autocast(device, enabled=False):
            return method(ctx, first, *rest)

    return cast(Method, run)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to be differentiated twice, as soon as it is asked for.

    ``once_differentiable`` detaches its outputs, so that ``autograd.grad`` of a gradient with respect to an input finds
    no route and returns None: a gradient penalty would train wrongly without a word. Autograd runs a backward pass in
    grad mode exactly when a graph of it is wanted (``create_graph=True``).
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "frodkernels functions are differentiable once: create_graph=True needs a second derivative "
                "(frodkernels.reference has plain PyTorch definitions that have one)"
            )
        return backward(ctx, *grads)

    return run
