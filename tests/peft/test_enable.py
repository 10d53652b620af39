# SPDX-License-Identifier: Apache-2.0
"""enable, disable, enabled: what they reach, and that nothing global stays behind."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.frod import FrodModel
from peft.tuners.frod.layer import Linear as PeftFrodLinear

import frodkernels as fk
from frodkernels.peft.frod_layer import FastFrodLinear
from tests.peft.models import Tiny, bert, close, config, frod, layers, shake, tokens, x

METHODS = ("from_pretrained", "load_adapter", "add_adapter")


def peft_state():
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType.FROD], *(PeftModel.__dict__[name] for name in METHODS)


@pytest.fixture(autouse=True)
def untouched():
    before = peft_state()
    assert before[0] is FrodModel
    yield
    assert all(a is b for a, b in zip(peft_state(), before, strict=True))


def fast(model):
    return {type(layer) for layer in layers(model)} == {FastFrodLinear}


def plain(model):
    return {type(layer) for layer in layers(model)} == {PeftFrodLinear}


def saved(path, **kwargs):
    """A plain model, saved."""
    model = frod(**kwargs)
    model.save_pretrained(path)
    return model.eval()


def test_get_peft_model():
    with fk.peft.enabled():
        model = get_peft_model(Tiny(), config())
    assert fast(model)
    twin = copy.deepcopy(model)
    fk.peft.restore(twin)
    assert plain(twin) and type(twin.base_model) is FrodModel
    shake(model), shake(twin)
    close(model(x()), twin(x()))
    model.add_adapter("later", config(target_modules=["up"]))  # models made inside stay fast, new adapters included
    assert fast(model) and fk.peft.accelerate(model).already
    assert plain(get_peft_model(Tiny(), config()))


def test_from_pretrained(tmp_path):
    want = saved(tmp_path)(x())
    with fk.peft.enabled():
        model = PeftModel.from_pretrained(Tiny(), tmp_path)
        again = PeftModel.from_pretrained(Tiny(), tmp_path, adapter_name="mine", low_cpu_mem_usage=True)
        trainable = PeftModel.from_pretrained(Tiny(), tmp_path, is_trainable=True)
    for loaded in (model, again, trainable.eval()):
        assert fast(loaded)
        close(loaded(x()), want)
        assert not fk.peft.accelerate(loaded).rederived
    assert not any(p.requires_grad for p in model.parameters())
    assert sum(p.requires_grad for p in trainable.parameters()) == 8


def test_transformers_task_model(tmp_path):
    model = frod(bert(), target_modules=["query", "value"], task_type="SEQ_CLS")
    shake(model)
    model.save_pretrained(tmp_path)
    want = model.eval()(tokens()).logits
    with fk.peft.enabled():
        loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert fast(loaded) and type(loaded).__name__ == "PeftModelForSequenceClassification"
    close(loaded(tokens()).logits, want)


def test_add_and_load_into_a_plain_model(tmp_path):
    want = saved(tmp_path)(x())
    model = frod()
    default = model.eval()(x())
    with fk.peft.enabled():
        model.load_adapter(tmp_path, "loaded")
        model.add_adapter("added", config())
    assert fast(model) and list(model.peft_config) == ["default", "loaded", "added"]
    close(model(x()), default)
    model.set_adapter("loaded")
    close(model(x()), want)
    model.set_adapter("added")
    assert fk.peft.accelerate(model).already


def test_enable_and_disable():
    fk.peft.enable()
    fk.peft.enable()
    try:
        assert fast(get_peft_model(Tiny(), config()))
        with fk.peft.enabled():
            pass
        assert fast(get_peft_model(Tiny(), config()))  # a block's end does not undo enable()
    finally:
        fk.peft.disable()
    assert plain(get_peft_model(Tiny(), config()))
    fk.peft.disable()


def test_nested_blocks_and_errors():
    with pytest.raises(RuntimeError, match="mine"), fk.peft.enabled():
        with fk.peft.enabled():
            pass
        assert fast(get_peft_model(Tiny(), config()))
        raise RuntimeError("mine")
    assert plain(get_peft_model(Tiny(), config()))


def test_somebody_elses_patch_survives(monkeypatch):
    original = PeftModel.add_adapter

    def theirs(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    with fk.peft.enabled():
        PeftModel.add_adapter = theirs
    assert PeftModel.add_adapter is theirs
    PeftModel.add_adapter = original


def test_other_methods_are_not_touched(tmp_path):
    with fk.peft.enabled():
        model = get_peft_model(Tiny(), LoraConfig(target_modules=["up"]))
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(Tiny(), tmp_path).load_adapter(tmp_path, "second")
        with pytest.raises(ValueError, match="Can't find"):
            PeftModel.from_pretrained(Tiny(), tmp_path / "nowhere")


def test_training_is_the_same():
    torch.manual_seed(0)
    reference = frod()
    with fk.peft.enabled():
        model = frod()
    close(model(x()), reference(x()))


def test_failed_add_adapter_leaves_nothing():
    model = frod(target_modules=["up"])
    want, before = model(x()), [type(m) for m in model.modules()]
    with fk.peft.enabled(), pytest.raises(ValueError, match="projection_prng_key|key must be the same"):
        model.add_adapter("bad", config(projection_prng_key=7))
    assert [type(m) for m in model.modules()] == before and list(model.peft_config) == ["default"]
    assert torch.equal(model(x()), want)


def test_failed_load_leaves_a_transformers_model_as_it_was(tmp_path, monkeypatch, caplog):
    from safetensors.torch import load_file, save_file

    frod(bert(), target_modules=["query", "value"], task_type="SEQ_CLS").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("frod_lambda_l"))
    base = bert()
    before = [(name, type(m), sorted(m.__dict__)) for name, m in base.named_modules()]
    want, flags = base.eval()(tokens()).logits, [p.requires_grad for p in base.parameters()]

    def attempt(error):
        with fk.peft.enabled(), pytest.raises(error):
            PeftModel.from_pretrained(base, tmp_path)
        assert [(name, type(m), sorted(m.__dict__)) for name, m in base.named_modules()] == before
        assert flags == [p.requires_grad for p in base.parameters()]
        assert torch.equal(base(tokens()).logits, want)

    save_file({**state, key: state[key][:-1].clone()}, file)
    attempt(ValueError)  # refused before anything is injected
    overwrites = {"base_model.model.bert.embeddings.word_embeddings.weight": torch.zeros(50, 32)}
    save_file({**state, "base_model.model.classifier.weight": torch.zeros(1, 1)}, file)
    attempt(ValueError)
    save_file({**state, **overwrites}, file)
    with monkeypatch.context() as patch:  # what PEFT has overwritten by then is put back

        def fail(*args, **kwargs):
            raise RuntimeError("late")

        patch.setattr("frodkernels.peft.hooks._report", fail)
        attempt(RuntimeError)
    assert "replaces embeddings of the base model" in caplog.text
    save_file(state, file)
    with fk.peft.enabled():
        assert fast(PeftModel.from_pretrained(base, tmp_path))
