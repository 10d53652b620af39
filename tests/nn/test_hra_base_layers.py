# SPDX-License-Identifier: Apache-2.0
"""fk.nn.HRALinear and fk.nn.HRAConv2d over layers that are no plain ones: quantised, hooked, computed; in training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import frodkernels as fk
from frodkernels.reference.householder import reflect
from tests.householder.cases import F64, close
from tests.nn.hra_layers import M, N, both, directions, linear

either = pytest.mark.parametrize("orthogonalize", [False, True])


class Quantised(nn.Module):
    """A stand-in: 8-bit integers and a scale per row, no weight to be had, its own dtype rules."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype))


@either
@pytest.mark.parametrize("side", ["auto", "input", "output"])
def test_any_module_can_be_adapted(side, orthogonalize):
    """Only base(x') is called, once; whatever the side, for there is no weight to correct with."""
    base = Quantised(nn.Linear(N, M, dtype=F64))
    layer = fk.nn.HRALinear.from_linear(base, u=directions(), side=side, orthogonalize=orthogonalize)
    x = torch.randn(3, 5, N, dtype=F64, requires_grad=True)
    y = layer(x)
    assert base.calls == 1
    want = base(reflect(x, layer.u, transpose=True, orthogonalize=orthogonalize))
    close(y, want)
    leaves = [x, layer.u]
    close(torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves))
    with pytest.raises(ValueError, match="^base must be a torch.nn.Linear to be merged, got Quantised"):
        layer.merge()


def test_a_module_may_hide_its_size():
    class Hidden(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = fk.nn.HRALinear(Hidden(), directions(), in_features=N)
    x = torch.randn(5, N, dtype=F64)
    close(layer(x), 2 * reflect(x, layer.u, transpose=True))


def test_a_quantised_layer_starts_as_itself():
    base = Quantised(nn.Linear(N, M))
    layer = fk.nn.HRALinear.from_linear(base, 8)
    assert layer.u.dtype == torch.float32
    x = torch.randn(5, N)
    torch.testing.assert_close(layer(x), base(x))


def hooked(base, kind, calls):
    if kind == "forward":
        base.register_forward_hook(lambda module, args, out: calls.append(kind) or 2 * out)
    elif kind == "forward pre":
        base.register_forward_pre_hook(lambda module, args: calls.append(kind) or (args[0] + 1, *args[1:]))
    elif kind == "forward with keywords":
        base.register_forward_hook(lambda module, args, kwargs, out: calls.append(kind) or out - 1, with_kwargs=True)
    elif kind == "backward":
        base.register_full_backward_hook(lambda module, gin, gout: calls.append(kind))
    elif kind == "backward pre":
        base.register_full_backward_pre_hook(lambda module, gout: calls.append(kind) or (3 * gout[0],))
    else:  # as accelerate's offloading does it
        old = base.forward
        base.forward = lambda x: calls.append(kind) or 2 * old(x)


@pytest.mark.parametrize(
    "kind", ["forward", "forward pre", "forward with keywords", "backward", "backward pre", "replaced forward"]
)
def test_hooks_of_the_base_layer_run(kind):
    """And see what the layer they are on sees: x', and its own output."""
    for layer, x in both():
        calls = []
        hooked(layer.base, kind, calls)
        x.requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert calls == [kind]
        if isinstance(layer, fk.nn.HRALinear):
            moved = reflect(x, layer.u, transpose=True)
            want = layer.base(moved)
            close(y, want)
            close(dx, torch.autograd.grad(want.sum(), x)[0])


def test_parametrised_layers_are_called():
    """Their weight is computed; type and hooks say that they are no plain layer."""
    layer, x = linear()
    nn.utils.parametrize.register_parametrization(layer.base, "weight", nn.Tanh())
    close(layer(x), F.linear(reflect(x, layer.u, transpose=True), layer.base.weight, layer.base.bias))


def test_autocast():
    for layer, x in both(dtype=torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            plain = layer.base(x)
        assert y.dtype == plain.dtype == torch.bfloat16
        (du,) = torch.autograd.grad(y.float().square().sum(), layer.u)
        exact = torch.autograd.grad(layer(x).square().sum(), layer.u)[0]
        assert du.dtype == torch.float32 and (du - exact).norm() < 0.1 * exact.norm()


def test_training_with_the_penalty_learns_a_rotation():
    """Directions of a target are found well enough to be of use, and the regulariser keeps them apart."""
    torch.manual_seed(1)
    base = nn.Linear(N, M, dtype=F64)
    target = fk.nn.HRALinear.from_linear(base, u=directions(r=2)).merge()
    layer = fk.nn.HRALinear.from_linear(base, 4)
    optimizer = torch.optim.Adam([layer.u], lr=0.02)
    curve = []
    for _ in range(150):
        x = torch.randn(64, N, dtype=F64)
        loss = F.mse_loss(layer(x), target(x))
        curve.append(loss.item())
        optimizer.zero_grad()
        (loss + 1e-4 * fk.orthogonality_penalty(layer.u)).backward()
        optimizer.step()
    assert curve[-1] < 0.2 * curve[0]


@pytest.mark.parametrize("base", [nn.Linear(16, 8), nn.Conv2d(3, 4, 3)], ids=["linear", "conv"])
def test_merging_under_autocast_rounds_nothing(base):
    make = fk.nn.HRALinear.from_linear if isinstance(base, nn.Linear) else fk.nn.HRAConv2d.from_conv2d
    layer = make(base, 5)
    want = layer.merge().weight
    with torch.autocast("cpu", torch.bfloat16):
        got = layer.merge().weight
    assert got.dtype == want.dtype and torch.equal(got, want)
