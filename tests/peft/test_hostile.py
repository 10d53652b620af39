# SPDX-License-Identifier: Apache-2.0
"""Broken adapter files: a ValueError that names the key, a living process, an unchanged model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import frodkernels as fk
from tests.peft.hostile import FILES
from tests.peft.models import BERT_TARGETS, Tiny, bert, close, frod, gpt2, tokens, x

ROOT = Path(__file__).parents[2]
WAYS = ("from_pretrained", "load_adapter, plain", "load_adapter, fast", "accelerate")
# what reaches accelerate: files that PEFT loads without a word
SILENT = {
    "row of n", "row past the end", "row of -1", "row of -5000", "row of 1e6", "column of 2^40", "smallest column",
    "duplicate", "huge size", "size of another category", "negative size",
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    process = subprocess.run(
        [sys.executable, "-m", "tests.peft.hostile"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]  # a crash would be a negative number
    return json.loads(process.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("name", FILES)
def test_refused_before_anything_changes(results, name, way, dtype):
    result = results[f"{way}: {name}, {dtype}"]
    assert result["error"] is not None and result["error"].startswith("ValueError"), result
    for part in FILES[name][1]:
        assert part in result["error"]
    assert result["intact"]
    assert result["injected"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(SILENT))
def test_refused_by_accelerate_after_plain_peft_took_it(results, name, dtype):
    result = results[f"accelerate: {name}, {dtype}"]
    assert result is not None and result["error"].startswith("ValueError: frod_s_"), result
    assert "layer 'base_model.model.blocks.0." in result["error"]
    assert result["intact"]


def test_nothing_slips_through_accelerate(results):
    """Whatever PEFT let in and accelerate accepted is harmless: PEFT had converted or dropped the broken tensor,
    or done what cannot be seen afterwards: filled in for a missing one, or overwritten the base model."""
    accepted = {case.split(": ")[1] for case, r in results.items() if r is not None and r["error"] is None}
    names = {case.rsplit(", ", 1)[0] for case in accepted}
    assert names <= {
        "fractional size", "float indices", "half indices", "integer lambda", "complex lambda", "integer V",
        "no V", "no indices", "no lambda", "no values", "no layers", "U", "layer out of nowhere",
        "category out of nowhere", "base weight", "base bias", "head", "another adapter's lambda", "unknown",
    }, names  # fmt: skip


CONFIGS = {
    "sparse_rate": [float("nan"), float("inf"), None, "0.1", True, [0.1]],
    "frod_dropout": [5, float("nan"), "0"],
    "regularization_alpha": [float("nan"), None],
    "projection_prng_key": [2**80, 0.5, "7"],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in CONFIGS.items() for value in values])
def test_numbers_of_the_config(tmp_path, key, value):
    model = frod(blocks := Tiny())
    want = model.eval()(x())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with fk.peft.enabled():
        with pytest.raises(ValueError, match=key):
            PeftModel.from_pretrained(Tiny(), tmp_path)
        with pytest.raises(ValueError, match=key):
            model.load_adapter(tmp_path, "bad")
    assert list(model.peft_config) == ["default"] and model.get_base_model() is blocks
    assert torch.equal(model(x()), want)


LEGITIMATE = {
    "modules_to_save": (Tiny, dict(modules_to_save=["head"]), x),
    "all biases": (Tiny, dict(bias="all"), x),
    "all biases and a head": (Tiny, dict(bias="all", modules_to_save=["head"]), x),
    "biases of the layers": (Tiny, dict(bias="frod_only"), x),
    "all linear": (Tiny, dict(target_modules="all-linear"), x),
    "pattern": (Tiny, dict(target_modules=r".*\.up"), x),
    "one layer": (bert, dict(target_modules=["query"], layers_to_transform=[1]), tokens),
    "classifier": (bert, dict(target_modules=BERT_TARGETS, task_type="SEQ_CLS"), tokens),
    "model's own targets": (bert, dict(target_modules=None), tokens),
    "embeddings": (gpt2, dict(target_modules=["c_attn"], fan_in_fan_out=True), tokens),
    "embeddings, classifier": (bert, dict(target_modules=["query"], task_type="SEQ_CLS"), tokens),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_peft_writes_is_read(tmp_path, name):
    build, kwargs, inputs = LEGITIMATE[name]
    model = frod(build(), **kwargs)
    with torch.no_grad():  # everything that trains, has
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers="embeddings" in name)
    want = model.eval()(inputs())
    with fk.peft.enabled():
        loaded = PeftModel.from_pretrained(build(), tmp_path)
        close(_plain(loaded(inputs())), _plain(want), 1e-4)
        live = frod(build(), **kwargs)
        live.load_adapter(tmp_path, "default")
        if "bias" not in kwargs:  # PEFT allows one adapter with biases
            live.load_adapter(tmp_path, "second")
            live.set_adapter("second")
        live.eval()
    close(_plain(live(inputs())), _plain(want), 1e-4)


def _plain(out):
    return getattr(out, "logits", out)
