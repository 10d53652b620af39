# SPDX-License-Identifier: Apache-2.0
"""What ``enable()`` puts into PEFT: our tuners in its table, and three methods of PeftModel."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, load_peft_weights
from torch import Tensor, nn

from frodkernels.peft.methods import Method, inside_load, method_of, methods
from frodkernels.peft.snapshot import undone_on_failure
from frodkernels.peft.swap import swap

logger = logging.getLogger("frodkernels")

Undo = list[tuple[Any, str, Any, Any]]

# Inside from_pretrained, which has checked the file and undoes everything itself.
_inside_from_pretrained: contextvars.ContextVar[bool] = contextvars.ContextVar("inside_from_pretrained", default=False)


def install() -> Undo:
    """Put our tuners and methods in force; returns what ``uninstall`` needs."""
    undo: Undo = []
    table = PEFT_TYPE_TO_TUNER_MAPPING
    for method in methods():
        undo.append((table, method.peft_type, table[method.peft_type], method.fast))
        table[method.peft_type] = method.fast
    for name, wrap in (
        ("from_pretrained", _from_pretrained),
        ("load_adapter", _load_adapter),
        ("add_adapter", _add_adapter),
    ):
        original = PeftModel.__dict__[name]
        ours = wrap(original)
        undo.append((PeftModel, name, original, ours))
        setattr(PeftModel, name, ours)
    return undo


def uninstall(undo: Undo) -> None:
    """Put the originals back, save where somebody else has put something over ours since."""
    for owner, name, original, ours in undo:
        if isinstance(owner, dict):
            if owner.get(name) is ours:
                owner[name] = original
        elif owner.__dict__.get(name) is ours:
            setattr(owner, name, original)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[bool]) -> Iterator[None]:
    token = variable.set(True)
    try:
        yield
    finally:
        variable.reset(token)


def _peft_type(model_id: Any, config: Any, hub: dict[str, Any]) -> Any:
    """The file's PEFT type; None when it cannot be read, so that PEFT says why in its own words."""
    if isinstance(config, PeftConfig):
        return config.peft_type
    try:
        return PeftConfig._get_peft_type(model_id, **hub)
    except Exception:
        return None


def _read_config(method: Method, model_id: Any, hub: dict[str, Any]) -> Any:
    try:
        return method.config.from_pretrained(model_id, **hub)
    except TypeError as error:  # PEFT compares numbers without asking whether they are
        file = Path(str(model_id), hub.get("subfolder") or "", CONFIG_NAME)
        if file.is_file():
            method.check_numbers(json.loads(file.read_text()))
        raise ValueError(f"the adapter's {CONFIG_NAME} holds a value of a wrong type: {error}") from error


def _read(
    method: Method, model_id: Any, config: Any, key_mapping: Any, hub: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    config = config or _read_config(method, model_id, hub)
    # load_peft_weights writes to the keywords it is given
    return config, load_peft_weights(model_id, device="cpu", key_mapping=key_mapping, **dict(hub))


def _ignores_mismatched(given: dict[str, Any]) -> bool:
    return bool(given.get("kwargs", {}).get("ignore_mismatched_sizes", False))


def _overwritten(model: nn.Module, state: Iterable[str], adapter: str) -> list[Tensor]:
    """The tensors that are in ``model`` now and that a load of ``state`` as ``adapter`` may write to in place."""

    def bare(name: str) -> str:
        return name.removeprefix("base_model.model.").replace(".base_layer", "")

    keys = {bare(key) for key in state}
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    names = ((bare(name), tensor) for name, tensor in tensors)
    return [
        tensor
        for name, tensor in names
        if name in keys or name.replace(f".modules_to_save.{adapter}", "").removesuffix(f".{adapter}") in keys
    ]


def _from_pretrained(original: classmethod) -> classmethod:
    signature = inspect.signature(original.__func__)

    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        call = original.__get__(None, cls)
        bound = signature.bind(cls, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        model, model_id, adapter = given["model"], given["model_id"], given["adapter_name"]
        hub, _ = PeftModel._split_kwargs(given.get("kwargs", {}))
        method = method_of(_peft_type(model_id, given["config"], hub))
        if method is None:
            return call(*args, **kwargs)
        key_mapping = given["key_mapping"]
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", {})
        config, state = _read(method, model_id, given["config"], key_mapping, hub)
        method.check_file(state, model, config, ignore_mismatched=_ignores_mismatched(given))
        with (
            _set(_inside_from_pretrained),
            _set(inside_load),
            undone_on_failure(model, _overwritten(model, state, adapter)),
        ):
            result = call(*args, **kwargs)
        method.after_load(config, adapter)
        return result

    return classmethod(from_pretrained)


def _load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = method_of(self.peft_type)
        if method is None:
            return original(self, *args, **kwargs)
        if _inside_from_pretrained.get():
            result = original(self, *args, **kwargs)
            _report(swap(self))
            return result
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        model_id, adapter = given["model_id"], given["adapter_name"]
        hub, _ = PeftModel._split_kwargs(given.get("kwargs", {}))
        config = self.peft_config.get(adapter)
        if method_of(_peft_type(model_id, config, hub)) is not method:
            return original(self, *args, **kwargs)
        config, state = _read(method, model_id, config, given["key_mapping"], hub)
        method.check_file(state, self, config, ignore_mismatched=_ignores_mismatched(given))
        with undone_on_failure(self, _overwritten(self, state, adapter)):
            if method.swap_first:
                swap(self)
            with _set(inside_load):
                result = original(self, *args, **kwargs)
            _report(swap(self))
        method.after_load(config, adapter)
        return result

    return load_adapter


def _add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_adapter(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        method = method_of(self.peft_type)
        if method is None or adapter_name in self.peft_config:
            return original(self, adapter_name, *args, **kwargs)
        with undone_on_failure(self):
            if method.swap_first:
                swap(self)
            result = original(self, adapter_name, *args, **kwargs)
            swap(self, injected=adapter_name)
        return result

    return add_adapter


def _report(report: Any) -> None:
    logger.info("loaded: %s", report.summary())
