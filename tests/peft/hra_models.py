# SPDX-License-Identifier: Apache-2.0
"""Small models with HRA adapters, random weights, fixed seeds."""

from __future__ import annotations

import copy
import warnings

import torch
from peft import HRAConfig, PeftModel, get_peft_model
from peft.tuners.hra.layer import HRALayer
from torch import Tensor, nn

from tests.peft.models import Tiny


class Images(nn.Module):
    """Two convolutions that PEFT's forward gets right: square, isotropic, without dilation."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def config(**kwargs) -> HRAConfig:
    return HRAConfig(**{"target_modules": ["up", "down"], "r": 4, **kwargs})


def shake(model: nn.Module, seed: int = 1) -> None:
    """Move every direction, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model):
            for u in layer.hra_u.values():
                u.add_(0.3 * torch.randn(u.shape, generator=generator).to(u))


def hra(model: nn.Module | None = None, **kwargs) -> PeftModel:
    """A PeftModel with a shaken HRA adapter "default"."""
    model = Tiny() if model is None else model
    if isinstance(model, Images):
        kwargs.setdefault("target_modules", ["first", "second"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config(**kwargs))
    shake(model)
    return model


def twins(model: nn.Module | None = None, **kwargs) -> tuple[PeftModel, PeftModel]:
    """(to be accelerated, plain): equal in every bit."""
    model = hra(model, **kwargs)
    return model, copy.deepcopy(model)


def two(model: nn.Module | None = None, *, second: dict | None = None, **kwargs) -> tuple[PeftModel, PeftModel]:
    """Twins with adapters "default" and "other"."""
    ours = hra(model, **kwargs)
    ours.add_adapter(
        "other", config(**{"target_modules": ours.peft_config["default"].target_modules, **(second or {})})
    )
    shake(ours, 2)
    return ours, copy.deepcopy(ours)


def layers(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, HRALayer)]


def base_weights(model: nn.Module) -> list[Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for layer in layers(model)]


def images(dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
