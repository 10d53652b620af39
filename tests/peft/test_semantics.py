# SPDX-License-Identifier: Apache-2.0
"""A swapped model does what PEFT's does: outputs, gradients and every switch PEFT has."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

import frodkernels as fk
from frodkernels.peft.frod_layer import FastFrodLinear
from tests.peft.models import BERT_TARGETS, IN, bert, close, config, frod, gpt2, layers, shake, tokens, twins, x


def backward(model, *args, seed=11):
    """(output, input gradient, {name: gradient}) with PEFT's random state fixed."""
    model.zero_grad()
    torch.manual_seed(seed)
    args = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
    out = model(*args)
    out = getattr(out, "logits", out)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), args[0].grad, grads


def assert_same_step(ours, plain, *args, tol=1e-5):
    got, want = backward(ours, *args), backward(plain, *args)
    close(got[0], want[0], tol)
    if want[1] is not None:
        close(got[1], want[1], tol)
    assert got[2].keys() == want[2].keys()
    for name, grad in want[2].items():
        assert got[2][name].dtype == grad.dtype
        close(got[2][name], grad, tol)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, IN), (1, IN), (IN,), (0, IN)])
def test_one_adapter(train, shape):
    ours, plain = twins()
    fk.peft.accelerate(ours)
    assert all(type(layer) is FastFrodLinear for layer in layers(ours))
    assert_same_step(ours.train(train), plain.train(train), x(*shape))


def test_bert_with_modules_to_save():
    ours, plain = twins(bert(), target_modules=BERT_TARGETS, modules_to_save=["classifier"])
    fk.peft.accelerate(ours)
    got, want = backward(ours, tokens()), backward(plain, tokens())
    assert any("modules_to_save" in name for name in got[2])
    assert_same_step(ours, plain, tokens())
    close(got[0], want[0])


def test_conv1d():
    ours, plain = twins(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    assert all(layer.is_target_conv_1d_layer for layer in layers(ours))
    fk.peft.accelerate(ours)
    assert_same_step(ours, plain, tokens())
    ours.merge_adapter(), plain.merge_adapter()
    close(ours(tokens()).logits, plain(tokens()).logits)


@pytest.mark.parametrize("bias", ["all", "frod_only"])
def test_trainable_bias(bias):
    ours, plain = twins(bias=bias)
    fk.peft.accelerate(ours)
    assert any(name.endswith("base_layer.bias") for name in backward(ours, x())[2])
    assert_same_step(ours, plain, x())


def test_dropout_takes_the_same_masks():
    ours, plain = twins(frod_dropout=0.4)
    fk.peft.accelerate(ours)
    assert_same_step(ours.train(), plain.train(), x())
    assert_same_step(ours.eval(), plain.eval(), x())


def test_dropout_of_everything():
    ours, plain = twins(frod_dropout=1.0)
    fk.peft.accelerate(ours)
    assert_same_step(ours.train(), plain.train(), x())


def two(**kwargs):
    """Twins with adapters "default" and "other"."""
    model = frod(**kwargs)
    model.add_adapter("other", config(**{**kwargs, "init_weights": False}))
    shake(model, seed=2)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("watched", [False, True], ids=["plain base", "hooked base"])
def test_several_active_adapters(dropout, watched):
    ours, plain = two(frod_dropout=dropout)
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        model.base_model.set_adapter(["default", "other"])
    seen = []
    if watched:
        for layer in layers(ours):
            layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(args[0].detach().clone()))
    assert_same_step(ours.train(), plain.train(), x())
    assert_same_step(ours.eval(), plain.eval(), x())
    if watched:  # the base layer's hooks see the layer's input, not our rearranged sum
        assert torch.equal(seen[0], x())


def test_several_adapters_of_which_some_drop():
    ours, plain = frod(), None
    ours.add_adapter("other", config(frod_dropout=0.4))
    ours.add_adapter("third", config())
    shake(ours, 2)
    plain = copy.deepcopy(ours)
    fk.peft.accelerate(ours)
    for active in (["default", "other"], ["default", "other", "third"], ["other", "default"]):
        for model in (ours, plain):
            model.base_model.set_adapter(active)
        assert_same_step(ours.train(), plain.train(), x())


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
        model.add_adapter("other", config(init_weights=False))
        model.set_adapter("other")
    assert_same_step(ours, plain, x())


def test_deleting_all_adapters():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours.delete_adapter("default"), plain.delete_adapter("default")
    close(ours.base_model(x()), plain.base_model(x()))


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
    ours, plain = twins()
    fk.peft.accelerate(ours)
    base = copy.deepcopy(plain).unload()
    with ours.disable_adapter():
        assert torch.equal(ours(x()), base(x()))
    assert_same_step(ours, plain, x())


def test_layer_without_the_active_adapter():
    ours = frod(target_modules=["up"])
    ours.add_adapter("other", config(target_modules=["down"]))
    shake(ours, 2)
    plain = copy.deepcopy(ours)
    fk.peft.accelerate(ours)
    for name in ("default", "other"):
        ours.set_adapter(name), plain.set_adapter(name)
        assert_same_step(ours, plain, x())


def test_runtime_offload():
    ours, plain = twins(runtime_offload_base_weight=True)
    fk.peft.accelerate(ours)
    assert_same_step(ours, plain, x())
    ours.float()
    assert_same_step(ours, plain, x())


def test_gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint

    ours, plain = twins()
    fk.peft.accelerate(ours)

    def run(model):
        model.zero_grad()
        inputs = x().requires_grad_()
        checkpoint(model, inputs, use_reentrant=False).square().sum().backward()
        return inputs.grad, [p.grad for p in model.parameters() if p.grad is not None]

    got, want = run(ours), run(plain)
    close(got[0], want[0])
    for a, b in zip(got[1], want[1], strict=True):
        close(a, b)


def test_hooks_stay():
    ours = frod()
    calls = []
    layer = layers(ours)[0]
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    fk.peft.accelerate(ours)
    ours(x())
    assert calls == ["pre", "forward"]


def test_training_converges_to_the_same_parameters():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(8):
            optimiser.zero_grad()
            model(x(seed=step)).square().mean().backward()
            optimiser.step()
            if step == 4:  # an evaluation in between must not disturb training
                with torch.no_grad():
                    model.eval()(x())
                model.train()
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        close(a, b), name


def test_save_here_load_in_plain_peft_and_back(tmp_path):
    ours, plain = twins()
    fk.peft.accelerate(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    from safetensors.torch import load_file

    from tests.peft.models import Tiny

    a = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    b = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    want = plain.eval()(x())
    loaded = PeftModel.from_pretrained(Tiny(), tmp_path / "ours")
    assert type(layers(loaded)[0]) is not FastFrodLinear
    close(loaded(x()), want)
    fk.peft.accelerate(loaded)
    close(loaded(x()), want)


def test_adapter_names_are_ignored_as_in_peft():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    close(ours(x(3, IN), adapter_names=["default"] * 3), plain(x(3, IN), adapter_names=["default"] * 3))


def test_a_single_layer_is_a_model():
    ours, plain = twins()
    report = fk.peft.accelerate(layers(ours)[0])
    assert report.swapped == [""]
    assert type(layers(ours)[1]) is not FastFrodLinear
    assert isinstance(layers(ours)[0], nn.Linear)
    assert_same_step(ours, plain, x())
