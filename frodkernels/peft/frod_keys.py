# SPDX-License-Identifier: Apache-2.0
"""Which keys an adapter file may hold, as told by the model and the adapter's config, never by the file itself."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from peft import PeftModel
from peft.tuners.frod import FrodModel
from peft.tuners.frod.model import _category_from_key
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PREFIX = "base_model.model."
V, INDICES, SIZE = "base_model.frod_V.", "base_model.frod_s_indices.", "base_model.frod_s_size."
LAMBDA, VALUES = ".frod_lambda_l", ".frod_lambda_s_values"

# heads that PEFT adds to modules_to_save of its own accord
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")


class Target(NamedTuple):
    """A layer that the config adapts."""

    category: str
    n: int


def check_numbers(config: Mapping[str, Any]) -> None:
    """The numbers of an adapter's config are numbers, finite and in range; ValueError names the key."""
    for key, low, high in (
        ("sparse_rate", 0, 1),
        ("frod_dropout", 0, 1),
        ("regularization_alpha", -math.inf, math.inf),
    ):
        value = config.get(key, 0)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not low <= value <= high:
            wanted = "a finite number" if math.isinf(high) else f"a number from {low} to {high}"
            raise ValueError(f"'{key}' of the adapter's config must be {wanted}, got {value!r}")
    key, seed = "projection_prng_key", config.get("projection_prng_key", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"'{key}' of the adapter's config must be a 64-bit integer, got {seed!r}")


def base_model(model: nn.Module) -> nn.Module:
    """The user's model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _in_features(module: nn.Module) -> int | None:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, nn.Linear):
        return base.in_features
    return int(base.weight.shape[0]) if isinstance(base, Conv1D) else None


def target_layers(root: nn.Module, config: Any) -> dict[str, Target]:
    """Path in the base model -> target, for the layers that PEFT adapts under this config."""
    config = copy.copy(config)
    if config.target_modules is None:
        model_type = getattr(getattr(root, "config", None), "model_type", None)
        if model_type not in FrodModel.target_module_mapping:
            raise ValueError("'target_modules' of the adapter's config is missing")
        config.target_modules = set(FrodModel.target_module_mapping[model_type])
    config = _maybe_include_all_linear_layers(config, root)
    found: dict[str, Target] = {}
    inside: list[str] = []  # paths of layers that are adapted already: what is in them is no target
    for path, module in root.named_modules():
        if not path or path.startswith(tuple(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(path + ".")
        if FrodModel._check_target_module_exists(config, path):
            n = _in_features(module)
            if n is not None:
                found[path] = Target(_category_from_key(path), n)
    return found


def with_aliases(root: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """``targets`` and the further paths under which the same modules are found."""
    known = {id(root.get_submodule(path)): target for path, target in targets.items()}
    named = root.named_modules(remove_duplicate=False)
    return {path: known[id(module)] for path, module in named if id(module) in known}


class Passengers:
    """Tensors of the base model that a FRoD file may bring along, named as PEFT names them when it saves.

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
