# SPDX-License-Identifier: Apache-2.0
"""Merging is PEFT's, bit for bit; so is what comes back."""

import copy

import pytest
import torch
from peft.tuners.frod.layer import Linear as PeftFrodLinear

import frodkernels as fk
from tests.peft.models import Tiny, close, config, frod, gpt2, layers, shake, twins, x


def base_weights(model):
    return [layer.get_base_layer().weight.detach().clone() for layer in layers(model)]


def all_equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge_bit_for_bit(dtype, safe):
    ours, plain = twins(Tiny().to(dtype))
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter(safe_merge=safe), plain.merge_adapter(safe_merge=safe)
    assert not all_equal(base_weights(ours), before)
    assert all_equal(base_weights(ours), base_weights(plain))
    assert torch.equal(ours(x(dtype=dtype)), plain(x(dtype=dtype)))
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)
    assert all(layer._base_weight_before_merge is None for layer in layers(ours))


def test_merged_is_the_forward():
    ours = frod()
    fk.peft.accelerate(ours)
    want = ours(x())
    ours.merge_adapter()
    close(ours(x()), want)
    ours.unmerge_adapter()
    assert torch.equal(ours(x()), want)


def test_merging_two_adapters():
    ours = frod()
    ours.add_adapter("other", config())
    shake(ours, 2)
    plain = copy.deepcopy(ours)
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        model.merge_adapter(["default", "other"])
    assert all_equal(base_weights(ours), base_weights(plain))
    ours.unmerge_adapter(), plain.unmerge_adapter()
    assert all_equal(base_weights(ours), base_weights(plain))


def test_merge_and_unload():
    for model in (Tiny(), gpt2()):
        targets = ["up", "down"] if isinstance(model, Tiny) else ["c_attn", "c_fc"]
        ours, plain = twins(model, target_modules=targets, fan_in_fan_out=not isinstance(model, Tiny))
        fk.peft.accelerate(ours)
        a, b = ours.merge_and_unload(), plain.merge_and_unload()
        assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_safe_merge_refuses_what_is_not_finite():
    ours = frod()
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    with torch.no_grad():
        layers(ours)[0].frod_lambda_l["default"][3] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_adapter(safe_merge=True)
    assert all_equal(base_weights(ours), before)


def test_disabling_a_merged_model_unmerges():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter(), plain.merge_adapter()
    with ours.disable_adapter(), plain.disable_adapter():
        assert torch.equal(ours(x()), plain(x()))
    assert all_equal(base_weights(ours), before)
    close(ours(x()), plain(x()))


def test_restore_of_a_merged_model_unmerges_first():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter()
    fk.peft.restore(ours)
    assert all(type(layer) is PeftFrodLinear and not layer.merged for layer in layers(ours))
    assert all_equal(base_weights(ours), before)
    assert torch.equal(ours(x()), plain(x()))


def test_accelerate_and_copies_of_a_merged_model():
    ours, plain = twins()
    before = base_weights(ours)
    ours.merge_adapter(), plain.merge_adapter()
    report = fk.peft.accelerate(ours)
    assert len(report.swapped) == 4 and not report.rederived
    assert torch.equal(ours(x()), plain(x()))
    twin = copy.deepcopy(ours)  # the saved weight goes with the copy
    for model in (ours, twin):
        model.unmerge_adapter()
        assert all_equal(base_weights(model), before)
    close(twin(x()), ours(x()))


def test_merge_in_between_evaluations():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours.eval(), plain.eval()
    with torch.no_grad():
        want = plain(x())
        for _ in range(3):
            close(ours(x()), want)
        ours.merge_adapter()
        assert not layers(ours)[0]._fast.caches  # a merged layer needs no weight of ours
        close(ours(x()), want)
        shake(ours, 9), shake(plain, 9)
        ours.unmerge_adapter()
        close(ours(x()), plain(x()))
