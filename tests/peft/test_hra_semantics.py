# SPDX-License-Identifier: Apache-2.0
"""A model with swapped HRA layers does what PEFT's does: outputs, gradients and every switch PEFT has."""

import copy

import pytest
import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch.utils.checkpoint import checkpoint

import frodkernels as fk
from frodkernels.peft.hra_layer import FastHRAConv2d, FastHRALinear
from tests.peft.hra_models import Images, config, hra, images, layers, shake, twins, two
from tests.peft.models import BERT_TARGETS, IN, Tiny, assert_same_step, bert, close, step, tokens, x


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
