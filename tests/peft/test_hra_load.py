# SPDX-License-Identifier: Apache-2.0
"""enable() and HRA: what it reaches, and that a broken file changes nothing."""

import copy
import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.hra import HRAModel
from peft.tuners.hra.layer import HRAConv2d, HRALinear
from safetensors.torch import load_file, save_file
from torch import nn

import frodkernels as fk
from frodkernels.peft.hra_layer import FastHRAConv2d, FastHRALinear
from tests.peft import models
from tests.peft.files import FILE, add, contents, put, remake, same, structure
from tests.peft.hra_models import Images, config, hra, images, layers, shake
from tests.peft.models import BERT_TARGETS, Tiny, bert, close, tokens, x

U = "base_model.model.blocks.0.up.hra_u"
METHODS = ("from_pretrained", "load_adapter", "add_adapter")


def peft_state():
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType.HRA], *(PeftModel.__dict__[name] for name in METHODS)


@pytest.fixture(autouse=True)
def untouched():
    before = peft_state()
    assert before[0] is HRAModel
    yield
    assert all(a is b for a, b in zip(peft_state(), before, strict=True))


def fast(model):
    return {type(layer) for layer in layers(model)} <= {FastHRALinear, FastHRAConv2d}


def plain(model):
    return {type(layer) for layer in layers(model)} <= {HRALinear, HRAConv2d}


def saved(path, model=None, **kwargs):
    """A plain model, saved."""
    model = hra(model, **kwargs)
    model.save_pretrained(path)
    return model.eval()


# ---- enable() -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, inputs", [(Tiny, x), (Images, images)])
def test_get_peft_model(make, inputs):
    with fk.peft.enabled():
        model = hra(make())
    assert fast(model) and type(model.base_model) is not HRAModel
    twin = copy.deepcopy(model)
    fk.peft.restore(twin)
    assert plain(twin) and type(twin.base_model) is HRAModel
    close(model(inputs()), twin(inputs()))
    close(model(inputs()), hra(make())(inputs()))  # the same random numbers
    targets = model.peft_config["default"].target_modules
    model.add_adapter("later", config(target_modules=targets))  # models made inside stay fast, new adapters included
    assert fast(model) and fk.peft.accelerate(model).already
    assert plain(hra(make()))


@pytest.mark.parametrize("make, inputs", [(Tiny, x), (Images, images)])
def test_from_pretrained(tmp_path, make, inputs):
    want = saved(tmp_path, make())(inputs())
    with fk.peft.enabled():
        model = PeftModel.from_pretrained(make(), tmp_path)
        again = PeftModel.from_pretrained(make(), tmp_path, adapter_name="mine", low_cpu_mem_usage=True)
        trainable = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    for loaded in (model, again, trainable.eval()):
        assert fast(loaded)
        close(loaded(inputs()), want)
    assert not any(p.requires_grad for p in model.parameters())
    assert sum(p.requires_grad for p in trainable.parameters()) == len(layers(trainable))


def test_add_and_load_into_a_plain_model(tmp_path):
    want = saved(tmp_path)(x())
    model = hra(r=2)
    default = model.eval()(x())
    with fk.peft.enabled():
        model.load_adapter(tmp_path, "loaded")
        model.add_adapter("added", config(r=6))
    assert fast(model) and list(model.peft_config) == ["default", "loaded", "added"]
    close(model(x()), default)
    model.set_adapter("loaded")
    close(model(x()), want)
    model.set_adapter("added")
    assert fk.peft.accelerate(model).already


def test_loading_into_a_fast_model_outside(tmp_path):
    want = saved(tmp_path)(x())
    model = hra(r=2)
    fk.peft.accelerate(model)
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")
    close(model.eval()(x()), want)


def test_transformers_task_model(tmp_path):
    model = saved(tmp_path, bert(), target_modules=BERT_TARGETS, task_type="SEQ_CLS")
    with fk.peft.enabled():
        loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert fast(loaded) and type(loaded).__name__ == "PeftModelForSequenceClassification"
    close(loaded(tokens()).logits, model(tokens()).logits)


def test_transformers_own_loader(tmp_path):
    """transformers' ``model.load_adapter`` makes layers of PEFT's table, too."""
    model = saved(tmp_path, bert(), target_modules=["query"])
    base = bert()
    with fk.peft.enabled():
        base.load_adapter(str(tmp_path))
    assert fast(base) and len(layers(base)) == 2
    close(base.eval()(tokens()).logits, model(tokens()).logits)


def test_other_methods_and_frod_go_on(tmp_path):
    with fk.peft.enabled():
        model = get_peft_model(Tiny(), LoraConfig(target_modules=["up"]))
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(Tiny(), tmp_path).load_adapter(tmp_path, "second")
        assert type(models.layers(models.frod())[0]).__name__ == "FastFrodLinear"
        with pytest.raises(ValueError, match="Can't find"):
            PeftModel.from_pretrained(Tiny(), tmp_path / "nowhere")
        frod = models.frod()
        saved(tmp_path / "hra")
        with pytest.raises(Exception):  # noqa: B017 PEFT refuses in its own words, whatever they are
            frod.load_adapter(tmp_path / "hra", "hra")


def test_failed_add_adapter_leaves_nothing():
    model = hra(target_modules=["up"])
    want, before = model(x()), [type(m) for m in model.modules()]
    with fk.peft.enabled(), pytest.raises(ValueError, match="positive integer"):
        model.add_adapter("bad", config(r=0))
    assert [type(m) for m in model.modules()] == before and list(model.peft_config) == ["default"]
    assert torch.equal(model(x()), want)


def test_rank_deficiency_is_judged_on_what_was_loaded(tmp_path, caplog):
    """Not on the initialisation that PEFT makes for the file to overwrite, which repeats its columns."""
    saved(tmp_path, apply_GS=True)
    with caplog.at_level(logging.WARNING, logger="frodkernels"), fk.peft.enabled():
        model = PeftModel.from_pretrained(Tiny(), tmp_path)
        model.load_adapter(tmp_path, "second")
        assert "rank-deficient" not in caplog.text
        get_peft_model(Tiny(), config(apply_GS=True))
    assert caplog.text.count("rank-deficient") == 1


# ---- broken files -------------------------------------------------------------------------------------------------


HEAD, BASE = "base_model.model.head.weight", "base_model.model.blocks.0.up.base_layer.weight"
# name -> (what is done to a good file, what the message must name)
FILES = {
    "zero column": (put(U, slice(None), 2, value=0), [U, "zero", "[2]"]),
    "all zero": (remake(U, torch.zeros_like), [U, "zero", "[0, 1, 2, 3]"]),
    "negative zeros": (put(U, slice(None), 1, value=-0.0), [U, "zero", "[1]"]),
    "NaN": (put(U, 3, 1, value=float("nan")), [U, "finite", "[1]"]),
    "infinity": (put(U, 3, 0, value=float("inf")), [U, "finite", "[0]"]),
    "too few columns": (remake(U, lambda t: t[:, :3]), [U, "[24, 4]", "[24, 3]"]),
    "too many columns": (remake(U, lambda t: torch.cat([t, t], 1)), [U, "[24, 4]", "[24, 8]"]),
    "too few rows": (remake(U, lambda t: t[:-1]), [U, "[24, 4]", "[23, 4]"]),
    "transposed": (remake(U, lambda t: t.t()), [U, "[24, 4]", "[4, 24]"]),
    "flat": (remake(U, lambda t: t.flatten()), [U, "[96]"]),
    "integers": (remake(U, lambda t: (t * 9).long() + 1), [U, "int64"]),
    "booleans": (remake(U, lambda t: t > 0), [U, "bool"]),
    "complex": (remake(U, lambda t: t.to(torch.complex64)), [U, "complex64"]),
    "8 bits": (remake(U, lambda t: t.to(torch.float8_e4m3fn)), [U, "float8_e4m3fn"]),
    "missing": (lambda state: state.pop(U), [U, "missing"]),
    "empty": (lambda state: state.clear(), [U, "missing"]),
    "layer out of nowhere": (add(U.replace("0", "7"), torch.ones(24, 4)), ["blocks.7.up.hra_u", "no such HRA"]),
    "named adapter": (add(U + ".default", torch.ones(24, 4)), [U + ".default", "no such HRA"]),
    "base weight": (add(BASE, torch.zeros(40, 24)), [BASE, "overwrite the base model"]),
    "head": (add(HEAD, torch.zeros(3, 24)), [HEAD, "overwrite the base model"]),
    "unknown": (add("surprise", torch.ones(1)), ["surprise"]),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    saved(path)
    return path


@pytest.fixture
def broken(good, tmp_path):
    def write(change):
        state = {key: tensor.clone() for key, tensor in load_file(good / FILE).items()}
        change(state)
        save_file(state, tmp_path / FILE, metadata={"format": "pt"})
        (tmp_path / "adapter_config.json").write_text((good / "adapter_config.json").read_text())
        return tmp_path

    return write


def refused(run, parts, monkeypatch):
    """``run`` raises before PEFT injects anything, and the message has the parts."""
    injected = []
    with monkeypatch.context() as patch:
        patch.setattr(HRAModel, "inject_adapter", lambda *args, **kwargs: injected.append(1))
        with pytest.raises(ValueError) as error:
            run()
    assert not injected
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("name", FILES)
def test_broken_files_are_refused(broken, name, monkeypatch):
    change, parts = FILES[name]
    path = broken(change)
    base = Tiny()
    before, state = structure(base), contents(base)
    with fk.peft.enabled():
        refused(lambda: PeftModel.from_pretrained(base, path), parts, monkeypatch)
    assert structure(base) == before and same(contents(base), state)
    for accelerated in (False, True):
        model = hra()
        if accelerated:
            fk.peft.accelerate(model)
        before, state, want = structure(model), contents(model), model(x())
        with fk.peft.enabled():
            refused(lambda model=model: model.load_adapter(path, "bad"), parts, monkeypatch)
        assert structure(model) == before and same(contents(model), state)
        assert list(model.peft_config) == ["default"] and torch.equal(model(x()), want)
        model.add_adapter("bad", config())  # the name is free


@pytest.mark.parametrize("name", ["zero column", "NaN", "infinity", "all zero"])
def test_accelerate_refuses_what_plain_peft_took(broken, name):
    path = broken(FILES[name][0])
    model = PeftModel.from_pretrained(Tiny(), path)
    before = structure(model)
    with pytest.raises(ValueError, match="hra_u of layer 'base_model.model.blocks.0.up', adapter 'default'"):
        fk.peft.accelerate(model)
    assert structure(model) == before


def test_files_of_convolutions(tmp_path):
    saved(tmp_path, Images())
    state = load_file(tmp_path / FILE)
    key = "base_model.model.first.hra_u"
    assert state[key].shape == (27, 4)
    save_file({**state, key: state[key][:9].contiguous()}, tmp_path / FILE, metadata={"format": "pt"})
    with fk.peft.enabled(), pytest.raises(ValueError, match=r"first.hra_u' must have shape \[27, 4\]"):
        PeftModel.from_pretrained(Images(), tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [("r", v) for v in ("4", 4.0, None, True, 0, -2, 10**9)] + [("apply_GS", v) for v in ("yes", 1, None)],
)
def test_numbers_of_the_config(good, broken, key, value, monkeypatch):
    path = broken(lambda state: None)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    named = U if value == 10**9 else key
    with fk.peft.enabled():
        refused(lambda: PeftModel.from_pretrained(Tiny(), path), [named], monkeypatch)


def test_failed_load_leaves_the_model_as_it_was(good, monkeypatch):
    base, model = Tiny(), hra()
    fk.peft.accelerate(model)
    before = [(structure(m), contents(m)) for m in (base, model)]

    def fail(*args, **kwargs):
        raise RuntimeError("late")

    with monkeypatch.context() as patch, fk.peft.enabled():
        patch.setattr("frodkernels.peft.hooks._report", fail)
        with pytest.raises(RuntimeError, match="late"):
            PeftModel.from_pretrained(base, good)
        with pytest.raises(RuntimeError, match="late"):
            model.load_adapter(good, "late")
        with pytest.raises(RuntimeError, match="late"):
            model.load_adapter(good, "default")
    for m, (shape, state) in zip((base, model), before, strict=True):
        assert structure(m) == shape and same(contents(m), state)
    with fk.peft.enabled():
        assert fast(PeftModel.from_pretrained(base, good))


LEGITIMATE = {
    "modules_to_save": (Tiny, dict(modules_to_save=["head"]), x),
    "all biases": (Tiny, dict(bias="all"), x),
    "biases of the layers": (Tiny, dict(bias="hra_only"), x),
    "all linear": (Tiny, dict(target_modules="all-linear"), x),
    "pattern": (Tiny, dict(target_modules=r".*\.up"), x),
    "one layer": (bert, dict(target_modules=["query"], layers_to_transform=[1]), tokens),
    "model's own targets": (bert, dict(target_modules=None), tokens),
    "convolutions": (Images, {}, images),
    "16 bits": (Tiny, {}, x),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_peft_writes_is_read(tmp_path, name):
    build, kwargs, inputs = LEGITIMATE[name]
    model = hra(build(), **kwargs)
    with torch.no_grad():  # everything that trains, has
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    if name == "16 bits":
        for layer in layers(model):
            layer.hra_u["default"] = nn.Parameter(layer.hra_u["default"].detach().bfloat16().float())
    model.save_pretrained(tmp_path)
    if name == "16 bits":
        state = {key: tensor.bfloat16() for key, tensor in load_file(tmp_path / FILE).items()}
        save_file(state, tmp_path / FILE, metadata={"format": "pt"})
    want = model.eval()(inputs())
    want = getattr(want, "logits", want)
    with fk.peft.enabled():
        loaded = PeftModel.from_pretrained(build(), tmp_path)
        live = hra(build(), **kwargs)
        live.load_adapter(tmp_path, "default")
        if "bias" not in kwargs:  # PEFT allows one adapter with biases
            live.load_adapter(tmp_path, "second")
            live.set_adapter("second")
    for result in (loaded, live.eval()):
        assert fast(result)
        got = result(inputs())
        close(getattr(got, "logits", got), want, 1e-4)


def test_shaking_is_what_makes_the_models_differ():
    model = hra()
    want = model(x())
    shake(model, 7)
    assert (model(x()) - want).abs().max() > 1e-3
