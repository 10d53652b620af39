# SPDX-License-Identifier: Apache-2.0
"""Which keys an adapter file may hold, as told by the model and the adapter's config, never by the file itself."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from frodkernels.ops.sparse_core import FLOATS

logger = logging.getLogger("frodkernels")

PREFIX = "base_model.model."

# heads that PEFT adds to modules_to_save of its own accord
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")

Target = TypeVar("Target")


def base_model(model: nn.Module) -> nn.Module:
    """The user's model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapted_layers(
    root: nn.Module,
    config: Any,
    tuner: type[BaseTuner],
    describe: Callable[[str, nn.Module], Target | None],
) -> dict[str, Target]:
    """Path in the base model -> what ``describe`` says of it, for the layers that ``tuner`` adapts under ``config``.

    ``describe`` gets the path and the layer without its adapters; None leaves the layer out.
    """
    config = copy.copy(config)
    if config.target_modules is None:
        model_type = getattr(getattr(root, "config", None), "model_type", None)
        if model_type not in tuner.target_module_mapping:
            raise ValueError("'target_modules' of the adapter's config is missing")
        config.target_modules = set(tuner.target_module_mapping[model_type])
    config = _maybe_include_all_linear_layers(config, root)
    found: dict[str, Target] = {}
    inside: list[str] = []  # paths of layers that are adapted already: what is in them is no target
    for path, module in root.named_modules():
        if not path or path.startswith(tuple(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(path + ".")
        if tuner._check_target_module_exists(config, path):
            target = describe(path, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
            if target is not None:
                found[path] = target
    return found


def with_aliases(root: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """``targets`` and the further paths under which the same modules are found."""
    known = {id(root.get_submodule(path)): target for path, target in targets.items()}
    named = root.named_modules(remove_duplicate=False)
    return {path: known[id(module)] for path, module in named if id(module) in known}


class Passengers:
    """Tensors of the base model that an adapter's file may bring along, named as PEFT names them when it saves.

    That is: the private copies of ``modules_to_save``, the biases that ``bias`` trains, and the embeddings that
    ``save_embedding_layers`` adds.

    Args:
        root: the base model.
        config: the adapter's config.
        adapter: its name, where PEFT has renamed the keys of ``modules_to_save`` already.
    """

    def __init__(self, root: nn.Module, config: Any, adapter: str | None = None) -> None:
        state = ((name, value) for name, value in root.state_dict().items() if isinstance(value, Tensor))
        self.plain = {_WRAPPERS.sub("", name): value for name, value in state}  # as before any adapter
        self._bias = getattr(config, "bias", "none")
        self._embeddings = _embeddings(root)
        self._saved: dict[str, Tensor] = {}
        task = str(getattr(config.task_type, "value", config.task_type))
        saved = (*(config.modules_to_save or ()), *_HEADS.get(task, ()))
        for path, module in root.named_modules(remove_duplicate=False):
            if saved and path.endswith(saved):
                inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
                for key, value in inner.state_dict().items():
                    for middle in ("", f"modules_to_save.{adapter}.")[: 1 if adapter is None else 2]:
                        self._saved[f"{path}.{middle}{key}"] = value

    def find(self, key: str) -> Tensor | None:
        """The model's tensor that ``key`` (without the common prefix) may replace; None when it may not."""
        if key in self._saved:
            return self._saved[key]
        there = self.plain.get(_unwrapped(key))
        if there is None:
            return None
        if self._bias == "all" and (key == "bias" or key.endswith(".bias")):
            return there
        if self._bias.endswith("_only") and key.endswith(".base_layer.bias"):
            return there
        return there if self.is_embedding(key) else None

    def is_embedding(self, key: str) -> bool:
        return key not in self._saved and _unwrapped(key).rpartition(".")[0] in self._embeddings


def check_keys(
    state: Mapping[str, Tensor],
    passengers: Passengers,
    ours: Collection[str],
    method: str,
    compare_shapes: bool,
) -> None:
    """Nothing in the file but what PEFT writes: whatever else names a tensor of the model would overwrite it.

    Args:
        state: the file's tensors.
        passengers: what of the base model may be among them.
        ours: the keys of the adapter itself, without the common prefix; they are not looked at here.
        method: "FRoD", "HRA" or "SHiRA", for messages.
        compare_shapes: whether a tensor that replaces one of the base model must have its shape.

    Raises:
        ValueError: names the key.
    """
    embeddings = []
    for key, tensor in state.items():
        inner = key.removeprefix(PREFIX)
        if inner in ours:
            continue
        there = passengers.find(inner)
        if there is None:
            raise ValueError(f"'{key}' does not belong in this adapter's file: {_why_not(inner, passengers, method)}")
        # a partitioned weight is empty here, a quantised one packed
        if compare_shapes and there.is_floating_point() and there.numel() and there.shape != tensor.shape:
            raise ValueError(f"'{key}' must have shape {list(there.shape)}, got {list(tensor.shape)}")
        if passengers.is_embedding(inner):
            embeddings.append(key)
    if embeddings and compare_shapes:
        logger.warning("the adapter's file replaces embeddings of the base model: %s", ", ".join(embeddings))


def _why_not(key: str, passengers: Passengers, method: str) -> str:
    if f"{method.lower()}_" in key:
        return f"the model has no such {method} tensor among the layers that the adapter's config targets"
    if key in passengers.plain or key.replace(".base_layer.", ".") in passengers.plain:
        return "it would overwrite the base model, and the adapter's config neither trains nor saves it"
    return "the model has no such tensor, or the adapter's config neither trains nor saves it"


def check_floats(tensor: Tensor, shape: tuple[int, ...], where: str) -> None:
    """A floating-point tensor of exactly ``shape``."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{where} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{where} must have shape {list(shape)}, got {list(tensor.shape)}")


def _unwrapped(key: str) -> str:
    """A file's key, as the tensor was called before any adapter. PEFT drops the adapter's name of a private copy."""
    for wrapper in (".base_layer.", ".original_module.", ".modules_to_save."):
        key = key.replace(wrapper, ".")
    return key


def _embeddings(root: nn.Module) -> set[str]:
    """The paths, before any adapter, of a transformers model's input and output embeddings."""
    layers = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layers.append(getattr(root, getter)())
        except (AttributeError, NotImplementedError):
            continue
    modules = {id(layer) for layer in layers if layer is not None}
    named = root.named_modules(remove_duplicate=False)
    return {_WRAPPERS.sub("", path) for path, module in named if id(module) in modules}
