# SPDX-License-Identifier: Apache-2.0
"""What a function returns is the caller's: in-place activations and residuals may be written over it."""

import pytest
import torch

import frodkernels as fk
from tests.householder.cases import close, make_chain, make_conv, make_layer

LEADS = [(6,), (2, 3), (2, 3, 2), ()]
leads = pytest.mark.parametrize("lead", LEADS, ids=str)


def modified(y: torch.Tensor, in_place: bool) -> torch.Tensor:
    residual = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    if in_place:
        y += residual
        return torch.relu_(y.mul_(2))
    return torch.relu((y + residual) * 2)


def check(case, **options) -> None:
    """Gradients through the modified result, both ways."""
    leaves = case.leaves()
    found = [
        torch.autograd.grad(modified(case(**options), in_place).square().sum(), leaves) for in_place in (True, False)
    ]
    close(list(found[0]), list(found[1]))


@leads
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_householder(lead, orthogonalize):
    check(make_chain(9, 4, *lead), orthogonalize=orthogonalize)


@leads
@pytest.mark.parametrize("side", ["auto", "input", "output"])
def test_linear(lead, side):
    check(make_layer(7, 9, 4, *lead), side=side)


def test_conv():
    check(make_conv(5, 3, (3, 2), 4, (2, 7, 9), padding=1))


@leads
def test_modules(lead):
    linear = torch.nn.Linear(9, 7, dtype=torch.float64)
    layer = torch.nn.Sequential(fk.nn.HRALinear.from_linear(linear, r=4), torch.nn.ReLU(inplace=True))
    plain = torch.nn.Sequential(linear, torch.nn.ReLU())
    x = torch.randn(*lead, 9, dtype=torch.float64)
    close(layer(x), plain(x))
    layer(x).sum().backward()
