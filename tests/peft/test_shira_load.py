# SPDX-License-Identifier: Apache-2.0
"""Loading SHiRA adapters: enable() makes them fast."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.shira import ShiraModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import frodkernels as fk
from tests.peft import hra_models, models
from tests.peft.files import FILE, contents, same, structure
from tests.peft.models import BERT_TARGETS, Tiny, bert, close, tokens, x
from tests.peft.shira_models import config, fast, layers, plain, saved, shake, shira

VALUES, INDICES = "base_model.model.blocks.0.up.shira_weight", "base_model.model.blocks.0.up.shira_indices"
pytestmark = pytest.mark.usefixtures("peft_shira_untouched")


# ---- enable() -----------------------------------------------------------------------------------------------------


def test_get_peft_model():
    with fk.peft.enabled():
        model = shira()
    assert fast(model) and type(model.base_model) is not ShiraModel
    twin = copy.deepcopy(model)
    fk.peft.restore(twin)
    assert plain(twin) and type(twin.base_model) is ShiraModel
    close(model(x()), twin(x()))
    close(model(x()), shira()(x()))
    model.add_adapter("later", config())  # models made inside stay fast, new adapters included
    assert fast(model) and fk.peft.accelerate(model).already
    assert plain(shira())


def test_from_pretrained(tmp_path):
    want = saved(tmp_path)(x())
    with fk.peft.enabled():
        model = PeftModel.from_pretrained(Tiny(), tmp_path)
        again = PeftModel.from_pretrained(Tiny(), tmp_path, adapter_name="mine", low_cpu_mem_usage=True)
        trainable = PeftModel.from_pretrained(Tiny(), tmp_path, is_trainable=True)
    for loaded in (model, again, trainable.eval()):
        assert fast(loaded)
        close(loaded(x()), want)
        assert all(layer._fast.plans for layer in layers(loaded))
    assert not any(p.requires_grad for p in model.parameters())
    assert sum(p.requires_grad for p in trainable.parameters()) == 4


def test_add_and_load_into_a_plain_model(tmp_path):
    want = saved(tmp_path)(x())
    model = shira(r=2)
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


@pytest.mark.parametrize("within", [True, False])
def test_loading_over_an_adapter(tmp_path, within):
    """Its entries are written in place, its positions replaced."""
    want = saved(tmp_path)(x())
    model = shira().eval()
    fk.peft.accelerate(model)
    with torch.no_grad():
        model(x())
        if within:
            with fk.peft.enabled():
                model.load_adapter(tmp_path, "default")
        else:
            model.load_adapter(tmp_path, "default")
        close(model(x()), want)


def test_transformers_task_model(tmp_path):
    model = saved(tmp_path, bert(), target_modules=BERT_TARGETS, task_type="SEQ_CLS")
    with fk.peft.enabled():
        loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert fast(loaded) and type(loaded).__name__ == "PeftModelForSequenceClassification"
    close(loaded(tokens()).logits, model(tokens()).logits)


def test_transformers_own_loader(tmp_path):
    """transformers' ``model.load_adapter`` makes layers of PEFT's table, too.

    It drops the positions (they are no part of a state dict), so that they are right only where the seed makes them so.
    """
    model = saved(tmp_path, bert(), target_modules=["query"], random_seed=12)
    base = bert()
    with fk.peft.enabled():
        base.load_adapter(str(tmp_path))
    assert fast(base) and len(layers(base)) == 2
    close(base.eval()(tokens()).logits, model(tokens()).logits)


def test_state_dicts_without_a_file():
    model = shira(random_seed=11).eval()
    state = get_peft_model_state_dict(model)
    with fk.peft.enabled():
        live = get_peft_model(Tiny(), config())
        set_peft_model_state_dict(live, state)
        close(live.eval()(x()), model(x()))
        bare = inject_adapter_in_model(config(), Tiny())
        set_peft_model_state_dict(bare, {key.removeprefix("base_model.model."): value for key, value in state.items()})
        close(bare.eval()(x()), model(x()))
        state[INDICES] = state[INDICES].clone()
        state[INDICES][0, 3] = 40
        before = contents(live)
        with pytest.raises(ValueError, match=r"up.shira_indices': rows\[3\] = 40"):
            set_peft_model_state_dict(live, state)
        assert same(contents(live), before)
        close(live(x()), model(x()))


def test_adapters_of_masks_that_only_the_file_knows(tmp_path):
    """A mask function of the user's own is not saved; PEFT takes the positions from the file."""
    want = saved(tmp_path)(x())
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mask_type": "mine"}))
    with fk.peft.enabled():
        model = PeftModel.from_pretrained(Tiny(), tmp_path)
        later = get_peft_model(Tiny(), model.peft_config["default"])  # without positions
        with pytest.raises(ValueError, match=r"shira_indices of layer '.*blocks.0.up', adapter 'default' is missing"):
            later(x())
        later.load_adapter(tmp_path, "default")
    close(model(x()), want)
    close(later.eval()(x()), want)


def test_files_from_windows(tmp_path):
    """PEFT writes indices as float32 there."""
    want = saved(tmp_path)(x())
    state = load_file(tmp_path / FILE)
    save_file({k: v.float() if "indices" in k else v for k, v in state.items()}, tmp_path / FILE)
    with fk.peft.enabled():
        close(PeftModel.from_pretrained(Tiny(), tmp_path)(x()), want)


def test_other_methods_go_on(tmp_path):
    with fk.peft.enabled():
        model = get_peft_model(Tiny(), LoraConfig(target_modules=["up"]))
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(Tiny(), tmp_path).load_adapter(tmp_path, "second")
        assert type(models.layers(models.frod())[0]).__name__ == "FastFrodLinear"
        assert type(hra_models.layers(hra_models.hra())[0]).__name__ == "FastHRALinear"


def test_failed_add_adapter_leaves_nothing():
    model = shira(target_modules=["up"])
    want, before = model(x()), structure(model)
    with fk.peft.enabled():
        for r in (0, 99):
            with pytest.raises(ValueError, match="positive integer|not allowed"):
                model.add_adapter("bad", config(r=r))
    assert structure(model) == before and list(model.peft_config) == ["default"]
    assert torch.equal(model(x()), want)


def test_shaking_is_what_makes_the_models_differ():
    model = shira()
    want = model(x())
    shake(model, 7)
    assert (model(x()) - want).abs().max() > 1e-3
