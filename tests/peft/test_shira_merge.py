# SPDX-License-Identifier: Apache-2.0
"""Merging SHiRA: only its entries are written, in place, and what comes back is the base weight, bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import frodkernels as fk
from frodkernels.peft import shira_layer
from tests.peft.models import Tiny, all_equal, close, x
from tests.peft.shira_models import base_weights, config, layers, set_scale, shake, shira, twins, two

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def exact_weights(model, names=("default",)):
    """W + scale S + ... in float64, from a plain model of the same bits."""
    model = copy.deepcopy(model).double()
    found = []
    for layer in layers(model):
        weight = layer.get_base_layer().weight.detach().clone()
        for name in names:
            weight += layer.get_delta_weight(name).detach()
        found.append(weight)
    return found


def errors(weights, exact):
    return [float((a.double() - b).norm()) for a, b in zip(weights, exact, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.7, 0.0])
def test_merge_and_unmerge_bit_for_bit(dtype, safe, scale):
    ours, plain = twins(Tiny().to(dtype))
    set_scale(ours, "default", scale), set_scale(plain, "default", scale)
    exact = exact_weights(plain)
    fk.peft.accelerate(ours)
    before, addresses = base_weights(ours), [layer.base_layer.weight.data_ptr() for layer in layers(ours)]
    ours.merge_adapter(safe_merge=safe), plain.merge_adapter(safe_merge=safe)
    merged = base_weights(ours)
    assert all_equal(merged, before) == (scale == 0) and all(layer.merged for layer in layers(ours))
    assert addresses == [layer.base_layer.weight.data_ptr() for layer in layers(ours)]
    for layer, old, new in zip(layers(ours), before, merged, strict=True):
        rows, cols = layer.shira_indices["default"].long()
        elsewhere = torch.ones_like(old, dtype=torch.bool)
        elsewhere[rows, cols] = False
        assert torch.equal(old[elsewhere], new[elsewhere])
    for mine, pefts in zip(errors(merged, exact), errors(base_weights(plain), exact), strict=True):
        assert mine <= pefts * (1 + 1e-6)
    close(ours(x(dtype=dtype)), plain(x(dtype=dtype)), 1e-5 if dtype.itemsize > 2 else 3e-2)
    ours.unmerge_adapter(), plain.unmerge_adapter()
    assert all_equal(base_weights(ours), before)
    assert all("_merged_from" not in layer.__dict__ and not layer.merged for layer in layers(ours))
    if dtype == torch.bfloat16 and scale != 0:
        assert not all_equal(base_weights(plain), before)  # what this is for


def test_merged_is_the_forward():
    ours = shira()
    fk.peft.accelerate(ours)
    want = ours(x())
    ours.merge_adapter()
    assert fk.peft.accelerate(ours).already
    close(ours(x()), want)
    ours.unmerge_adapter()
    assert torch.equal(ours(x()), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [["default", "other"], ["other", "default"]])
def test_several_merges_are_undone_in_reverse(dtype, names):
    ours, plain = two(Tiny().to(dtype))
    exact = exact_weights(plain, names)
    fk.peft.accelerate(ours)
    states = [base_weights(ours)]
    with pytest.warns(UserWarning, match=f"Already following adapters were merged {names[0]}"):
        for name in names:
            ours.merge_adapter([name])
            states.append(base_weights(ours))
    plain.merge_adapter(names)
    assert all(layer.merged_adapters == names for layer in layers(ours))
    for mine, pefts in zip(errors(states[-1], exact), errors(base_weights(plain), exact), strict=True):
        assert mine <= pefts * (1 + 1e-6)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        ours.merge_adapter([names[1]])
    layer = layers(ours)[0]
    layer._unmerge_last()
    assert torch.equal(layer.base_layer.weight, states[1][0]) and layer.merged_adapters == names[:1]
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), states[0])
    with pytest.warns(UserWarning, match="Already unmerged"):
        ours.unmerge_adapter()
    ours.merge_adapter(names)  # in one call
    assert all_equal(base_weights(ours), states[-1])
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), states[0])


def test_adapter_names_that_a_layer_does_not_have():
    ours = shira(target_modules=["up"])
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter(["nobody"])
    assert all_equal(base_weights(ours), before) and not layers(ours)[0].merged
    with pytest.raises(TypeError, match="list of strings"):
        ours.merge_adapter("default")


def test_merge_and_unload():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    a, b = ours.merge_and_unload(), plain.merge_and_unload()
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        close(p, q)
    close(a(x()), b(x()))


@pytest.mark.parametrize("where", ["entries", "weight"])
def test_safe_merge_refuses_what_is_not_finite(where):
    ours, plain = two()
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        with torch.no_grad():
            if where == "entries":
                layers(model)[0].shira_weight["other"][5] = float("nan")
            else:
                layers(model)[0].base_layer.weight[3, 3] = float("inf")
    before, culprit = base_weights(ours), "other" if where == "entries" else "default"
    for model in (ours, plain):
        with pytest.raises(ValueError, match=f"NaNs detected in the merged weights. The adapter {culprit} seems"):
            model.merge_adapter(["default", "other"], safe_merge=True)
    assert all_equal(base_weights(ours), before) and not layers(ours)[0].merged  # PEFT has merged "default" by then
    ours.merge_adapter(["other"])
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)


def test_safe_merge_sees_an_overflow():
    ours = shira(Tiny().half(), r=2)
    fk.peft.accelerate(ours)
    layer = layers(ours)[0]
    before = base_weights(ours)
    with torch.no_grad():
        layer.shira_weight["default"][0] = 1e5  # finite in float32
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert all_equal(base_weights(ours), before) and not layer.merged


def test_a_merge_that_fails_changes_nothing(monkeypatch):
    ours, _ = two()
    fk.peft.accelerate(ours)
    layer, before = layers(ours)[0], base_weights(ours)
    good = layer.shira_indices["other"].clone()
    layer.shira_indices["other"][1, 2] = 24
    with pytest.raises(ValueError, match=r"shira_indices of layer .*, adapter 'other': cols\[2\] = 24"):
        layer.merge(adapter_names=["default", "other"])
    assert all_equal(base_weights(ours), before) and not layer.merged
    layer.shira_indices["other"] = good
    original, calls = shira_layer.add, []

    def fail(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("late")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shira_layer, "add", fail)
        with pytest.raises(RuntimeError, match="late"):
            layer.merge(adapter_names=["default", "other"])
    assert all_equal(base_weights(ours), before) and not layer.merged and "_merged_from" not in layer.__dict__


def test_disabling_a_merged_model_unmerges():
    ours, plain = twins(Tiny().bfloat16())
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter()
    base = copy.deepcopy(plain).unload()
    inputs = x(dtype=torch.bfloat16)
    with ours.disable_adapter():
        assert torch.equal(ours(inputs), base(inputs))
    assert all_equal(base_weights(ours), before)
    close(ours(inputs), plain(inputs), 3e-2)


def test_restore_of_a_merged_model_unmerges_first():
    ours, plain = twins(Tiny().bfloat16())
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter()
    fk.peft.restore(ours)
    assert all(not layer.merged and layer.__dict__.keys() == layers(plain)[0].__dict__.keys() for layer in layers(ours))
    assert all_equal(base_weights(ours), before)
    inputs = x(dtype=torch.bfloat16)
    assert torch.equal(ours(inputs), plain(inputs))


def test_merged_by_plain_peft_before(caplog):
    """There are no entries to give back: PEFT's arithmetic below what was merged on top of it."""
    ours, plain = two()
    for model in (ours, plain):
        model.merge_adapter(["default"])
    half = base_weights(ours)
    assert len(fk.peft.accelerate(ours).swapped) == 4
    assert torch.equal(ours(x()), plain(x()))
    ours.merge_adapter(["other"]), plain.merge_adapter(["other"])
    close(ours(x()), plain(x()))
    twin = copy.deepcopy(ours)
    fk.peft.restore(twin)  # back to what PEFT had merged
    assert all_equal(base_weights(twin), half) and all(layer.merged_adapters == ["default"] for layer in layers(twin))
    ours.unmerge_adapter(), plain.unmerge_adapter()
    assert not any(layer.merged for layer in layers(ours)) and not caplog.text
    for a, b in zip(base_weights(ours), base_weights(plain), strict=True):
        close(a, b)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_merged_model(how):
    ours, _ = two(Tiny().bfloat16())
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter(["default", "other"])
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert all_equal(base_weights(twin), base_weights(ours))
    twin.unmerge_adapter()
    assert all_equal(base_weights(twin), before)
    assert not all_equal(base_weights(ours), before)
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)


def test_casting_and_moving_a_merged_model(caplog):
    ours, plain = two()
    fk.peft.accelerate(ours)
    before = base_weights(copy.deepcopy(plain).bfloat16())
    ours.merge_adapter(["default", "other"])
    ours.bfloat16()
    assert layers(ours)[0]._merged_from[0].old.dtype == torch.bfloat16
    ours.float()
    ours.unmerge_adapter()  # as if nothing had been merged when it was cast
    assert all_equal(base_weights(ours), [w.float() for w in before])
    ours.merge_adapter(["default", "other"])
    for layer in layers(ours):
        layer.base_layer.double()  # not by way of the layer
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), [w.double() for w in before]) and not caplog.text
    ours.merge_adapter()
    ours.to("meta")
    assert all("_merged_from" not in layer.__dict__ for layer in layers(ours))


def test_merged_entries_that_somebody_overwrote_are_not_undone(caplog):
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        model.merge_adapter()
        state = model.state_dict()
        for key in state:
            if key.endswith("base_layer.weight"):
                state[key] = state[key] + 0.5
        model.load_state_dict(state)
        model.double().float()  # moves do not make it ours
        model.unmerge_adapter()
    assert caplog.text.count("was overwritten while adapter 'default' was merged") == 4
    assert "base_model.model.blocks.1.down" in caplog.text
    for a, b in zip(base_weights(ours), base_weights(plain), strict=True):
        close(a, b)


def test_other_entries_may_change_while_merged(caplog):
    ours = shira()
    fk.peft.accelerate(ours)
    layer = layers(ours)[0]
    rows, cols = layer.shira_indices["default"].long()
    want = layer.base_layer.weight.detach().clone()
    free = torch.ones_like(want, dtype=torch.bool)
    free[rows, cols] = False
    layer.merge()
    with torch.no_grad():
        layer.base_layer.weight[free] += 1
    layer.unmerge()
    want[free] += 1
    assert torch.equal(layer.base_layer.weight, want) and not caplog.text


def test_what_changes_in_between_does_not_change_what_comes_back():
    """Entries, scales and positions as they were then, and adapters that are gone since."""
    ours, _ = two()
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter(["default", "other"])
    shake(ours, 9), set_scale(ours, "default", 3.0)
    for layer in layers(ours):
        layer.shira_indices["default"] = layer.shira_indices["default"].flip(1)
        layer.delete_adapter("other")
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)


def test_merge_under_autocast_and_inference_mode():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    plain.merge_adapter()
    for inference in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(inference):
            ours.merge_adapter()
        for a, b in zip(base_weights(ours), base_weights(plain), strict=True):
            close(a, b)
        with torch.autocast("cpu", torch.bfloat16):
            ours.unmerge_adapter()
        assert all_equal(base_weights(ours), before)


def test_weights_of_any_strides():
    ours, plain = twins()
    for model in (ours, plain):
        for layer in layers(model):
            layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().t().contiguous().t())
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    close(ours(x()), plain(x()))
    ours.merge_adapter(), plain.merge_adapter()
    for layer, other in zip(layers(ours), layers(plain), strict=True):
        close(layer.base_layer.weight, other.base_layer.weight)
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)


def test_the_saved_state_is_pefts():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours.merge_adapter(), plain.merge_adapter()
    a, b = ours.state_dict(), plain.state_dict()
    assert list(a) == list(b)
    for key in a:
        close(a[key], b[key])


def test_setting_an_adapter_unmerges_as_in_peft():
    ours, plain = two()
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        ours.set_adapter("other")
    assert all_equal(base_weights(ours), before)
    plain.set_adapter("other")
    close(ours(x()), plain(x()))


def test_adapters_that_are_loaded_while_another_is_merged(tmp_path):
    two()[0].save_pretrained(tmp_path)
    ours = shira()
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter()
    with fk.peft.enabled():
        ours.load_adapter(tmp_path / "other", "loaded")
        ours.add_adapter("added", config(r=1))
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)
