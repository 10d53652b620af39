# SPDX-License-Identifier: Apache-2.0
"""switch(): another adapter merged in the place of those that are."""

import copy
import random
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

import frodkernels as fk
from tests.peft.hra_models import two as two_hra
from tests.peft.models import Tiny, all_equal, bert, close, tokens, x
from tests.peft.shira_models import base_weights, config, layers, set_scale, shake, shira, two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_of_switches_are_exact(dtype):
    ours, plain = two(Tiny().to(dtype))
    fk.peft.accelerate(ours)
    before, addresses = base_weights(ours), [layer.base_layer.weight.data_ptr() for layer in layers(ours)]
    merged = {}
    for name in ("other", "default", "default", "other", "default", "other"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fk.peft.switch(ours, name)
        assert ours.active_adapter == name and all(layer.merged_adapters == [name] for layer in layers(ours))
        assert all_equal(base_weights(ours), merged.setdefault(name, base_weights(ours)))
        plain.set_adapter(name)
        inputs = x(dtype=dtype)
        close(ours(inputs), plain(inputs), 1e-5 if dtype == torch.float32 else 3e-2)
    assert addresses == [layer.base_layer.weight.data_ptr() for layer in layers(ours)]
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)


def test_from_several_merged_adapters_and_from_none():
    ours, plain = two()
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter(["default", "other"])
    fk.peft.switch(ours, "default")
    close(ours(x()), plain(x()))
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)
    fk.peft.switch(ours, "default")
    close(ours(x()), plain(x()))


def test_private_modules_switch_along():
    ours = shira(bert(), target_modules=["query"], modules_to_save=["classifier"])
    ours.add_adapter("other", config(target_modules=["key"], modules_to_save=["classifier"]))
    shake(ours, 2)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "modules_to_save.other" in name:
                parameter.add_(0.1)
    plain = copy.deepcopy(ours)
    fk.peft.accelerate(ours)
    for name in ("other", "default"):
        fk.peft.switch(ours, name)
        plain.set_adapter(name)
        close(ours.eval()(tokens()).logits, plain.eval()(tokens()).logits)


def state_of(model):
    return (
        base_weights(model),
        [list(layer.merged_adapters) for layer in layers(model)],
        [p.requires_grad for p in model.parameters()],
        model.active_adapter,
        model.base_model.active_adapters,
    )


@pytest.mark.parametrize("merged", [[], ["default"], ["other", "default"]])
@pytest.mark.parametrize("active", [["default"], ["default", "other"]])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_switch_that_fails_changes_nothing(merged, active, frozen):
    ours, _ = two()
    ours.add_adapter("broken", config(r=1, init_weights=False))
    fk.peft.accelerate(ours)
    ours.base_model.set_adapter(active)
    if frozen:
        ours.requires_grad_(False)
    if merged:
        ours.merge_adapter(merged)
    before, want = state_of(ours), ours(x())
    third = layers(ours)[2]
    with torch.no_grad():
        third.shira_weight["broken"][0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        fk.peft.switch(ours, "broken", safe_merge=True)
    third.shira_indices["broken"][0, 0] = 40
    with pytest.raises(ValueError, match=r"blocks.1.up', adapter 'broken': rows\[0\] = 40"):
        fk.peft.switch(ours, "broken")
    with pytest.raises(ValueError, match="'nobody' is none of the model's adapters"):
        fk.peft.switch(ours, "nobody")
    after = state_of(ours)
    assert all_equal(after[0], before[0]) and after[1:] == before[1:]
    assert torch.equal(ours(x()), want)


def test_models():
    with pytest.raises(ValueError, match="model must be a PeftModel, got Tiny"):
        fk.peft.switch(Tiny(), "default")
    ours, plain = two_hra()
    fk.peft.accelerate(ours)
    lora = get_peft_model(Tiny(), LoraConfig(target_modules=["up"], init_lora_weights=False))
    lora.add_adapter("other", LoraConfig(target_modules=["up"], init_lora_weights=False))
    for model, reference in ((ours, plain), (lora, copy.deepcopy(lora)), (two()[0], two()[1])):
        for name in ("other", "default"):
            fk.peft.switch(model, name)
            reference.set_adapter(name)
            close(model(x()), reference(x()))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_sequence_of_merges_comes_back(seed, dtype):
    """Merges on top of each other, switches, training and copies in between: never another base weight."""
    rng = random.Random(seed)
    ours, _ = two(Tiny(blocks=1).to(dtype))
    ours.add_adapter("third", config(r=5, random_seed=3, init_weights=False))  # the first one's positions, and more
    fk.peft.accelerate(ours)
    before, names = base_weights(ours), ["default", "other", "third"]
    done = []

    def replan():
        for layer in layers(ours):
            layer.shira_indices["other"] = layer.shira_indices["other"].roll(rng.randrange(9), 1)

    steps = {
        "merge": lambda: ours.merge_adapter(rng.sample(names, rng.randint(1, 3)), safe_merge=rng.random() < 0.3),
        "switch": lambda: fk.peft.switch(ours, rng.choice(names)),
        "train": lambda: shake(ours, rng.randrange(99)),
        "scale": lambda: set_scale(ours, rng.choice(names), rng.choice([0.0, 1.0, -0.5, 3.0])),
        "positions": replan,
        "accelerate": lambda: fk.peft.accelerate(ours),
        "forward": lambda: ours(x(dtype=dtype)),
        "last": lambda: [layer._unmerge_last() for layer in layers(ours) if layer.merged],
        "unmerge": lambda: ours.unmerge_adapter(),
    }
    for _ in range(25):
        done.append(rng.choice(list(steps)))
        steps[done[-1]]()
        if rng.random() < 0.1:
            ours = copy.deepcopy(ours)
        assert all(layer.merged == ("_merged_from" in layer.__dict__) for layer in layers(ours)), done
        if not any(layer.merged for layer in layers(ours)):
            assert all_equal(base_weights(ours), before), done
    fk.peft.restore(ours)
    assert all_equal(base_weights(ours), before), done
