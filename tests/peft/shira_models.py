# SPDX-License-Identifier: Apache-2.0
"""Small models with SHiRA adapters, random weights, fixed seeds."""

from __future__ import annotations

import copy
import json
import warnings

import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from peft.tuners.shira.layer import ShiraLayer
from torch import Tensor, nn

from frodkernels.peft.shira_layer import FastShiraLinear, PeftShiraLinear
from tests.peft.models import Tiny


def config(**kwargs) -> ShiraConfig:
    return ShiraConfig(**{"target_modules": ["up", "down"], "r": 4, "random_seed": 3, **kwargs})


def shake(model: nn.Module, seed: int = 1) -> None:
    """Move every entry, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model):
            for values in layer.shira_weight.values():
                values.add_(0.3 * torch.randn(values.shape, generator=generator).to(values))


def shira(model: nn.Module | None = None, **kwargs) -> PeftModel:
    """A PeftModel with a shaken SHiRA adapter "default"."""
    model = Tiny() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config(**kwargs))
    shake(model)
    return model


def twins(model: nn.Module | None = None, **kwargs) -> tuple[PeftModel, PeftModel]:
    """(to be accelerated, plain): equal in every bit."""
    model = shira(model, **kwargs)
    return model, copy.deepcopy(model)


def two(model: nn.Module | None = None, **second) -> tuple[PeftModel, PeftModel]:
    """Twins with adapters "default" and "other", whose positions overlap in part."""
    ours = shira(model)
    ours.add_adapter("other", config(**{"r": 3, "random_seed": 4, **second}))
    shake(ours, 2)
    return ours, copy.deepcopy(ours)


def layers(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, ShiraLayer)]


def base_weights(model: nn.Module) -> list[Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for layer in layers(model)]


def set_scale(model: nn.Module, adapter: str, scale: float) -> None:
    for layer in layers(model):
        layer.set_scale(adapter, scale)


def fast(model):
    return {type(layer) for layer in layers(model)} == {FastShiraLinear}


def plain(model):
    return {type(layer) for layer in layers(model)} == {PeftShiraLinear}


def saved(path, model=None, **kwargs):
    """A plain model, saved. Its seed is not the config's default: what a loader draws is not what the file holds."""
    model = shira(model, **{"random_seed": 11, **kwargs})
    model.save_pretrained(path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "random_seed": 12}))
    return model.eval()
