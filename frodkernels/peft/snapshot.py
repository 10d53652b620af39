# SPDX-License-Identifier: Apache-2.0
"""Undo: put a model back as it was, whatever a failed load did to its modules."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, list, set)


class Snapshot:
    """The structure of a model, by reference: classes, attributes and containers of every module, which parameters
    there are and whether they train. Tensors are not copied, save those named in ``contents`` and what is needed to
    merge again: PEFT unmerges a model that an adapter joins, which SHiRA does in place.
    """

    def __init__(self, model: nn.Module, contents: Iterable[Tensor] = ()) -> None:
        self._modules: list[tuple[nn.Module, type, dict[str, tuple[Any, Any]]]] = []
        for module in model.modules():
            attributes = {
                name: (value, copy.copy(value) if type(value) in _CONTAINERS else None)
                for name, value in module.__dict__.items()
            }
            self._modules.append((module, type(module), attributes))
        # p.data aliases the storage: no copy
        self._parameters = [(p, p.requires_grad, p.data, p.grad) for p in model.parameters()]
        self._merged: list[Callable[[], None]] = []
        contents = list(contents)
        layers: list[Any] = [module for module in model.modules() if hasattr(module, "shira_weight")]
        for layer in layers:
            if layer.merged_adapters and hasattr(layer, "_merged_again"):
                self._merged.append(layer._merged_again())
            elif layer.merged_adapters:  # PEFT's own class: a copy of the weight is the way to have its bits again
                contents.append(layer.get_base_layer().weight)
        self._contents = [(tensor, tensor.detach().clone()) for tensor in contents]

    def restore(self) -> None:
        for module, cls, attributes in self._modules:
            module.__class__ = cls
            module.__dict__.clear()
            for name, (value, inner) in attributes.items():
                if isinstance(value, list):
                    value[:] = inner
                elif inner is not None:
                    value.clear()
                    value.update(inner)
                module.__dict__[name] = value
        for parameter, requires_grad, data, grad in self._parameters:
            if parameter.data_ptr() != data.data_ptr() or parameter.device != data.device:
                parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for tensor, content in self._contents:
                tensor.copy_(content)
            for merge in self._merged:
                merge()
        for module, _, _ in self._modules:  # layers of ours forget what they planned for an adapter that is gone
            getattr(module, "_forget_strangers", lambda: None)()


@contextmanager
def undone_on_failure(model: nn.Module, contents: Iterable[Tensor] = ()) -> Iterator[None]:
    """Run the block; if it raises, put ``model`` back as it was and raise on."""
    snapshot = Snapshot(model, contents)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise
