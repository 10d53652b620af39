# SPDX-License-Identifier: Apache-2.0
"""Broken SHiRA files are refused by name and leave nothing behind; what PEFT itself writes is read."""

import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.shira import ShiraModel
from safetensors.torch import load_file, save_file

import frodkernels as fk
from tests.peft.files import FILE, add, contents, put, remake, same, structure
from tests.peft.models import Tiny, bert, close, tokens, x
from tests.peft.shira_models import config, fast, layers, saved, set_scale, shira

VALUES, INDICES = "base_model.model.blocks.0.up.shira_weight", "base_model.model.blocks.0.up.shira_indices"

pytestmark = pytest.mark.usefixtures("peft_shira_untouched")


def _duplicate(state):
    state[INDICES][:, 5] = state[INDICES][:, 2]


HEAD, BASE = "base_model.model.head.weight", "base_model.model.blocks.0.up.base_layer.weight"
wide = remake(INDICES, lambda t: t.long())


def _wide(row, k, value):
    def change(state):
        wide(state)
        state[INDICES][row, k] = value

    return change


# name -> (what is done to a good file, what the message must name)
FILES = {
    "row of m": (put(INDICES, 0, 3, value=40), [INDICES, "rows[3] = 40"]),
    "row past the end": (put(INDICES, 0, 3, value=70), [INDICES, "rows[3] = 70"]),
    "row of -1": (put(INDICES, 0, 0, value=-1), [INDICES, "rows[0] = -1"]),
    "column of n": (put(INDICES, 1, 3, value=24), [INDICES, "cols[3] = 24"]),
    "column of 1e6": (put(INDICES, 1, 7, value=10**6), [INDICES, "cols[7] = 1000000"]),
    "largest row": (put(INDICES, 0, 7, value=2**31 - 1), [INDICES, "rows[7] = 2147483647"]),
    "column that PEFT would cut to 3": (_wide(1, 7, 2**32 + 3), [INDICES, "cols[7] = 4294967299"]),
    "smallest column": (_wide(1, 7, -(2**63)), [INDICES, "cols[7]"]),
    "duplicate": (_duplicate, [INDICES, "duplicates"]),
    "transposed": (remake(INDICES, lambda t: t.t()), [INDICES, "[2, 256]", "[256, 2]"]),
    "flat": (remake(INDICES, lambda t: t.flatten()), [INDICES, "[2, 256]", "[512]"]),
    "three rows": (remake(INDICES, lambda t: torch.cat([t, t[:1]])), [INDICES, "[3, 256]"]),
    "short indices": (remake(INDICES, lambda t: t[:, :-1]), [INDICES, "[2, 255]"]),
    "many indices": (remake(INDICES, lambda t: t.repeat(1, 4000)), [INDICES, "[2, 1024000]"]),
    "no indices": (remake(INDICES, lambda t: t[:, :0]), [INDICES, "[2, 0]"]),
    "fractions": (remake(INDICES, lambda t: t + 0.5), [INDICES, "integers"]),
    "NaN index": (remake(INDICES, lambda t: t.float().fill_(float("nan"))), [INDICES, "integers"]),
    "infinite index": (remake(INDICES, lambda t: t.float().fill_(float("inf"))), [INDICES, "integers"]),
    "float row of m": (remake(INDICES, lambda t: t.float().fill_(40)), [INDICES, "rows[0] = 40"]),
    "doubles": (remake(INDICES, lambda t: t.double()), [INDICES, "integers"]),
    "halves": (remake(INDICES, lambda t: t.half()), [INDICES, "integers"]),
    "booleans": (remake(INDICES, lambda t: t > 3), [INDICES, "integers"]),
    "indices missing": (lambda state: state.pop(INDICES), [INDICES, "missing"]),
    "short values": (remake(VALUES, lambda t: t[:-1]), [VALUES, "[256]", "[255]"]),
    "long values": (remake(VALUES, lambda t: torch.cat([t, t])), [VALUES, "[512]"]),
    "values in two dimensions": (remake(VALUES, lambda t: t[None]), [VALUES, "[1, 256]"]),
    "integer values": (remake(VALUES, lambda t: t.long()), [VALUES, "int64"]),
    "complex values": (remake(VALUES, lambda t: t.to(torch.complex64)), [VALUES, "complex64"]),
    "8 bits": (remake(VALUES, lambda t: t.to(torch.float8_e4m3fn)), [VALUES, "float8_e4m3fn"]),
    "values missing": (lambda state: state.pop(VALUES), [VALUES, "missing"]),
    "empty": (lambda state: state.clear(), [VALUES, "missing"]),
    "layer out of nowhere": (add(VALUES.replace("0", "7"), torch.ones(256)), ["blocks.7.up.shira_w", "no such SHiRA"]),
    "positions out of nowhere": (add(INDICES.replace("up", "side"), torch.ones(2, 3)), ["no such SHiRA"]),
    "named adapter": (add(INDICES + ".default", torch.ones(2, 256)), [INDICES + ".default", "no such SHiRA"]),
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
        patch.setattr(ShiraModel, "inject_adapter", lambda *args, **kwargs: injected.append(1))
        with pytest.raises(ValueError) as error:
            run()
    assert not injected
    assert all(part in str(error.value) for part in parts), error.value


def everything(model):
    """All that a load may change, positions included."""
    positions = [
        {name: (indices, indices.clone()) for name, indices in layer.shira_indices.items()} for layer in layers(model)
    ]
    return structure(model), contents(model), positions, [p.requires_grad for p in model.parameters()]


def untouched_since(model, before):
    shape, state, positions, flags = before
    assert structure(model) == shape and same(contents(model), state)
    assert flags == [p.requires_grad for p in model.parameters()]
    for layer, known in zip(layers(model), positions, strict=True):
        assert layer.shira_indices.keys() == known.keys()
        for name, (indices, content) in known.items():
            assert layer.shira_indices[name] is indices and torch.equal(indices, content)


@pytest.mark.parametrize("name", FILES)
def test_broken_files_are_refused(broken, name, monkeypatch):
    change, parts = FILES[name]
    path = broken(change)
    base = Tiny()
    before, want = everything(base), base(x())
    with fk.peft.enabled():
        refused(lambda: PeftModel.from_pretrained(base, path), parts, monkeypatch)
    untouched_since(base, before)
    assert torch.equal(base(x()), want)
    for accelerated in (False, True):
        model = shira()
        if accelerated:
            fk.peft.accelerate(model)
        before, want = everything(model), model(x())
        for adapter in ("bad", "default"):
            with fk.peft.enabled():
                refused(lambda model=model, a=adapter: model.load_adapter(path, a), parts, monkeypatch)
            untouched_since(model, before)
        assert list(model.peft_config) == ["default"] and torch.equal(model(x()), want)
        model.add_adapter("bad", config())  # the name is free


SILENT = ["row of m", "row of -1", "column of 1e6", "largest row", "duplicate", "short indices", "many indices"]


@pytest.mark.parametrize("name", SILENT)
def test_accelerate_refuses_what_plain_peft_took(broken, name):
    path = broken(FILES[name][0])
    model = PeftModel.from_pretrained(Tiny(), path)
    before = structure(model)
    with pytest.raises(ValueError, match="shira_.* of layer 'base_model.model.blocks.0.up', adapter 'default'"):
        fk.peft.accelerate(model)
    assert structure(model) == before


@pytest.mark.parametrize("name", SILENT)
def test_a_fast_layer_refuses_what_plain_peft_loaded_into_it(broken, name):
    """Outside of enabled() nobody looks at the file; the layer does, before it uses the positions."""
    model = shira()
    fk.peft.accelerate(model)
    want = model.eval()(x())
    model.load_adapter(broken(FILES[name][0]), "loaded")
    close(model(x()), want)
    model.set_adapter("loaded")
    for use in (lambda: model(x()), model.merge_adapter):
        with pytest.raises(ValueError, match=r"shira_.* of layer '.*', adapter 'loaded'"):
            use()
    model.set_adapter("default")
    close(model(x()), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_entries_may_be_anything(broken, value):
    with fk.peft.enabled():
        model = PeftModel.from_pretrained(Tiny(), broken(put(VALUES, 3, value=value)))
    assert layers(model)[0].shira_weight["default"][3].equal(torch.tensor(value)) or value != value


@pytest.mark.parametrize(
    "key, value",
    [("r", v) for v in ("4", 4.0, None, True, 0, -2, 10**9)] + [("random_seed", v) for v in ("7", 0.5, True, 2**80)],
)
def test_numbers_of_the_config(broken, key, value, monkeypatch):
    path = broken(lambda state: None)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    named = VALUES if value == 10**9 else key
    with fk.peft.enabled():
        refused(lambda: PeftModel.from_pretrained(Tiny(), path), [named], monkeypatch)


@pytest.mark.parametrize("merged", ["", "here", "in plain PEFT", "in plain PEFT, then swapped"])
def test_failed_load_leaves_the_model_as_it_was(good, monkeypatch, merged):
    """A merged one, too: PEFT unmerges it for the adapter that joins."""
    base, model = Tiny(), shira()
    set_scale(model, "default", 0.5)
    model.add_adapter("other", config(r=2, init_weights=False))
    if "plain" in merged:
        model.merge_adapter(["default", "other"])
    if merged != "in plain PEFT":
        fk.peft.accelerate(model)
    if merged == "here":
        model.merge_adapter(["default", "other"])
    assert layers(model)[0].merged == bool(merged)
    before, want = [everything(m) for m in (base, model)], model(x())

    def fail(*args, **kwargs):
        raise RuntimeError("late")

    with monkeypatch.context() as patch, fk.peft.enabled():
        patch.setattr("frodkernels.peft.hooks._report", fail)
        with pytest.raises(RuntimeError, match="late"):
            PeftModel.from_pretrained(base, good)
        for adapter in ("late", "default"):
            with pytest.raises(RuntimeError, match="late"):
                model.load_adapter(good, adapter)
        with pytest.raises(ValueError, match="positive integer"):
            model.add_adapter("late", config(r=0))
    for m, known in zip((base, model), before, strict=True):
        untouched_since(m, known)
    assert torch.equal(model(x()), want) and layers(model)[0].scaling == {"default": 0.5, "other": 1.0}
    assert layers(model)[0].merged_adapters == (["default", "other"] if merged else [])
    with fk.peft.enabled():
        assert fast(PeftModel.from_pretrained(base, good))


LEGITIMATE = {
    "modules_to_save": (Tiny, dict(modules_to_save=["head"]), x),
    "all linear": (Tiny, dict(target_modules="all-linear", r=2), x),
    "pattern": (Tiny, dict(target_modules=r".*\.up"), x),
    "model's own targets": (bert, dict(target_modules=None), tokens),
    "no seed": (Tiny, dict(random_seed=None), x),
    "16 bits": (Tiny, {}, x),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_peft_writes_is_read(tmp_path, name):
    build, kwargs, inputs = LEGITIMATE[name]
    model = shira(build(), **kwargs)
    with torch.no_grad():  # everything that trains, has
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    if name == "16 bits":
        state = load_file(tmp_path / FILE)
        state = {key: tensor.bfloat16() if "weight" in key else tensor for key, tensor in state.items()}
        save_file(state, tmp_path / FILE, metadata={"format": "pt"})
        for layer in layers(model):
            layer.shira_weight["default"].data = layer.shira_weight["default"].data.bfloat16().float()
    want = model.eval()(inputs())
    want = getattr(want, "logits", want)
    with fk.peft.enabled():
        loaded = PeftModel.from_pretrained(build(), tmp_path)
        live = shira(build(), **kwargs)
        live.load_adapter(tmp_path, "default")
        live.load_adapter(tmp_path, "second")
        live.set_adapter("second")
    for result in (loaded, live.eval()):
        assert fast(result)
        got = result(inputs())
        close(getattr(got, "logits", got), want, 1e-4)
