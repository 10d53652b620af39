# SPDX-License-Identifier: Apache-2.0
"""Adapted layers with random directions, each with a batch."""

import torch
from torch import nn

import frodkernels as fk

F64 = torch.float64
N, M, R = 24, 16, 6


def directions(n=N, r=R, dtype=F64):
    return torch.randn(n, r, dtype=F64).to(dtype)


def linear(dtype=F64, **options):
    """An adapted layer and a batch for it."""
    base = nn.Linear(N, M, dtype=dtype)
    u = directions(dtype=F64 if dtype == F64 else torch.float32)
    return fk.nn.HRALinear.from_linear(base, u=u, **options), torch.randn(3, 7, N, dtype=dtype)


def conv(dtype=F64, orthogonalize=False, **options):
    base = nn.Conv2d(3, 5, **{"kernel_size": 3, **options}, dtype=dtype)
    u = directions(base.weight[0].numel(), 4, F64 if dtype == F64 else torch.float32)
    layer = fk.nn.HRAConv2d.from_conv2d(base, u=u, orthogonalize=orthogonalize)
    return layer, torch.randn(2, 3, 9, 11, dtype=dtype)


def both(**options):
    return [linear(**options), conv(padding=1, **options)]
