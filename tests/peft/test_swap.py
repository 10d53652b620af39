# SPDX-License-Identifier: Apache-2.0
"""accelerate and restore: what they report, what they leave alone, what survives copying."""

import copy
import gc
import io
import logging
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from peft.tuners.frod.layer import Linear as PeftFrodLinear
from torch import nn

import frodkernels as fk
from frodkernels.peft.frod_layer import FastFrodLinear
from tests.peft.models import Tiny, close, config, frod, layers, twins, x


def test_report(caplog):
    model = frod()
    with caplog.at_level(logging.INFO, logger="frodkernels"):
        report = fk.peft.accelerate(model)
    assert len(report.swapped) == 4 and not report.skipped and not report.rederived
    lines = [record for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) == 1 and "4 layers swapped" in lines[0].getMessage()
    text = repr(report)
    assert "base_model.model.blocks.0.up" in text and "40x24" in text
    assert fk.backends()["sparse_core"]["cpu"]["chosen"] in text
    assert text.count("\n") == 4


def test_idempotent():
    model = frod()
    fk.peft.accelerate(model)
    slots = [layer._fast for layer in layers(model)]
    patterns = [slot.plans["default"].pattern for slot in slots]
    report = fk.peft.accelerate(model)
    assert not report.swapped and len(report.already) == 4
    assert all(layer._fast is slot for layer, slot in zip(layers(model), slots, strict=True))
    assert all(s.plans["default"].pattern is p for s, p in zip(slots, patterns, strict=True))


def test_one_pattern_per_category():
    model = frod()
    fk.peft.accelerate(model)
    patterns = {
        kind: {id(layer._fast.plans["default"].pattern) for layer in layers(model) if layer.in_features == kind}
        for kind in (24, 40)
    }
    assert all(len(ids) == 1 for ids in patterns.values())


def test_no_new_state():
    ours, plain = twins()
    before = list(dict(ours.named_modules())), list(dict(ours.named_parameters())), list(dict(ours.named_buffers()))
    fk.peft.accelerate(ours)
    ours(x()).sum().backward()
    after = list(dict(ours.named_modules())), list(dict(ours.named_parameters())), list(dict(ours.named_buffers()))
    assert before == after
    assert list(ours.state_dict()) == list(plain.state_dict())


def test_subclasses_and_other_tuners_are_left_alone():
    from peft import LoraConfig, get_peft_model

    class Mine(PeftFrodLinear):
        pass

    model = frod()
    layers(model)[1].__class__ = Mine
    report = fk.peft.accelerate(model)
    assert len(report.swapped) == 3
    assert report.skipped == {"base_model.model.blocks.0.down": "subclass Mine"}
    report = fk.peft.accelerate(get_peft_model(Tiny(), LoraConfig(target_modules=["up"])))
    assert not report.swapped and set(report.skipped.values()) == {"no fast version of lora.Linear"}
    assert "no tuner layers" in repr(fk.peft.accelerate(Tiny()))


def test_what_cannot_be_swapped_is_skipped():
    model = frod()
    first, second, third, _ = layers(model)
    second.forward = lambda inputs: inputs
    first.frod_U["default"] = first.frod_U["default"].to("meta")
    third.get_base_layer().weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    report = fk.peft.accelerate(model)
    assert len(report.swapped) == 1
    reasons = list(report.skipped.values())
    assert "meta" in reasons[0] and "overridden" in reasons[1] and "quantised" in reasons[2]
    assert "3 skipped" in report.summary()


def test_restore():
    ours, plain = twins()
    keys = [set(layer.__dict__) for layer in layers(plain)]
    fk.peft.accelerate(ours)
    ours(x())
    fk.peft.restore(ours)
    assert all(type(layer) is PeftFrodLinear for layer in layers(ours))
    assert [set(layer.__dict__) for layer in layers(ours)] == keys
    assert torch.equal(ours(x()), plain(x()))
    fk.peft.restore(ours)  # nothing to do


def test_accelerate_hooks_follow_the_class():
    """Hugging Face's accelerate stores the bound forward it wraps: it must become the fast one, and go back."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = frod()
    layer = layers(model)[0]
    add_hook_to_module(layer, ModelHook())
    want = model(x())
    report = fk.peft.accelerate(model)
    assert len(report.swapped) == 4
    assert layer._old_forward.__func__ is FastFrodLinear.forward
    close(model(x()), want)
    fk.peft.restore(model)
    assert layer._old_forward.__func__ is PeftFrodLinear.forward
    assert torch.equal(model(x()), want)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours.eval(), plain.eval()
    with torch.no_grad():
        ours(x()), ours(x())
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert all(type(layer) is FastFrodLinear and layer._fast is None for layer in layers(twin))
    assert layers(ours)[0]._fast is not None
    with torch.no_grad():
        layers(twin)[0].frod_lambda_l["default"].mul_(2), layers(plain)[0].frod_lambda_l["default"].mul_(2)
        for _ in range(3):
            close(twin(x()), plain(x()))
    twin.train()(x()).sum().backward()
    assert fk.peft.accelerate(twin).already == fk.peft.accelerate(ours).already
    with torch.no_grad():
        close(twin.eval()(x()), plain(x()))
    assert layers(twin)[0]._fast.budget.used  # a copy keeps weights from then on


def test_copy_of_one_category_shares_its_plan():
    twin = copy.deepcopy(frod())
    fk.peft.accelerate(twin)
    twin = copy.deepcopy(twin)
    twin(x())
    a, _, b, _ = (layer._fast.plans["default"].pattern for layer in layers(twin))
    assert a is b


def test_moving_and_casting():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for dtype in (torch.float64, torch.float32):
        ours.to(dtype), plain.to(dtype)
        close(ours(x(dtype=dtype)), plain(x(dtype=dtype)))
    ours.bfloat16()
    assert ours(x(dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not fk.peft.accelerate(ours).rederived  # rounding is not a foreign basis


def test_data_parallel_replica():
    model = frod()
    fk.peft.accelerate(model)
    layer = layers(model)[0]
    replica = layer._replicate_for_data_parallel()
    assert replica._fast is not layer._fast and replica._fast.plans == layer._fast.plans


def test_everything_is_checked_before_anything_changes():
    model = frod()
    model.base_model.frod_s_indices["up"]["default"][0, 3] = 24
    with pytest.raises(ValueError, match=r"frod_s_indices of layer .*up.*rows\[3\] = 24"):
        fk.peft.accelerate(model)
    assert all(type(layer) is PeftFrodLinear and "_fast" not in layer.__dict__ for layer in layers(model))


def test_pattern_overwritten_under_a_fast_layer():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours(x())
    for model in (ours, plain):
        store = model.base_model.frod_s_indices["up"]["default"]
        order = torch.arange(store.shape[1]).flip(0)
        store.copy_(store[:, order].clone())
    close(ours(x()), plain(x()))
    ours.base_model.frod_s_indices["up"]["default"][1, 0] = 10**6
    for use in (lambda: ours(x()), ours.merge_adapter):
        with pytest.raises(ValueError, match="1000000 is out of range"):
            use()
    assert not layers(ours)[0].merged


def test_nothing_keeps_a_model_alive():
    model = frod()
    fk.peft.accelerate(model)
    with torch.no_grad():
        model.eval()(x())
    refs = [weakref.ref(model), weakref.ref(model.base_model.frod_V["up"]["default"]), weakref.ref(layers(model)[0])]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_bad_budget():
    for bad in (-1, 1.5, "1GB"):
        with pytest.raises(ValueError, match="eval_cache"):
            fk.peft.accelerate(frod(), eval_cache=bad)


def test_param_groups():
    model = frod(modules_to_save=["head"])
    fk.peft.accelerate(model)
    groups = fk.peft.param_groups(model, 1e-3, lambda_lr=1e-2, values_lr=3e-2)
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [
        ("frod_lambda", 1e-2, 4),
        ("frod_values", 3e-2, 4),
        ("other", 1e-3, 2),
    ]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in trainable}
    assert [g["lr"] for g in fk.peft.param_groups(model, 1e-3)] == [1e-3] * 3
    torch.optim.AdamW(groups).step()
    model.add_adapter("other", config())
    assert fk.peft.param_groups(model, 1e-3)[0]["params"] == groups[0]["params"]  # inactive adapters do not train
    assert [g["name"] for g in fk.peft.param_groups(Tiny(), 1e-3)] == ["other"]


def test_works_without_peft():
    code = """
import sys
sys.modules["peft"] = None
import frodkernels as fk
import torch
for call in (lambda: fk.peft.accelerate(torch.nn.Linear(2, 2)), lambda: fk.peft.restore(torch.nn.Linear(2, 2)),
             fk.peft.enable, fk.peft.disable, lambda: fk.peft.invalidate(torch.nn.Linear(2, 2)),
             lambda: fk.peft.param_groups(torch.nn.Linear(2, 2), 1.0), lambda: fk.peft.enabled().__enter__()):
    try:
        call()
    except ImportError as error:
        assert "pip install" in str(error), error
    else:
        raise SystemExit("no ImportError")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_does_not_import_peft():
    code = "import sys, frodkernels; sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("off, said", [(0.256, "26%"), (9.0, "900%"), (1e38, "> 1000 %"), (float("nan"), "> 1000 %")])
def test_summary_is_readable(off, said):
    summary = fk.peft.SwapReport(rederived={"a": 0.1, "b": off}, layers=[fk.peft.LayerReport("a", "FRoD", "swapped")])
    assert f"up to {said})" in summary.summary() and len(repr(summary)) < 400


@pytest.mark.parametrize("model", [None, "x", 3, Tiny])
@pytest.mark.parametrize("call", ["accelerate", "restore", "invalidate", "param_groups"])
def test_not_a_model(call, model):
    with pytest.raises(ValueError, match="model must be a torch.nn.Module"):
        getattr(fk.peft, call)(model, *([1e-3] if call == "param_groups" else []))
