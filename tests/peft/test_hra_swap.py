# SPDX-License-Identifier: Apache-2.0
"""accelerate and restore on HRA: what they report, what they refuse, what survives copying and moving."""

import copy
import gc
import io
import logging
import pickle
import weakref

import pytest
import torch
from peft.tuners.hra.layer import HRAConv2d, HRALinear
from torch import nn

import frodkernels as fk
from frodkernels.peft.hra_layer import FastHRAConv2d, FastHRALinear
from tests.peft.hra_models import Images, config, hra, images, layers, shake, twins, two
from tests.peft.models import IN, Tiny, close, step, x

UP = "base_model.model.blocks.0.up"


def test_report(caplog):
    model = hra()
    with caplog.at_level(logging.INFO, logger="frodkernels"):
        report = fk.peft.accelerate(model)
    assert len(report.swapped) == 4 and not report.skipped and not report.notes and not report.rederived
    lines = [record for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) == 1 and "4 layers swapped" in lines[0].getMessage()
    text = repr(report)
    assert UP in text and "40x24" in text and "'default': r 4, float32" in text and "side at 1024 tokens" in text
    assert f"{fk.backends()['householder']['cpu']['chosen']} on cpu" in text
    assert text.count("\n") == 4
    report = fk.peft.accelerate(hra(Images(), apply_GS=True, init_weights=False))
    assert "6x3x3x3" in repr(report) and "Gram-Schmidt" in repr(report) and "r more filters" in repr(report)


def test_report_names_a_backend_that_cannot_serve(monkeypatch):
    import frodkernels.peft.report as report

    def refuse(op, device):
        raise RuntimeError("asked for but missing")

    model = hra()
    with monkeypatch.context() as patch:
        patch.setattr(report, "select", refuse)
        assert "nothing (asked for but missing)" in repr(fk.peft.accelerate(model))


def test_idempotent():
    model = hra()
    fk.peft.accelerate(model)
    report = fk.peft.accelerate(model, eval_cache=0)
    assert not report.swapped and len(report.already) == 4
    fk.peft.invalidate(model)


def test_no_new_state():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours(x()).sum().backward()
    for names in ("named_modules", "named_parameters", "named_buffers"):
        assert list(dict(getattr(ours, names)())) == list(dict(getattr(plain, names)()))
    assert list(ours.state_dict()) == list(plain.state_dict())
    for layer, other in zip(layers(ours), layers(plain), strict=True):
        assert layer.__dict__.keys() == other.__dict__.keys()


def test_subclasses_and_what_cannot_be_swapped():
    class Mine(HRALinear):
        pass

    model = hra(Tiny(blocks=3))
    first, second, third, fourth, *_ = layers(model)
    first.__class__ = Mine
    second.forward = lambda inputs: inputs
    third.hra_u["default"] = nn.Parameter(third.hra_u["default"].detach().to("meta"))
    fourth.base_layer = layers(hra())[1]
    report = fk.peft.accelerate(model)
    reasons = list(report.skipped.values())
    assert reasons[0] == "subclass Mine" and "overridden" in reasons[1] and "meta" in reasons[2]
    assert "another adapter" in reasons[3] and len(report.swapped) == 3  # two more, and the nested one


def test_convolutions_that_cannot_be_swapped():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = hra(Images())
    first, second = layers(model)
    first.base_layer.__class__ = Standardised
    second.base_layer.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    reasons = list(fk.peft.accelerate(model).skipped.values())
    assert "Standardised has a forward of its own" in reasons[0] and "quantised" in reasons[1]


def test_more_columns_than_entries():
    """A chain of any length is one; a Gram-Schmidt basis has no more columns than entries."""
    ours, plain = twins(r=26)
    assert len(fk.peft.accelerate(ours).swapped) == 4
    close(ours(x()), plain(x()))
    report = fk.peft.accelerate(hra(r=26, apply_GS=True, init_weights=False))
    assert len(report.swapped) == 2 and "apply_GS with more columns" in report.skipped[UP]


def test_restore():
    for make, inputs, classes in ((Tiny, x, {HRALinear}), (Images, images, {HRAConv2d})):
        ours, plain = twins(make())
        fk.peft.accelerate(ours)
        ours(inputs())
        fk.peft.restore(ours)
        assert {type(layer) for layer in layers(ours)} == classes
        assert torch.equal(ours(inputs()), plain(inputs()))
        fk.peft.restore(ours)  # nothing to do


def test_accelerate_hooks_follow_the_class():
    """Hugging Face's accelerate stores the bound forward it wraps: it must become the fast one, and go back."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = hra()
    layer = layers(model)[0]
    add_hook_to_module(layer, ModelHook())
    want = model(x())
    assert len(fk.peft.accelerate(model).swapped) == 4
    assert layer._old_forward.__func__ is FastHRALinear.forward
    close(model(x()), want)
    fk.peft.restore(model)
    assert layer._old_forward.__func__ is HRALinear.forward
    assert torch.equal(model(x()), want)


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_offloaded_base_layer(cpu_offload):
    """Weights that are in memory only while the base layer runs: PEFT's own forward finds nothing there."""
    from accelerate.hooks import attach_align_device_hook

    ours, plain = twins()
    if cpu_offload:
        for layer in layers(ours):
            weights = {name: tensor.clone() for name, tensor in layer.base_layer.state_dict().items()}
            attach_align_device_hook(layer.base_layer, torch.device("cpu"), offload=True, weights_map=weights)
        assert layers(ours)[0].base_layer.weight.is_meta
    assert len(fk.peft.accelerate(ours).swapped) == 4
    close(ours(x()), plain(x()))
    before = layers(plain)[0].base_layer.weight
    ours.merge_adapter()
    close(ours(x()), plain(x()))
    ours.unmerge_adapter()
    close(ours(x()), plain(x()))
    hook = getattr(layers(ours)[0].base_layer, "_hf_hook", None)
    weight = hook.weights_map["weight"] if cpu_offload else layers(ours)[0].base_layer.weight
    assert torch.equal(weight, before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    ours, plain = twins()
    fk.peft.accelerate(ours)
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert all(type(layer) is FastHRALinear for layer in layers(twin))
    shake(twin, 3), shake(plain, 3)
    got, want = step(twin, x()), step(plain, x())
    close(got[0], want[0])
    assert fk.peft.accelerate(twin).already == fk.peft.accelerate(ours).already


def test_moving_and_casting():
    for make, inputs in ((Tiny, x), (Images, images)):
        ours, plain = twins(make())
        fk.peft.accelerate(ours)
        for dtype in (torch.float64, torch.float32):
            ours.to(dtype), plain.to(dtype)
            close(ours(inputs(dtype=dtype)), plain(inputs(dtype=dtype)))
        ours.bfloat16()
        assert ours(inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_data_parallel_replica():
    model = hra()
    fk.peft.accelerate(model)
    layer = layers(model)[0]
    replica = layer._replicate_for_data_parallel()
    assert type(replica) is FastHRALinear
    close(replica(x()), layer(x()))


@pytest.mark.parametrize(
    "value, said",
    [
        (0.0, "columns that are zero, which are no reflections: [1]"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
    ],
)
def test_everything_is_checked_before_anything_changes(value, said):
    model = hra()
    with torch.no_grad():
        layers(model)[2].hra_u["default"][:, 1] = value
    with pytest.raises(ValueError, match=r"hra_u of layer 'base_model.model.blocks.1.up', adapter 'default'") as error:
        fk.peft.accelerate(model)
    assert said in str(error.value)
    assert all(type(layer) is HRALinear for layer in layers(model))


@pytest.mark.parametrize(
    "u, said",
    [(torch.ones(24, 3), "[24, 4], got [24, 3]"), (torch.ones(5, 4), "[24, 4]"), (torch.ones(24, 4).long(), "int64")],
)
def test_shapes_and_dtypes_are_checked(u, said):
    model = hra()
    layers(model)[0].hra_u["default"] = nn.Parameter(u, requires_grad=False)
    with pytest.raises(ValueError) as error:
        fk.peft.accelerate(model)
    assert said in str(error.value)


def test_rank_deficient_directions_with_gram_schmidt_are_reported(caplog):
    """PEFT's default initialisation repeats every column: its Gram-Schmidt makes directions of rounding errors."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import get_peft_model

        model = get_peft_model(Tiny(), config(apply_GS=True))
    with caplog.at_level(logging.WARNING, logger="frodkernels"):
        report = fk.peft.accelerate(model)
    assert len(report.swapped) == 4
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and "rank-deficient: 2 of its 4 columns" in warned[0] and UP in warned[0]
    assert sum("columns of u are dependent" in note for note in report.notes) == 4
    assert warned[0] in report.notes
    assert torch.isfinite(model(x())).all()
    shake(model)
    caplog.clear()
    assert not fk.peft.accelerate(model).notes and not caplog.text


def test_second_adapters_are_checked():
    ours, _ = two()
    with torch.no_grad():
        layers(ours)[1].hra_u["other"][:, 0] = 0
    with pytest.raises(ValueError, match=r"blocks.0.down', adapter 'other', has columns that are zero.*\[0\]"):
        fk.peft.accelerate(ours)


def test_zero_columns_that_training_makes_show():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for model in (ours, plain):
        with torch.no_grad():
            layers(model)[0].hra_u["default"][:, 1] = 0
    assert ours(x()).isnan().any() and plain(x()).isnan().any()
    ours, plain = twins(apply_GS=True, init_weights=False)
    fk.peft.accelerate(ours)
    with torch.no_grad():
        layers(ours)[0].hra_u["default"][:, 1] = 0
    assert ours(x()).isnan().any()


def test_nothing_keeps_a_model_alive():
    model = hra()
    fk.peft.accelerate(model)
    model.merge_adapter()
    refs = [weakref.ref(model), weakref.ref(layers(model)[0])]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None] * 2


def test_fast_classes_serve_their_own_layers_only():
    model = hra(Images())
    fk.peft.accelerate(model)
    assert {type(layer) for layer in layers(model)} == {FastHRAConv2d}
    assert all(isinstance(layer, HRAConv2d) and not isinstance(layer, HRALinear) for layer in layers(model))
    assert x(2, IN).shape == (2, IN)
