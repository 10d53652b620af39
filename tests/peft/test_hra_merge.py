# SPDX-License-Identifier: Apache-2.0
"""Merging HRA: rounded once, and what comes back is the base weight, bit for bit."""

import copy
import io
import pickle

import pytest
import torch

import frodkernels as fk
from tests.peft.hra_models import Images, base_weights, hra, images, layers, shake, twins, two
from tests.peft.models import IN, Tiny, all_equal, close, x

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODELS = [(Tiny, x), (Images, images)]


def exact_weights(model, names=("default",)):
    """W D_1 D_2 ... in float64, from a plain model of the same bits."""
    model = copy.deepcopy(model).double()
    found = []
    for layer in layers(model):
        weight = layer.get_base_layer().weight.detach()
        matrix = weight.flatten(1)
        for name in names:
            matrix = matrix @ layer.get_delta_weight(name).detach()
        found.append(matrix.view_as(weight))
    return found


def errors(weights, exact):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(weights, exact, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("make, inputs", MODELS)
def test_merge_and_unmerge_bit_for_bit(dtype, safe, make, inputs):
    ours, plain = twins(make().to(dtype))
    exact = exact_weights(plain)
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter(safe_merge=safe), plain.merge_adapter(safe_merge=safe)
    merged = base_weights(ours)
    assert not all_equal(merged, before) and all(layer.merged for layer in layers(ours))
    floor = 1e-15 if dtype == torch.float64 else 0.0  # where "exact" is PEFT's own arithmetic
    for mine, pefts in zip(errors(merged, exact), errors(base_weights(plain), exact), strict=True):
        assert mine <= pefts + floor
    if dtype != torch.float64:  # rounded once
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(merged, exact, strict=True))
    close(ours(inputs(dtype=dtype)), plain(inputs(dtype=dtype)), 1e-5 if dtype.itemsize > 2 else 3e-2)
    ours.unmerge_adapter(), plain.unmerge_adapter()
    assert all_equal(base_weights(ours), before)
    assert all("_merged_from" not in layer.__dict__ and not layer.merged for layer in layers(ours))
    if dtype == torch.bfloat16:
        assert not all_equal(base_weights(plain), before)  # what this is for


def test_merged_is_the_forward():
    for make, inputs in MODELS:
        ours = hra(make())
        fk.peft.accelerate(ours)
        want = ours(inputs())
        ours.merge_adapter()
        assert fk.peft.accelerate(ours).already
        close(ours(inputs()), want)
        ours.unmerge_adapter()
        assert torch.equal(ours(inputs()), want)


@pytest.mark.parametrize("make, inputs", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_two_adapters(make, inputs, dtype):
    ours, plain = two(make().to(dtype), second=dict(apply_GS=True, init_weights=False))
    exact = exact_weights(plain, ("default", "other"))
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter(["default", "other"])
    together = base_weights(ours)
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)
    for model in (ours, plain):
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="Already following adapters were merged default"):
            model.merge_adapter(["default", "other"])
    assert all(layer.merged_adapters == ["default", "other"] for layer in layers(ours))
    assert all_equal(base_weights(ours), together)  # from the base weight again: rounded once
    for mine, pefts in zip(errors(together, exact), errors(base_weights(plain), exact), strict=True):
        assert mine <= pefts
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        ours.merge_adapter(["other"])
    assert all_equal(base_weights(ours), together)
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        ours.unmerge_adapter()


def test_a_further_merge_takes_the_directions_that_were_merged():
    """Not those that training made of them since."""
    ours, plain = two()
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    exact = exact_weights(plain, ("default", "other"))
    ours.merge_adapter(["default"])
    with torch.no_grad():
        for layer in layers(ours):
            layer.hra_u["default"].mul_(torch.randn(layer.hra_u["default"].shape))
    ours.merge_adapter(["other"])
    assert max(errors(base_weights(ours), exact)) < 1e-6
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)


def test_adapter_names_that_a_layer_does_not_have():
    ours = hra(target_modules=["up"])
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter(["nobody"])
    assert all_equal(base_weights(ours), before) and not layers(ours)[0].merged
    with pytest.raises(TypeError, match="list of strings"):
        ours.merge_adapter("default")


def test_merge_and_unload():
    for make, inputs in MODELS:
        ours, plain = twins(make())
        fk.peft.accelerate(ours)
        a, b = ours.merge_and_unload(), plain.merge_and_unload()
        assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            close(p, q)
        close(a(inputs()), b(inputs()))


@pytest.mark.parametrize("make", [Tiny, Images])
def test_safe_merge_refuses_what_is_not_finite(make):
    ours, _ = two(make())
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    with torch.no_grad():
        layers(ours)[0].hra_u["other"][3, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter other seems"):
        ours.merge_adapter(["default", "other"], safe_merge=True)
    assert all_equal(base_weights(ours), before) and not layers(ours)[0].merged  # PEFT has merged "default" by then
    ours.merge_adapter(["other"])
    assert base_weights(ours)[0].isnan().any()
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)


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
    for make, inputs in MODELS:
        ours, plain = twins(make().bfloat16())
        fk.peft.accelerate(ours)
        before = base_weights(ours)
        ours.merge_adapter()
        fk.peft.restore(ours)
        assert all(not layer.merged and "_merged_from" not in layer.__dict__ for layer in layers(ours))
        assert all_equal(base_weights(ours), before)
        inputs = inputs(dtype=torch.bfloat16)
        assert torch.equal(ours(inputs), plain(inputs))


@pytest.mark.parametrize("make, inputs", MODELS)
def test_merged_by_plain_peft_before(make, inputs):
    """There is no weight to give back: PEFT's arithmetic, whatever was merged on top of it."""
    ours, plain = two(make())
    for model in (ours, plain):
        model.merge_adapter(["default"])
    half = base_weights(ours)
    assert len(fk.peft.accelerate(ours).swapped) == len(half)
    assert torch.equal(ours(inputs()), plain(inputs()))
    ours.merge_adapter(["other"]), plain.merge_adapter(["other"])
    close(ours(inputs()), plain(inputs()))
    twin = copy.deepcopy(ours)
    fk.peft.restore(twin)  # back to what PEFT had merged
    assert all_equal(base_weights(twin), half) and all(layer.merged_adapters == ["default"] for layer in layers(twin))
    ours.unmerge_adapter(), plain.unmerge_adapter()
    assert not any(layer.merged for layer in layers(ours))
    for a, b in zip(base_weights(ours), base_weights(plain), strict=True):
        close(a, b)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_merged_model(how):
    ours = hra(Tiny().bfloat16())
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter()
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


def test_casting_and_moving_a_merged_model():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    before = base_weights(plain.bfloat16())
    ours.merge_adapter()
    ours.bfloat16()
    assert layers(ours)[0]._merged_from.weight.dtype == torch.bfloat16
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)
    ours.merge_adapter()
    ours.to("meta")
    assert all("_merged_from" not in layer.__dict__ for layer in layers(ours))


def test_a_merged_weight_that_somebody_overwrote_is_not_undone(caplog):
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
    assert caplog.text.count("was overwritten") == 4
    for a, b in zip(base_weights(ours), base_weights(plain), strict=True):
        close(a, b)


def test_training_in_between_does_not_change_what_comes_back():
    ours, _ = twins()
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    ours.merge_adapter()
    shake(ours, 9)
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)


def test_merge_under_autocast_and_inference_mode():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    exact, before = exact_weights(plain), base_weights(ours)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours.merge_adapter()
    assert max(errors(base_weights(ours), exact)) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)


def test_channels_last_weights():
    ours, plain = twins(Images())
    ours.to(memory_format=torch.channels_last)
    fk.peft.accelerate(ours)
    before = base_weights(ours)
    close(ours(images()), plain(images()))
    ours.merge_adapter(), plain.merge_adapter()
    for layer, other in zip(layers(ours), layers(plain), strict=True):
        weight = layer.base_layer.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        close(weight, other.base_layer.weight)
    ours.unmerge_adapter()
    assert all_equal(base_weights(ours), before)


def test_the_saved_state_is_pefts():
    """What is saved of a merged model is what PEFT saves."""
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours.merge_adapter(), plain.merge_adapter()
    a, b = ours.state_dict(), plain.state_dict()
    assert list(a) == list(b)
    for key in a:
        close(a[key], b[key])


def test_restoring_a_merged_weight_that_was_overwritten_unmerges_it():
    """By arithmetic then: what it was made from is no longer what would come back."""
    model = hra(Tiny(blocks=1))
    fk.peft.accelerate(model)
    model.base_model.merge_adapter()
    layer = next(module for module in model.modules() if hasattr(module, "hra_u"))
    with torch.no_grad():
        layer.get_base_layer().weight[0, 0] += 1e-3
    fk.peft.restore(model)
    assert not layer.merged and type(layer).__module__.startswith("peft.")


def test_several_16_bit_adapters_under_autocast_of_another_16_bits():
    model, _ = two(Tiny(blocks=1))
    model.base_model.set_adapter(["default", "other"])
    fk.peft.accelerate(model)
    for module in model.modules():
        if hasattr(module, "hra_u"):
            module.hra_u["default"].data = module.hra_u["default"].data.half()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model.base_model.model(x(4, IN))).all()
