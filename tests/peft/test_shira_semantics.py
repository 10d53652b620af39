# SPDX-License-Identifier: Apache-2.0
"""A model with swapped SHiRA layers does what PEFT's does: outputs, gradients and every switch PEFT has."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import frodkernels as fk
from frodkernels.peft.shira_layer import FastShiraLinear, PeftShiraLinear
from tests.peft.models import BERT_TARGETS, IN, Tiny, assert_same_step, bert, close, step, tokens, x
from tests.peft.shira_models import config, layers, set_scale, shake, shira, twins, two


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, IN), (64, IN), (1, IN), (IN,), (0, IN)])
def test_one_adapter(train, shape):
    ours, plain = twins()
    fk.peft.accelerate(ours)
    assert all(type(layer) is FastShiraLinear for layer in layers(ours))
    assert_same_step(ours.train(train), plain.train(train), x(*shape))


@pytest.mark.parametrize("r", [1, 4, 15])  # 15 of 24 x 40: every entry
def test_densities(r):
    ours, plain = twins(r=r)
    fk.peft.accelerate(ours)
    assert layers(ours)[0].shira_weight["default"].numel() == 64 * r
    assert_same_step(ours, plain, x())


def test_float64():
    ours, plain = twins(Tiny().double())
    fk.peft.accelerate(ours)
    for a, b in zip(step(ours, x(dtype=torch.float64))[:2], step(plain, x(dtype=torch.float64))[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-11)


def test_masks_of_the_users_own():
    """PEFT takes any positions: here whole rows, which are the trained ones then."""

    def rows(base_layer, r, **kwargs):
        weight = base_layer.weight
        mask = torch.zeros_like(weight).flatten()
        mask[: r * sum(weight.shape)] = 1
        return mask.view_as(weight)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        custom = config(mask_type="rows")
        custom.mask_fn = rows
        model = get_peft_model(Tiny(), custom)
    shake(model)
    plain = copy.deepcopy(model)
    assert len(fk.peft.accelerate(model).swapped) == 4
    assert_same_step(model, plain, x())


@pytest.mark.parametrize("scale", [0.0, -1.5, 2, 0.25, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_scales(scale, train):
    ours, plain = twins()
    fk.peft.accelerate(ours)
    set_scale(ours, "default", scale), set_scale(plain, "default", scale)
    set_scale(ours, "nobody", 7)
    assert_same_step(ours, plain, x())
    with torch.no_grad():
        close(ours.train(train)(x()), plain.train(train)(x()))


def test_bert_with_modules_to_save():
    ours, plain = twins(bert(), target_modules=BERT_TARGETS, modules_to_save=["classifier"])
    fk.peft.accelerate(ours)
    assert any("modules_to_save" in name for name in step(ours, tokens())[2])
    assert_same_step(ours, plain, tokens())


def test_biases_that_train():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        for layer in layers(model):
            if layer.base_layer.bias is not None:
                layer.base_layer.bias.requires_grad_(True)
    assert any(name.endswith("base_layer.bias") for name in step(ours, x())[2])
    assert_same_step(ours, plain, x())
    ours.eval(), plain.eval()  # beside a frozen adapter, and so a cached weight
    for model in (ours, plain):
        for layer in layers(model):
            layer.shira_weight.requires_grad_(False)
    assert_same_step(ours, plain, x())


def test_unfrozen_base_weights_have_no_gradient_as_in_peft():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours.requires_grad_(True), plain.requires_grad_(True)
    assert_same_step(ours, plain, x())
    assert not any(name.endswith("base_layer.weight") for name in step(ours, x())[2])


@pytest.mark.parametrize("active", [["default", "other"], ["other", "default"], ["other"], []])
def test_active_adapters_add_up(active):
    ours, plain = two()
    fk.peft.accelerate(ours)
    set_scale(ours, "other", -0.5), set_scale(plain, "other", -0.5)
    for model in (ours, plain):
        model.base_model.set_adapter(active)
    if active:
        assert_same_step(ours, plain, x())
    with torch.no_grad():
        for _ in range(2):
            close(ours.eval()(x()), plain.eval()(x()))


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
        model.add_adapter("other", config(r=2, random_seed=9, init_weights=False))
        model.set_adapter("other")
    assert all(set(layer._fast.plans) == {"default"} for layer in layers(ours))
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
    ours = shira(target_modules=["up"])
    ours.add_adapter("other", config(target_modules=["down"]))
    shake(ours, 2)
    plain = copy.deepcopy(ours)
    fk.peft.accelerate(ours)
    for name in ("default", "other"):
        ours.set_adapter(name), plain.set_adapter(name)
        assert_same_step(ours, plain, x())


def test_positions_that_were_replaced_are_planned_again():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours(x())
    for model in (ours, plain):
        for layer in layers(model):
            layer.shira_indices["default"] = layer.shira_indices["default"].flip(1).long()
    assert_same_step(ours, plain, x())
    for model in (ours, plain):
        for layer in layers(model):
            layer.shira_indices["default"].copy_(layer.shira_indices["default"].roll(7, 1))  # in place
    assert_same_step(ours, plain, x())
    with torch.no_grad():
        close(ours.eval()(x()), plain.eval()(x()))
    layers(ours)[0].shira_indices["default"][0, 5] = 40
    with pytest.raises(ValueError, match=r"shira_indices of layer '.*blocks.0.up', adapter 'default': rows\[5\] = 40"):
        ours(x())


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


def test_adapter_names_are_ignored_as_in_peft():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    close(ours(x(3, IN), adapter_names=["default"] * 3), plain(x(3, IN), adapter_names=["default"] * 3))


def test_the_sparse_tensor_of_peft():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for layer, other in zip(layers(ours), layers(plain), strict=True):
        got, want = (which.get_delta_weight("default") for which in (layer, other))
        assert got.is_sparse and got.requires_grad and torch.equal(got.to_dense(), want.to_dense())
    layer.shira_indices["default"][0, 0] = -1
    with pytest.raises(ValueError, match=r"rows\[0\] = -1"):
        layer.get_delta_weight("default")


def test_no_weight_is_copied():
    """Training reads W where it is, and makes nothing of its size."""

    class Storages(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            dense = (t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_sparse)
            self.made += [tensor.untyped_storage() for tensor in dense]
            return out

    ours, plain = twins()
    fk.peft.accelerate(ours)
    largest = []
    for model in (ours, plain):
        layer = layers(model)[0]
        own = layer.base_layer.weight.untyped_storage()
        inputs = x(3, IN).requires_grad_()
        with Storages() as storages:
            layer(inputs).sum().backward()
        largest.append(max(made.nbytes() for made in storages.made if made.data_ptr() != own.data_ptr()))
        assert storages.made
    assert largest[0] < own.nbytes() <= largest[1]


# ---- files --------------------------------------------------------------------------------------------------------


def test_save_here_load_in_plain_peft_and_back(tmp_path):
    from safetensors.torch import load_file

    ours, plain = two()
    fk.peft.accelerate(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    for folder in (".", "other"):
        a, b = (load_file(tmp_path / name / folder / "adapter_model.safetensors") for name in ("ours", "plain"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert sum(key.endswith("shira_indices") for key in a) == 4
    want = plain.eval()(x())
    loaded = PeftModel.from_pretrained(Tiny(), tmp_path / "ours")
    assert type(layers(loaded)[0]) is PeftShiraLinear
    close(loaded(x()), want)
    fk.peft.accelerate(loaded)
    close(loaded(x()), want)
    loaded.load_adapter(tmp_path / "ours" / "other", "other")  # in plain PEFT, into a fast model
    loaded.set_adapter("other"), plain.set_adapter("other")
    close(loaded(x()), plain(x()))


def test_state_dicts_load_into_fast_layers():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    shake(plain, 9)
    ours.load_state_dict(plain.state_dict())
    assert_same_step(ours, plain, x())


def test_a_single_layer_is_a_model():
    ours, plain = twins()
    report = fk.peft.accelerate(layers(ours)[0])
    assert report.swapped == [""]
    assert type(layers(ours)[1]) is PeftShiraLinear
    assert_same_step(ours, plain, x())


def test_mixed_models():
    """PeftMixedModel puts SHiRA beside other methods in one model."""
    from peft import LoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Tiny(), config(target_modules=["up"], init_weights=False), mixed=True)
        model.add_adapter("lora", LoraConfig(target_modules=["down"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    plain = copy.deepcopy(model)
    report = fk.peft.accelerate(model)
    assert len(report.swapped) == 2 and len(report.skipped) == 2
    close(model(x()), plain(x()))
