# SPDX-License-Identifier: Apache-2.0
"""Checks of a FRoD adapter file against the model it is about to be loaded into, before anything is injected.

PEFT copies whatever the file holds into the model: an index of -1 or 70 in a 64 x 64 S then gives wrong results, one
of a million ends the process, and a wrong shape raises half way through and leaves a broken adapter behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.frod.layer import FrodLayer
from peft.tuners.frod.model import _category_from_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from frodkernels.peft.frod_plan import FLOATS, check_floats, check_indices, check_size

V, INDICES, SIZE = "base_model.frod_V.", "base_model.frod_s_indices.", "base_model.frod_s_size."
LAMBDA, VALUES = ".frod_lambda_l", ".frod_lambda_s_values"


class _Category(NamedTuple):
    """What the model expects of a category: n, and the number of nonzeros (None: whatever the file says)."""

    n: int
    nnz: int | None


def default_nnz(n: int, sparse_rate: float) -> int:
    """How many entries PEFT samples for an n x n S."""
    off_diagonal = n * n - n
    nnz = min(int(n * n * sparse_rate), off_diagonal)
    return max(1, nnz) if sparse_rate > 0 and off_diagonal > 0 else nnz


def _base_model(model: nn.Module) -> nn.Module:
    """The user's model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _in_features(module: nn.Module) -> int | None:
    if isinstance(module, FrodLayer):
        return module.in_features
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    return None


def _layers(state: Mapping[str, Tensor], root: nn.Module) -> dict[str, tuple[str, int]]:
    """Layer path, as the file spells it -> (category, n), for the file's layers that the model has."""
    found = {}
    for key in state:
        for suffix in (LAMBDA, VALUES):
            if key.endswith(suffix):
                path = key.removesuffix(suffix)
                inner = path.removeprefix("base_model.model.")
                try:
                    n = _in_features(root.get_submodule(inner))
                except AttributeError:
                    continue  # not in this model: PEFT ignores it
                if n is not None:
                    found[path] = (_category_from_key(inner), n)
    return found


def _expectations(model: nn.Module, config: Any, layers: dict[str, tuple[str, int]]) -> dict[str, _Category]:
    expected = {category: _Category(n, default_nnz(n, config.sparse_rate)) for category, n in layers.values()}
    stores = getattr(getattr(model, "base_model", None), "frod_s_indices", None)
    if stores is not None:  # a further adapter takes the pattern size of those that are there
        for category in set(expected) & set(stores.keys()):
            there = next(iter(stores[category].values()), None)
            if there is not None and there.dim() == 2:
                expected[category] = expected[category]._replace(nnz=there.shape[1])
    return expected


def check_adapter_file(state: Mapping[str, Tensor], model: nn.Module, config: Any) -> None:
    """Check the tensors of a FRoD adapter file (keys as saved, without adapter names). Changes nothing.

    Args:
        state: the file's tensors.
        model: the base model, or the PeftModel that the adapter is to join.
        config: the adapter's FrodConfig.

    Raises:
        ValueError: names the key, and the entry where there is one.
    """
    layers = _layers(state, _base_model(model))
    if config.save_projection:
        for category in sorted({category for category, _ in layers.values()}):
            for prefix in (V, INDICES, SIZE):
                if prefix + category not in state:
                    raise ValueError(
                        f"'{prefix}{category}' is missing: the adapter's config says that its projections were saved "
                        "(save_projection=True). Made anew they need not be those it was trained with."
                    )
    expected = _expectations(model, config, layers)
    lengths = {name: category.nnz for name, category in expected.items()}
    for name in _categories(state):
        n = _check_projection(state, name, expected.get(name))
        if n is not None and INDICES + name in state:
            lengths[name] = _check_pattern(state[INDICES + name], n, name, expected.get(name))
    for path, (category, n) in layers.items():
        for key, length in ((path + LAMBDA, n), (path + VALUES, lengths.get(category))):
            if key in state and length is not None:
                check_floats(state[key], (length,), f"'{key}'")


def _categories(state: Mapping[str, Tensor]) -> list[str]:
    prefixes = (V, INDICES, SIZE)
    return sorted({key.removeprefix(p) for key in state for p in prefixes if key.startswith(p)})


def _check_projection(state: Mapping[str, Tensor], name: str, expected: _Category | None) -> int | None:
    """Check V and the size of a category; returns n, or None when nothing tells it."""
    n = None if expected is None else expected.n
    v = state.get(V + name)
    if v is not None:
        key = f"'{V}{name}'"
        if v.dtype not in FLOATS:
            raise ValueError(f"{key} must be float32, float64, bfloat16 or float16, got {v.dtype}")
        if v.dim() != 2 or v.shape[0] != v.shape[1]:
            raise ValueError(f"{key} must be square, got {list(v.shape)}")
        if n is not None and v.shape[0] != n:
            raise ValueError(f"{key} is {v.shape[0]} x {v.shape[0]}, but the model's layers have {n} inputs")
        if not bool(torch.isfinite(v).all()):
            raise ValueError(f"{key} holds entries that are not finite")
        n = int(v.shape[0])
    if n is not None and SIZE + name in state:
        check_size(state[SIZE + name], n, f"'{SIZE}{name}'")
    return n


def _check_pattern(indices: Tensor, n: int, name: str, expected: _Category | None) -> int:
    """Check the indices of a category; returns their number."""
    key = f"'{INDICES}{name}'"
    nnz = check_indices(indices, n, key).nnz
    if expected is not None and expected.nnz is not None and nnz != expected.nnz:
        raise ValueError(
            f"{key} has {nnz} entries, but the adapter's sparse_rate, or an adapter that is loaded already, makes it "
            f"{expected.nnz}: PEFT cannot load it"
        )
    return nnz
