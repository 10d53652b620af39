# SPDX-License-Identifier: Apache-2.0
"""Checks of a FRoD adapter file against the model it is about to be loaded into, before anything is injected.

PEFT copies whatever the file holds into the model: an index of -1 or 70 in a 64 x 64 S then gives wrong results, one
of a million ends the process, and a wrong shape raises half way through and leaves a broken adapter behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frodkernels.ops.sparse_core import FLOATS
from frodkernels.peft.file_keys import PREFIX, Passengers, base_model, check_floats, check_keys, with_aliases
from frodkernels.peft.frod_keys import INDICES, LAMBDA, SIZE, VALUES, Target, V, check_numbers, target_layers
from frodkernels.peft.frod_plan import check_size
from frodkernels.peft.plan import check_indices


class _Category(NamedTuple):
    """What the model expects of a category: n, and the number of nonzeros."""

    n: int
    nnz: int


def default_nnz(n: int, sparse_rate: float) -> int:
    """How many entries PEFT samples for an n x n S."""
    off_diagonal = n * n - n
    nnz = min(int(n * n * sparse_rate), off_diagonal)
    return max(1, nnz) if sparse_rate > 0 and off_diagonal > 0 else nnz


def _expectations(model: nn.Module, config: Any, targets: Mapping[str, Target]) -> dict[str, _Category]:
    expected = {category: _Category(n, default_nnz(n, config.sparse_rate)) for category, n in targets.values()}
    stores = getattr(getattr(model, "base_model", None), "frod_s_indices", None)
    if stores is not None:  # a further adapter takes the pattern size of those that are there
        for category in set(expected) & set(stores.keys()):
            there = next(iter(stores[category].values()), None)
            if there is not None and there.dim() == 2:
                expected[category] = expected[category]._replace(nnz=there.shape[1])
    return expected


def check_adapter_file(
    state: Mapping[str, Tensor],
    model: nn.Module,
    config: Any,
    *,
    adapter: str | None = None,
    ignore_mismatched: bool = False,
) -> None:
    """Check the tensors of a FRoD adapter file (keys as saved, without adapter names). Changes nothing.

    Every key must be one that PEFT writes for this config and that this model has room for, every tensor must fit,
    and no layer's tensors may be missing. What the layers are is told by model and config, not by the file.

    Args:
        state: the file's tensors.
        model: the base model, or the PeftModel that the adapter is to join.
        config: the adapter's FrodConfig.
        adapter: its name when ``state`` is on its way into the adapter, with the keys of modules_to_save renamed. It
            may then be a part, and PEFT itself compares the shapes of what is not FRoD's.
        ignore_mismatched: let tensors that are not FRoD's have another shape: PEFT was told to leave them out.

    Raises:
        ValueError: names the key, and the entry where there is one.
    """
    check_numbers(vars(config))
    root = base_model(model)
    targets = target_layers(root, config)
    expected = _expectations(model, config, targets)
    layers = with_aliases(root, targets)
    ours = {path + suffix for path in layers for suffix in (LAMBDA, VALUES)}
    ours |= {prefix + category for category in expected for prefix in (V, INDICES, SIZE)}
    check_keys(state, Passengers(root, config, adapter), ours, "FRoD", adapter is None and not ignore_mismatched)
    if config.save_projection:
        for category in expected:
            for prefix in (V, INDICES, SIZE):
                if prefix + category not in state:
                    raise ValueError(
                        f"'{prefix}{category}' is missing: the adapter's config says that its projections were saved "
                        "(save_projection=True). Made anew they need not be those it was trained with."
                    )
    for name in _categories(state):
        _check_projection(state, name, expected[name].n)
        if INDICES + name in state:
            _check_pattern(state[INDICES + name], name, expected[name])
    for path, (category, n) in layers.items():
        for suffix, length in ((LAMBDA, n), (VALUES, expected[category].nnz)):
            keys = [key for key in (PREFIX + path + suffix, path + suffix) if key in state]
            if not keys and adapter is None and path in targets:
                raise ValueError(f"'{PREFIX}{path}{suffix}' is missing: the adapter's config targets that layer")
            for key in keys:
                check_floats(state[key], (length,), f"'{key}'")


def _categories(state: Mapping[str, Tensor]) -> list[str]:
    prefixes = (V, INDICES, SIZE)
    return sorted({key.removeprefix(p) for key in state for p in prefixes if key.startswith(p)})


def _check_projection(state: Mapping[str, Tensor], name: str, n: int) -> None:
    """Check V and the size of a category."""
    v = state.get(V + name)
    if v is not None:
        key = f"'{V}{name}'"
        if v.dtype not in FLOATS:
            raise ValueError(f"{key} must be float32, float64, bfloat16 or float16, got {v.dtype}")
        if v.dim() != 2 or v.shape[0] != v.shape[1]:
            raise ValueError(f"{key} must be square, got {list(v.shape)}")
        if v.shape[0] != n:
            raise ValueError(f"{key} is {v.shape[0]} x {v.shape[0]}, but the model's layers have {n} inputs")
        if not bool(torch.isfinite(v).all()):
            raise ValueError(f"{key} holds entries that are not finite")
    if SIZE + name in state:
        check_size(state[SIZE + name], n, f"'{SIZE}{name}'")


def _check_pattern(indices: Tensor, name: str, expected: _Category) -> None:
    """Check the indices of a category."""
    key = f"'{INDICES}{name}'"
    nnz = check_indices(indices, (expected.n, expected.n), key).nnz
    if nnz != expected.nnz:
        raise ValueError(
            f"{key} has {nnz} entries, but the adapter's sparse_rate, or an adapter that is loaded already, makes it "
            f"{expected.nnz}: PEFT cannot load it"
        )
