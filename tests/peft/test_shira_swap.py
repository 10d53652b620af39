# SPDX-License-Identifier: Apache-2.0
"""accelerate and restore on SHiRA: what they report, what they refuse, what survives copying and moving."""

import copy
import gc
import io
import logging
import pickle
import weakref

import pytest
import torch
from torch import nn

import frodkernels as fk
from frodkernels.peft.shira_layer import FastShiraLinear, PeftShiraLinear
from frodkernels.peft.shira_plan import plan_adapter
from tests.peft import hra_models
from tests.peft.models import Tiny, assert_same_step, close, x
from tests.peft.shira_models import config, layers, shake, shira, twins, two

UP = "base_model.model.blocks.0.up"


def test_report(caplog):
    model = shira()
    with caplog.at_level(logging.INFO, logger="frodkernels"):
        report = fk.peft.accelerate(model)
    assert len(report.swapped) == 4 and not report.skipped and not report.notes and not report.rederived
    lines = [record for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) == 1 and "4 layers swapped" in lines[0].getMessage()
    text = repr(report)
    assert UP in text and "SHiRA" in text and "40x24, 'default': nnz 256 (26.67%), float32" in text
    assert f"{fk.backends()['sparse_core']['cpu']['chosen']} on cpu" in text and "eval cache on" in text
    assert text.count("\n") == 4
    assert "eval cache off" in repr(fk.peft.accelerate(model, eval_cache=False))
    assert "eval cache within 4,096 bytes" in repr(fk.peft.accelerate(model, eval_cache=4096))


def test_idempotent():
    model = shira()
    fk.peft.accelerate(model)
    slots = [layer._fast for layer in layers(model)]
    report = fk.peft.accelerate(model)
    assert not report.swapped and len(report.already) == 4
    assert all(layer._fast is slot for layer, slot in zip(layers(model), slots, strict=True))


def test_no_new_state():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours(x()).sum().backward()
    for names in ("named_modules", "named_parameters", "named_buffers"):
        assert list(dict(getattr(ours, names)())) == list(dict(getattr(plain, names)()))
    assert list(ours.state_dict()) == list(plain.state_dict())
    for layer, other in zip(layers(ours), layers(plain), strict=True):
        assert layer.__dict__.keys() == {*other.__dict__, "_fast"}


def test_layers_of_one_seed_share_their_pattern():
    model, _ = two()
    fk.peft.accelerate(model)
    patterns = {name: [layer._fast.plans[name].pattern for layer in layers(model)] for name in ("default", "other")}
    first, _, third, _ = patterns["default"]
    assert first is third
    assert len({id(pattern) for both in patterns.values() for pattern in both}) == 4  # two shapes, two seeds
    for layer, turn in zip(layers(model), range(4), strict=True):
        layer.shira_indices["default"] = layer.shira_indices["default"].roll(turn, 1)
    fk.peft.accelerate(model)
    assert len({id(layer._fast.plans["default"].pattern) for layer in layers(model)}) == 4


def test_subclasses_and_what_cannot_be_swapped():
    class Mine(PeftShiraLinear):
        pass

    model = shira(Tiny(blocks=3))
    first, second, third, fourth, fifth, _ = layers(model)
    first.__class__ = Mine
    second.forward = lambda inputs: inputs
    third.shira_weight["default"] = nn.Parameter(third.shira_weight["default"].detach().to("meta"))
    fourth.base_layer = hra_models.layers(hra_models.hra())[1]
    fifth.base_layer.weight = nn.Parameter(fifth.base_layer.weight.detach().to(torch.complex64), requires_grad=False)
    report = fk.peft.accelerate(model)
    reasons = [line.why for line in report.layers if line.tuner == "SHiRA" and line.status == "skipped"]
    assert reasons[0] == "subclass Mine" and "overridden" in reasons[1] and "meta" in reasons[2]
    assert "another adapter" in reasons[3] and "complex64" in reasons[4]
    assert len(report.swapped) == 2  # one more, and the nested one


def test_restore():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours(x())
    fk.peft.restore(ours)
    for layer, other in zip(layers(ours), layers(plain), strict=True):
        assert type(layer) is PeftShiraLinear and layer.__dict__.keys() == other.__dict__.keys()
    assert torch.equal(ours(x()), plain(x()))
    fk.peft.restore(ours)  # nothing to do


def test_accelerate_hooks_follow_the_class():
    """Hugging Face's accelerate stores the bound forward it wraps: it must become the fast one, and go back."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = shira()
    layer = layers(model)[0]
    add_hook_to_module(layer, ModelHook())
    want = model(x())
    assert len(fk.peft.accelerate(model).swapped) == 4
    assert layer._old_forward.__func__ is FastShiraLinear.forward
    close(model(x()), want)
    fk.peft.restore(model)
    assert layer._old_forward.__func__ is PeftShiraLinear.forward
    assert torch.equal(model(x()), want)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    ours, plain = two()
    fk.peft.accelerate(ours)
    with torch.no_grad():
        ours.eval()(x())
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert all(type(layer) is FastShiraLinear and "_fast" not in layer.__dict__ for layer in layers(twin))
    shake(twin, 3), shake(plain, 3)
    for name in ("other", "default"):
        twin.set_adapter(name), plain.set_adapter(name)
        assert_same_step(twin, plain, x())
    with torch.no_grad():
        close(twin.eval()(x()), plain.eval()(x()))
    assert all(layer._fast.cache is None for layer in layers(twin))  # until accelerate() says so
    assert fk.peft.accelerate(twin).already == fk.peft.accelerate(ours).already
    with torch.no_grad():
        close(twin(x()), plain(x()))
    assert all(layer._fast.cache.nbytes for layer in layers(twin))


def test_pickles_hold_nothing_that_can_be_made_again():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    with torch.no_grad():
        ours.eval()(x())
    assert len(pickle.dumps(ours)) < 1.05 * len(pickle.dumps(plain))


def test_moving_and_casting():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    for dtype in (torch.float64, torch.float32):
        ours.to(dtype), plain.to(dtype)
        close(ours(x(dtype=dtype)), plain(x(dtype=dtype)))
    ours.bfloat16()
    assert ours(x(dtype=torch.bfloat16)).dtype == torch.bfloat16
    ours.to("meta")
    assert ours(x(dtype=torch.bfloat16).to("meta")).is_meta


def test_data_parallel_replica():
    model = shira()
    fk.peft.accelerate(model)
    layer = layers(model)[0]
    replica = layer._replicate_for_data_parallel()
    assert type(replica) is FastShiraLinear and replica._fast is not layer._fast
    close(replica(x()), layer(x()))


def _indices(change):
    def spoil(layer):
        layer.shira_indices["default"] = change(layer.shira_indices["default"].clone())

    return spoil


def _entry(row, k, value):
    def change(indices):
        indices = indices.long()
        indices[row, k] = value
        return indices

    return _indices(change)


def _weight(change):
    def spoil(layer):
        values = change(layer.shira_weight["default"].detach())
        layer.shira_weight["default"] = nn.Parameter(values, requires_grad=False)

    return spoil


SPOILT = {
    "row of m": (_entry(0, 3, 40), "rows[3] = 40"),
    "row of -1": (_entry(0, 0, -1), "rows[0] = -1"),
    "column of n": (_entry(1, 9, 24), "cols[9] = 24"),
    "column of 2^40": (_entry(1, 9, 2**40), "cols[9] = 1099511627776"),
    "duplicate": (_indices(lambda t: torch.cat([t[:, :-1], t[:, :1]], 1)), "duplicates"),
    "float indices": (_indices(lambda t: t.float()), "integers"),
    "boolean indices": (_indices(lambda t: t > 3), "integers"),
    "three rows of indices": (_indices(lambda t: torch.cat([t, t[:1]])), "[2, nnz]"),
    "flat indices": (_indices(lambda t: t.flatten()), "[2, nnz]"),
    "short indices": (_indices(lambda t: t[:, :-1]), "shape [255], got [256]"),
    "indices on meta": (_indices(lambda t: t.to("meta")), "meta"),
    "no indices": (lambda layer: layer.shira_indices.pop("default"), "is missing"),
    "no tensor": (lambda layer: layer.shira_indices.update(default=[[0], [1]]), "[2, nnz]"),
    "long values": (_weight(lambda t: torch.cat([t, t])), "shape [256], got [512]"),
    "values in two dimensions": (_weight(lambda t: t[None]), "shape [256], got [1, 256]"),
    "integer values": (_weight(lambda t: t.long()), "int64"),
    "complex values": (_weight(lambda t: t.to(torch.complex64)), "complex64"),
}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("again", [False, True])
def test_everything_is_checked_before_anything_changes(name, again):
    spoil, said = SPOILT[name]
    model = shira()
    if again:
        fk.peft.accelerate(model)
    spoil(layers(model)[2])
    before = [(type(layer), layer.__dict__.keys(), layer._fast if again else None) for layer in layers(model)]
    with pytest.raises(
        ValueError, match=r"shira_.* of layer 'base_model.model.blocks.1.up', adapter 'default'"
    ) as error:
        fk.peft.accelerate(model)
    assert said in str(error.value)
    assert before == [(type(layer), layer.__dict__.keys(), layer._fast if again else None) for layer in layers(model)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_values_may_be_anything(value):
    model = shira()
    with torch.no_grad():
        layers(model)[0].shira_weight["default"].fill_(value)
    assert len(fk.peft.accelerate(model).swapped) == 4
    assert torch.isfinite(model(x())).all() == (value == 0.0)


def test_second_adapters_are_checked():
    ours, _ = two()
    layers(ours)[1].shira_indices["other"][0, 0] = 24
    with pytest.raises(ValueError, match=r"blocks.0.down', adapter 'other': rows\[0\] = 24"):
        fk.peft.accelerate(ours)


def test_indices_elsewhere_than_the_weight():
    """PEFT's indices do not follow the model: the plan does."""
    layer = layers(shira())[0]
    fk.peft.accelerate(layer)
    layer.shira_weight["default"] = nn.Parameter(layer.shira_weight["default"].detach().to("meta"))
    earlier = layer._fast.plans["default"]
    assert plan_adapter(layer, "default", "layer", earlier).pattern.device.type == "meta"
    assert earlier.pattern.device.type == layer.shira_indices["default"].device.type == "cpu"


def test_nothing_keeps_a_model_alive():
    model = shira()
    fk.peft.accelerate(model)
    with torch.no_grad():
        model.eval()(x())
    model.merge_adapter()
    refs = [weakref.ref(model), weakref.ref(layers(model)[0]), weakref.ref(layers(model)[0]._fast)]
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_configs_of_several_shapes():
    model = shira(r=2)
    for count in (1, 3, 5):
        model.add_adapter(f"r{count}", config(r=count))
    report = fk.peft.accelerate(model)
    assert all(f"nnz {64 * count} " in repr(report) for count in (1, 2, 3, 5))
