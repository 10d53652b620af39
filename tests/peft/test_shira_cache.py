# SPDX-License-Identifier: Apache-2.0
"""In evaluation a swapped SHiRA model equals PEFT's after every way there is to change what its weight is made of."""

import pytest
import torch

import frodkernels as fk
from tests.peft.models import IN, close, x
from tests.peft.shira_models import config, layers, set_scale, shake, twins, two


def both(ours, plain):
    """Building and cached; the same bits each time."""
    with torch.no_grad():
        for shape in ((2, IN), (64, IN)):
            first = ours(x(*shape))
            close(first, plain(x(*shape)))
            assert torch.equal(ours(x(*shape)), first)


def weights(model):
    """The cached weights, None where there is none."""
    entries = [layer._fast.cache._entry for layer in layers(model)]
    return [None if entry is None else entry[1] for entry in entries]


@pytest.fixture
def pair():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours.eval(), plain.eval()
    both(ours, plain)
    assert all(weight is not None for weight in weights(ours))
    return ours, plain


def optimiser_step(model):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x()).square().sum().backward()  # still in eval mode
    optimiser.step()


def data_copy(model):
    for layer in layers(model):
        layer.shira_weight["default"].data.copy_(torch.arange(256) / 700.0)


def load(model):
    model.load_state_dict({k: v * 1.5 if "shira" in k else v for k, v in model.state_dict().items()})


def load_assigned(model):
    model.load_state_dict({k: v * 1.5 if "shira" in k else v for k, v in model.state_dict().items()}, assign=True)


def load_base(model):
    model.load_state_dict({k: v * 1.5 if "base_layer" in k else v for k, v in model.state_dict().items()})


def base_in_place(model):
    with torch.no_grad():
        layers(model)[0].base_layer.weight.mul_(1.3)


def base_replaced(model):
    layers(model)[0].base_layer.weight = torch.nn.Parameter(layers(model)[0].base_layer.weight.detach() * 1.3)


def base_data_replaced(model):
    layers(model)[0].base_layer.weight.data = layers(model)[0].base_layer.weight.data * 1.3


def bias(model):
    for layer in layers(model):
        if layer.base_layer.bias is not None:
            layer.base_layer.bias.data.add_(1)


def replaced(model):
    for layer in layers(model):
        layer.shira_weight["default"] = torch.nn.Parameter(layer.shira_weight["default"].detach() * 2)


def positions(model):
    for layer in layers(model):
        layer.shira_indices["default"] = layer.shira_indices["default"].roll(3, 1)


def positions_in_place(model):
    layers(model)[0].shira_indices["default"].copy_(layers(model)[0].shira_indices["default"].flip(1))


def scaled(model):
    set_scale(model, "default", -0.4)


def train_and_back(model):
    model.train()
    optimiser_step(model)
    model.eval()


def cast_and_back(model):
    model.double()
    shake(model, 22)
    model.float()


def merged_and_back(model):
    model.merge_adapter()
    model(x())
    shake(model, 23)
    model.unmerge_adapter()
    for layer in layers(model):  # PEFT has subtracted other entries than it added
        layer.base_layer.weight.data.copy_(torch.ones_like(layer.base_layer.weight) / 7)


CHANGES = [
    optimiser_step, data_copy, load, load_assigned, load_base, base_in_place, base_replaced, base_data_replaced, bias,
    replaced, positions, positions_in_place, scaled, train_and_back, cast_and_back, merged_and_back,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_after(pair, change):
    ours, plain = pair
    for model in pair:
        change(model)
    both(ours, plain)
    assert all(weight is not None for weight in weights(ours))


def test_adapter_switches():
    ours, plain = two()
    fk.peft.accelerate(ours)
    ours.eval(), plain.eval()
    for name in ("other", "default", "other"):
        ours.set_adapter(name), plain.set_adapter(name)
        both(ours, plain)
    for model in (ours, plain):
        model.base_model.set_adapter(["default", "other"])
    both(ours, plain)
    with ours.disable_adapter(), plain.disable_adapter():
        both(ours, plain)
    both(ours, plain)
    for model in (ours, plain):
        model.delete_adapter("default")
    both(ours, plain)


def test_kept_by_eval_dropped_by_train(pair):
    ours, _ = pair
    known = weights(ours)
    ours.eval()
    both(*pair)
    assert all(a is b for a, b in zip(known, weights(ours), strict=True))
    ours.train()
    assert weights(ours) == [None] * 4
    with torch.no_grad():
        ours(x())  # nor is there one in training
    assert weights(ours) == [None] * 4


def test_merged_layers_keep_none(pair):
    ours, _ = pair
    ours.merge_adapter()
    assert weights(ours) == [None] * 4
    with torch.no_grad():
        ours(x())
    assert weights(ours) == [None] * 4


def test_a_gradient_never_meets_the_cache(pair):
    ours, plain = pair
    for model in pair:
        inputs = x().requires_grad_()
        model(inputs).square().sum().backward()
        model.grad_of_x = inputs.grad
    close(ours.grad_of_x, plain.grad_of_x)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            close(a.grad, b.grad)


def test_writing_to_the_base_behind_autograd_needs_invalidate(pair):
    ours, plain = pair
    for model in pair:
        layers(model)[0].base_layer.weight.data.mul_(1.3)
    fk.peft.invalidate(ours)
    both(ours, plain)


def test_off_and_bounded():
    ours, plain = twins()
    one = 4 * 24 * 40
    for budget, count in ((False, 0), (None, 0), (True, 4), (2 * one, 2), (one, 1), (0, 0)):
        fk.peft.accelerate(ours, eval_cache=budget)  # None: what an earlier call said
        both(ours.eval(), plain.eval())
        assert sum(weight is not None for weight in weights(ours)) == count
        assert layers(ours)[0]._fast.cache.budget.used == count * one
    assert len({id(layer._fast.cache.budget) for layer in layers(ours)}) == 1


def test_autocast_caches_its_own_dtype(pair):
    ours, plain = pair
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, want = ours(x()), plain(x())
    close(got, want, 3e-2)
    assert all(weight.dtype == torch.bfloat16 for weight in weights(ours))
    both(ours, plain)


def test_functional_call_and_inference_mode(pair):
    ours, plain = pair
    parameters = {k: v.detach() * 1.4 for k, v in ours.named_parameters()}
    with torch.no_grad():
        for _ in range(3):
            got = torch.func.functional_call(ours, parameters, (x(),))
            close(got, torch.func.functional_call(plain, parameters, (x(),)))
    fk.peft.invalidate(ours)
    with torch.inference_mode():
        for _ in range(3):
            close(ours(x()), plain(x()))
    both(ours, plain)


def test_adapters_that_come_later():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        torch.manual_seed(3)
        model.add_adapter("other", config(r=2, random_seed=6, init_weights=False))
        model.set_adapter("other")
        model.eval()
    both(ours, plain)
