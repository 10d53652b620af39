# SPDX-License-Identifier: Apache-2.0
"""What SHiRA's layers adapt: hooked, offloaded and quantised base layers."""

import copy
import warnings

import pytest
import torch
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import nn

import frodkernels as fk
from frodkernels.peft.shira_layer import FastShiraLinear
from tests.peft.models import Tiny, all_equal, assert_same_step, close, x
from tests.peft.shira_models import base_weights, config, layers, shira, twins, two


def test_hooks_on_the_layer_stay():
    ours = shira()
    calls = []
    layer = layers(ours)[0]
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    fk.peft.accelerate(ours)
    ours(x())
    assert calls == ["pre", "forward"]


@pytest.mark.parametrize("active", [["default"], ["default", "other"]])
@pytest.mark.parametrize("autocast", [False, True])
def test_hooks_on_the_base_layer_run(autocast, active):
    """PEFT's own layer ignores them, with a warning."""
    ours, plain = two()
    seen = []
    for layer in layers(ours):
        layer.base_layer.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    report = fk.peft.accelerate(ours)
    assert len(report.notes) == 4 and "base layer has hooks: it is called" in report.notes[0]
    assert "base layer called" in repr(report) and "eval cache" not in repr(report)
    ours.base_model.set_adapter(active), plain.base_model.set_adapter(active)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # ours has none of PEFT's to give
            got = ours(x())
        close(got, plain(x()), 3e-2 if autocast else 1e-5)
    if not autocast:
        assert_same_step(ours, plain, x())
    assert [module for module, _, _ in seen[:4]] == [layer.base_layer for layer in layers(ours)]
    module, given, out = seen[0]
    assert torch.equal(given, x()) and out.shape == (3, 7, 40)  # its own input and output, without the adapter


def test_a_hook_that_changes_the_output():
    ours, plain = twins()
    layer, other = layers(ours)[0], layers(plain)[0]
    layer.base_layer.register_forward_hook(lambda module, args, out: 2 * out)
    fk.peft.accelerate(ours)
    base = other.base_layer(x())
    close(layer(x()), 2 * base + (other(x()) - base))


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_offloaded_base_layer(cpu_offload):
    """Weights that are in memory only while the base layer runs: PEFT's own forward finds nothing there."""
    from accelerate.hooks import attach_align_device_hook

    ours, plain = two()
    if cpu_offload:
        for layer in layers(ours):
            state = {name: tensor.clone() for name, tensor in layer.base_layer.state_dict().items()}
            attach_align_device_hook(layer.base_layer, torch.device("cpu"), offload=True, weights_map=state)
        assert layers(ours)[0].base_layer.weight.is_meta
    assert len(fk.peft.accelerate(ours).swapped) == 4
    close(ours(x()), plain(x()))
    before = layers(plain)[0].base_layer.weight
    ours.merge_adapter()
    close(ours(x()), plain(x()))
    fk.peft.switch(ours, "other")
    plain.set_adapter("other")
    close(ours(x()), plain(x()))
    ours.unmerge_adapter()
    close(ours(x()), plain(x()))
    hook = getattr(layers(ours)[0].base_layer, "_hf_hook", None)
    weight = hook.weights_map["weight"] if cpu_offload else layers(ours)[0].base_layer.weight
    assert torch.equal(weight, before)


class Rounded(nn.Linear):
    """Its forward is not x W^T with the weight that can be read."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


def test_other_base_layers_are_called():
    base = Tiny()
    for block in base.blocks:
        block.up.__class__ = Rounded
    ours = shira(base)
    exact = copy.deepcopy(ours)
    for layer in layers(exact):
        if type(layer.base_layer) is Rounded:
            layer.base_layer.__class__ = nn.Linear
            layer.base_layer.weight.data = (layer.base_layer.weight.data * 8).round() / 8
    report = fk.peft.accelerate(ours)
    assert len(report.swapped) == 4 and "is a Rounded" in report.notes[0]
    assert_same_step(ours, exact, x())


class Packed(nn.Linear):
    """A quantised layer: its weight holds codes, its forward decodes them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.step = float(linear.weight.detach().abs().max()) / 127
        codes = (linear.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def decoded(self):
        return self.weight.float() * self.step

    def forward(self, x):
        return nn.functional.linear(x, self.decoded().to(x.dtype), self.bias)


class Mergeable(QuantizationBackend):
    """As PEFT's own for bitsandbytes: decodes and encodes the whole weight."""

    supports_merge = True
    layer_type = "linear"
    backend_name = "packed"

    def get_base_weight(self, base_layer):
        return base_layer.decoded()

    def set_base_weight(self, peft_layer, weight_data):
        base = peft_layer.get_base_layer()
        base.weight = nn.Parameter((weight_data / base.step).round().clamp(-127, 127).to(torch.int8), False)


def packed(backend):
    ours, _ = two()
    for layer in layers(ours):
        layer.base_layer = Packed(layer.base_layer).requires_grad_(False)
        layer.quantization_backend = backend
    return ours, copy.deepcopy(ours)


@pytest.mark.parametrize(
    "backend", [ForwardOnlyQuantizationBackend("packed"), Mergeable()], ids=lambda b: type(b).__name__
)
@pytest.mark.parametrize("active", [["default"], ["other", "default"]])
def test_quantised_base_layers_are_called(backend, active):
    ours, plain = packed(backend)
    report = fk.peft.accelerate(ours)
    assert len(report.swapped) == 4 and "is a Packed: it is called" in report.notes[0]
    assert ("PEFT reads its weight" in report.notes[0]) == backend.supports_merge
    for model in (ours, plain):
        model.base_model.set_adapter(active)
    assert_same_step(ours, plain, x())
    with torch.no_grad():
        close(ours.eval()(x()), plain.eval()(x()))
    layer, other = layers(ours)[0], layers(plain)[0]
    given = x(dtype=torch.bfloat16)
    if not backend.supports_merge:  # PEFT decodes to float32 otherwise, and that is not x's dtype
        for which in (layer, other):
            which.base_layer.bias = None
        close(layer(given), other(given), 2e-2)


def test_quantised_base_layers_merge_as_peft_says():
    ours, plain = packed(ForwardOnlyQuantizationBackend("packed"))
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        with pytest.raises(TypeError, match="Merging/unmerging is not available"):
            model.merge_adapter()
        assert not layers(model)[0].merged
    ours, plain = packed(Mergeable())
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        model.merge_adapter(["default", "other"])
    assert all_equal(base_weights(ours), base_weights(plain))
    assert torch.equal(ours(x()), plain(x()))
    for model in (ours, plain):
        model.unmerge_adapter()
    assert all_equal(base_weights(ours), base_weights(plain)) and not layers(ours)[0].merged
    layers(ours)[0].shira_indices["default"][0, 0] = 99
    with pytest.raises(ValueError, match=r"rows\[0\] = 99"):
        ours.merge_adapter()


def test_conv1d_and_other_layers_are_pefts_to_refuse():
    """SHiRA adapts linear layers only; fan_in_fan_out is switched off for those, with PEFT's warning."""
    from tests.peft.models import gpt2

    with fk.peft.enabled():
        with pytest.raises(TypeError, match="not supported"):
            shira(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
        model = shira(fan_in_fan_out=True)
    assert all(type(layer) is FastShiraLinear and not layer.fan_in_fan_out for layer in layers(model))
    plain = shira()
    close(model(x()), plain(x()))


def test_nested_base_layers_are_skipped():
    from peft import LoraConfig, get_peft_model

    ours = shira()
    wrapped = get_peft_model(Tiny(), LoraConfig(target_modules=["up"]))
    layers(ours)[0].base_layer = wrapped.base_model.model.blocks[0].up
    report = fk.peft.accelerate(ours)
    assert "another adapter (Linear)" in report.skipped["base_model.model.blocks.0.up"]
    assert len(report.swapped) == 3 and config().r == 4
