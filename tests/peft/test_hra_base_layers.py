# SPDX-License-Identifier: Apache-2.0
"""What HRA's layers adapt: hooked and quantised base layers, convolutions of every geometry."""

import copy

import pytest
import torch
from torch import nn

import frodkernels as fk
from tests.peft.hra_models import Images, hra, images, layers, twins
from tests.peft.models import Tiny, assert_same_step, close, step, x


def test_hooks_on_the_layer_stay():
    ours = hra()
    calls = []
    layer = layers(ours)[0]
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    fk.peft.accelerate(ours)
    ours(x())
    assert calls == ["pre", "forward"]


@pytest.mark.parametrize("autocast", [False, True])
def test_hooked_base_layer_is_called(autocast):
    ours, plain = twins()
    seen = []
    for layer in layers(ours):
        layer.base_layer.register_forward_hook(lambda module, args, out: seen.append((args[0].detach(), out.detach())))
    report = fk.peft.accelerate(ours)
    assert len(report.notes) == 4 and "has hooks" in report.notes[0] and "input side" in repr(report)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if autocast:
            close(ours(x()), plain(x()), 3e-2)
        else:
            assert_same_step(ours, plain, x())
    assert len(seen) == 4
    first = layers(plain)[0]
    h = x() @ first.get_delta_weight("default").t()
    close(seen[0][0], h)  # the reflected input
    assert seen[0][0].dtype == torch.float32


def test_hooked_base_layer_of_other_dtypes():
    """The base layer meets its own dtype, whatever the input's."""
    for base, given in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        ours, plain = twins(Tiny().to(base))
        layer, other = layers(ours)[0], layers(plain)[0]
        seen = []
        layer.base_layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].dtype))
        fk.peft.accelerate(ours)
        got, want = layer(x(dtype=given)), other(x(dtype=given))
        assert seen == [base] and got.dtype == want.dtype == given
        close(got, want, 2e-2)


def test_hooked_convolution():
    ours, plain = twins(Images())
    seen = []
    layers(ours)[0].base_layer.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    report = fk.peft.accelerate(ours)
    assert len(report.notes) == 1 and "hooks" in report.notes[0]
    assert_same_step(ours, plain, images())
    assert torch.equal(seen[0], images())
    with torch.autocast("cpu", torch.bfloat16):
        close(ours(images()), plain(images()), 3e-2)


class Rounded(nn.Linear):
    """Stands for a quantised layer: its forward is not x W^T with the weight that can be read."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


def test_other_base_layers_are_called():
    base = Tiny()
    for block in base.blocks:
        block.up.__class__ = Rounded
    ours = hra(base)
    exact = copy.deepcopy(ours)
    for layer in layers(exact):
        if type(layer.base_layer) is Rounded:
            layer.base_layer.__class__ = nn.Linear
            layer.base_layer.weight.data = (layer.base_layer.weight.data * 8).round() / 8
    report = fk.peft.accelerate(ours)
    assert len(report.swapped) == 4 and "is a Rounded" in report.notes[0]
    assert_same_step(ours, exact, x())


class Packed(nn.Linear):
    """A quantised layer whose weight holds no numbers."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.secret = (linear.weight.detach().clone(),)
        self.weight = nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.secret[0].to(x.dtype), self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_base_layer(dtype):
    ours, plain = twins()
    layer, other = layers(ours)[0], layers(plain)[0]
    layer.base_layer = Packed(layer.base_layer).requires_grad_(False)
    layer.base_layer.bias.data = layer.base_layer.bias.data.to(dtype)
    assert len(fk.peft.accelerate(ours).swapped) == 4
    close(layer(x(dtype=dtype)), other(x(dtype=dtype)), 1e-5 if dtype == torch.float32 else 2e-2)
    with pytest.raises(ValueError, match="cannot be merged into Packed: its weight is quantised"):
        layer.merge()
    assert not layer.merged


# ---- geometry -----------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "dilation": dict(kernel_size=3, dilation=2),
    "anisotropic dilation": dict(kernel_size=3, dilation=(1, 3)),
    "stride": dict(kernel_size=3, stride=(1, 2)),
    "padding": dict(kernel_size=3, padding=(2, 0)),
    "same": dict(kernel_size=3, padding="same"),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
    "reflect": dict(kernel_size=3, padding=(1, 2), padding_mode="reflect"),
    "everything": dict(kernel_size=2, stride=(2, 1), padding=(1, 0), dilation=(1, 2), padding_mode="replicate"),
}


class One(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry_is_that_of_pefts_merged_layer(name):
    ours, plain = twins(One(nn.Conv2d(3, 5, **GEOMETRIES[name])), target_modules=["conv"])
    report = fk.peft.accelerate(ours)
    assert len(report.swapped) == 1 and "PEFT ignores the convolution's" in report.notes[0]
    got = ours(images())
    plain.merge_adapter()
    close(got, plain(images()))
    got = step(ours, images())
    ours.merge_adapter()
    close(ours(images()), got[0])


@pytest.mark.parametrize("kernel", [(3, 2), (1, 3)])
def test_kernels_that_are_not_square(kernel):
    """PEFT sizes u for a square one and then fails; an u that fits is served."""
    ours = hra(One(nn.Conv2d(3, 5, kernel)), target_modules=["conv"])
    report = fk.peft.accelerate(ours)
    assert not report.swapped and "kernel: PEFT makes u for" in next(iter(report.skipped.values()))
    layer = layers(ours)[0]
    layer.hra_u["default"] = nn.Parameter(torch.randn(3 * kernel[0] * kernel[1], 4))
    assert fk.peft.accelerate(ours).swapped
    got = ours(images()).detach()
    conv = layer.base_layer
    want = fk.hra_conv2d(images(), conv.weight, layer.hra_u["default"], conv.bias)
    close(got, want)
    before = conv.weight.detach().clone()
    ours.merge_adapter()
    close(ours(images()), got)
    ours.unmerge_adapter()
    assert torch.equal(conv.weight, before)


def test_groups_are_refused_by_peft():
    with fk.peft.enabled(), pytest.raises(NotImplementedError, match="groups"):
        hra(One(nn.Conv2d(4, 4, 3, groups=2)), target_modules=["conv"])
