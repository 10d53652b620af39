# SPDX-License-Identifier: Apache-2.0
"""A model with swapped HRA layers does what PEFT's does: outputs, gradients and every switch PEFT has."""

import copy

import pytest
import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.utils.checkpoint import checkpoint

import frodkernels as fk
from frodkernels.peft.hra_layer import FastHRAConv2d, FastHRALinear
from tests.peft.hra_models import Images, config, hra, images, layers, shake, step, twins, two
from tests.peft.models import BERT_TARGETS, IN, Tiny, bert, close, tokens, x


def assert_same_step(ours, plain, *args, tol=1e-5):
    got, want = step(ours, *args), step(plain, *args)
    close(got[0], want[0], tol)
    if want[1] is not None:
        close(got[1], want[1], tol)
    assert got[2].keys() == want[2].keys()
    for name, grad in want[2].items():
        assert got[2][name].dtype == grad.dtype
        # u's gradient is what is left of larger terms
        torch.testing.assert_close(got[2][name], grad, rtol=1e-4, atol=tol * float(grad.abs().max()) + 1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, IN), (64, IN), (1, IN), (IN,), (0, IN)])
def test_one_adapter(train, shape):
    ours, plain = twins()
    fk.peft.accelerate(ours)
    assert all(type(layer) is FastHRALinear for layer in layers(ours))
    assert_same_step(ours.train(train), plain.train(train), x(*shape))


@pytest.mark.parametrize("r, gram_schmidt", [(1, False), (3, False), (16, False), (1, True), (5, True), (20, True)])
def test_ranks(r, gram_schmidt):
    ours, plain = twins(r=r, apply_GS=gram_schmidt, init_weights=False)
    fk.peft.accelerate(ours)
    assert_same_step(ours, plain, x())


def test_convolutions():
    ours, plain = twins(Images())
    fk.peft.accelerate(ours)
    assert all(type(layer) is FastHRAConv2d for layer in layers(ours))
    assert_same_step(ours, plain, images())
    close(ours(images()[0]), plain(images()[0]))


@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_convolutions_of_two_adapters(gram_schmidt):
    ours, plain = two(Images(), second=dict(r=3, apply_GS=gram_schmidt, init_weights=False))
    fk.peft.accelerate(ours)
    for active in (["default", "other"], ["other", "default"], ["other"]):
        for model in (ours, plain):
            model.base_model.set_adapter(active)
        assert_same_step(ours, plain, images())


def test_bert_with_modules_to_save():
    ours, plain = twins(bert(), target_modules=BERT_TARGETS, modules_to_save=["classifier"])
    fk.peft.accelerate(ours)
    assert any("modules_to_save" in name for name in step(ours, tokens())[2])
    assert_same_step(ours, plain, tokens())


@pytest.mark.parametrize("bias", ["all", "hra_only"])
@pytest.mark.parametrize("make, inputs", [(Tiny, x), (Images, images)])
def test_trainable_bias(bias, make, inputs):
    ours, plain = twins(make(), bias=bias)
    fk.peft.accelerate(ours)
    assert any(name.endswith("base_layer.bias") for name in step(ours, inputs())[2])
    assert_same_step(ours, plain, inputs())


def test_unfrozen_base_weights_have_no_gradient_as_in_peft():
    for make, inputs in ((Tiny, x), (Images, images)):
        ours, plain = twins(make())
        fk.peft.accelerate(ours)
        ours.requires_grad_(True), plain.requires_grad_(True)
        assert_same_step(ours, plain, inputs())
        assert not any(name.endswith("base_layer.weight") for name in step(ours, inputs())[2])


KINDS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize("first, second", KINDS, ids=str)
def test_several_active_adapters_in_order(first, second):
    ours, plain = two(apply_GS=first, init_weights=False, second=dict(apply_GS=second, r=5, init_weights=False))
    fk.peft.accelerate(ours)
    outputs = []
    for active in (["default", "other"], ["other", "default"]):
        for model in (ours, plain):
            model.base_model.set_adapter(active)
        assert_same_step(ours, plain, x())
        outputs.append(ours(x()).detach())
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2  # the order counts


def test_switching_adapters():
    ours, plain = two()
    fk.peft.accelerate(ours)
    for name in ("other", "default", "other"):
        ours.set_adapter(name), plain.set_adapter(name)
        assert_same_step(ours, plain, x())
        with torch.no_grad():
            close(ours.eval()(x()), plain.eval()(x()))


def test_deleting_an_adapter_and_reusing_its_name():
    ours, plain = two()
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        model.delete_adapter("other")
        torch.manual_seed(4)
        model.add_adapter("other", config(r=6, init_weights=False))
        model.set_adapter("other")
    assert_same_step(ours, plain, x())


def test_deleting_all_adapters():
    for make, inputs in ((Tiny, x), (Images, images)):
        ours, plain = twins(make())
        fk.peft.accelerate(ours)
        ours.delete_adapter("default"), plain.delete_adapter("default")
        close(ours.base_model(inputs()), plain.base_model(inputs()))


def test_adapter_added_after_the_swap():
    ours, plain = twins(target_modules=["up"])
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        torch.manual_seed(4)
        model.add_adapter("wide", config(init_weights=False))
        model.set_adapter("wide")
    assert_same_step(ours, plain, x())  # "down" is plain PEFT, "up" fast
    report = fk.peft.accelerate(ours)
    assert len(report.swapped) == 2 and len(report.already) == 2
    assert_same_step(ours, plain, x())


def test_disabled():
    for make, inputs in ((Tiny, x), (Images, images)):
        ours, plain = twins(make())
        fk.peft.accelerate(ours)
        base = copy.deepcopy(plain).unload()
        with ours.disable_adapter():
            assert torch.equal(ours(inputs()), base(inputs()))
        assert_same_step(ours, plain, inputs())


def test_layer_without_the_active_adapter():
    ours = hra(target_modules=["up"])
    ours.add_adapter("other", config(target_modules=["down"]))
    shake(ours, 2)
    plain = copy.deepcopy(ours)
    fk.peft.accelerate(ours)
    for name in ("default", "other"):
        ours.set_adapter(name), plain.set_adapter(name)
        assert_same_step(ours, plain, x())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    ours, plain = twins()
    fk.peft.accelerate(ours)

    def run(model):
        model.zero_grad()
        inputs = x().requires_grad_()
        checkpoint(model, inputs, use_reentrant=reentrant).square().sum().backward()
        return [inputs.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    for a, b in zip(run(ours), run(plain), strict=True):
        close(a, b, 1e-4)


def test_training_converges_to_the_same_parameters():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for count in range(8):
            optimiser.zero_grad()
            model(x(seed=count)).square().mean().backward()
            optimiser.step()
            if count == 4:
                with torch.no_grad():
                    model.eval()(x())
                model.train()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        close(a, b)


def test_input_casting_can_be_turned_off():
    """PEFT's switch: x takes the base layer's dtype and no other. PEFT itself needs u in that dtype then."""
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for layer, other in zip(layers(ours), layers(plain), strict=True):
        h = torch.randn(5, layer.in_features).bfloat16()
        with disable_input_dtype_casting(ours), disable_input_dtype_casting(plain):
            got, want = layer(h), other(h)
        assert got.dtype == want.dtype == torch.bfloat16
        close(got, want, 1e-2)


def test_adapter_names_are_ignored_as_in_peft():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    close(ours(x(3, IN), adapter_names=["default"] * 3), plain(x(3, IN), adapter_names=["default"] * 3))


def test_scaling_is_ignored_as_in_peft():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for layer in layers(ours):
        layer.scale_layer(0.5)
        layer.unscale_layer(0.5)
    close(ours(x()), plain(x()))


def test_dense_rotation():
    for make in (Tiny, Images):
        for gram_schmidt in (False, True):
            ours, plain = twins(make(), apply_GS=gram_schmidt, init_weights=False)
            fk.peft.accelerate(ours)
            for layer, other in zip(layers(ours), layers(plain), strict=True):
                for reverse in (False, True):
                    got, want = (which.get_delta_weight("default", reverse) for which in (layer, other))
                    assert got.dtype == want.dtype and got.shape == want.shape and got.requires_grad
                    close(got, want)


# ---- base layers --------------------------------------------------------------------------------------------------


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


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, inputs", [(Tiny, x), (Images, images)])
def test_save_here_load_in_plain_peft_and_back(tmp_path, make, inputs):
    from safetensors.torch import load_file

    ours, plain = twins(make())
    fk.peft.accelerate(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    want = plain.eval()(inputs())
    loaded = PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert type(layers(loaded)[0]) not in (FastHRALinear, FastHRAConv2d)
    close(loaded(inputs()), want)
    fk.peft.accelerate(loaded)
    close(loaded(inputs()), want)


def test_state_dicts_load_into_fast_layers():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    shake(plain, 9)
    ours.load_state_dict(plain.state_dict())
    assert_same_step(ours, plain, x())
    before = ours(x()).detach()
    state = plain.state_dict()
    key = next(key for key in state if "hra_u" in key)
    state[key][:, 2] = 0
    with pytest.raises(ValueError, match=r"hra_u.default' has columns that are zero.*\[2\]"):
        ours.load_state_dict(state)
    close(ours(x()), before)


def test_a_single_layer_is_a_model():
    ours, plain = twins()
    report = fk.peft.accelerate(layers(ours)[0])
    assert report.swapped == [""]
    assert type(layers(ours)[1]) is not FastHRALinear
    assert_same_step(ours, plain, x())
