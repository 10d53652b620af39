# SPDX-License-Identifier: Apache-2.0
"""What FRoD's files and configs are made of: names of tensors, categories of layers, ranges of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from peft.tuners.frod import FrodModel
from peft.tuners.frod.model import _category_from_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from frodkernels.peft.file_keys import adapted_layers

V, INDICES, SIZE = "base_model.frod_V.", "base_model.frod_s_indices.", "base_model.frod_s_size."
LAMBDA, VALUES = ".frod_lambda_l", ".frod_lambda_s_values"


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


def target_layers(root: nn.Module, config: Any) -> dict[str, Target]:
    """Path in the base model -> target, for the layers that PEFT adapts under this config."""

    def describe(path: str, layer: nn.Module) -> Target | None:
        if isinstance(layer, nn.Linear):
            return Target(_category_from_key(path), layer.in_features)
        return Target(_category_from_key(path), int(layer.weight.shape[0])) if isinstance(layer, Conv1D) else None

    return adapted_layers(root, config, FrodModel, describe)
