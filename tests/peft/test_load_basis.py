# SPDX-License-Identifier: Apache-2.0
"""PEFT's loader pairs the file's V with a U solved against another V. Ours does not, and mends what PEFT loaded.

"Another machine" is played by flipping and permuting what torch.linalg.eigh returns while the adapter is made: any
sign and, in a degenerate eigenspace, any order is a right answer of eigh.
"""

import contextlib
import logging

import pytest
import torch
from peft import PeftModel

import frodkernels as fk
from frodkernels.peft.frod_basis import Bases, derive
from frodkernels.peft.frod_layer import FastFrodLinear
from tests.peft.models import Tiny, close, config, frod, gpt2, layers, shake, tokens, x


@contextlib.contextmanager
def another_machine(permute=False):
    original = torch.linalg.eigh

    def eigh(matrix):
        values, vectors = original(matrix)
        signs = torch.ones(len(values))
        signs[::3] = -1
        vectors = vectors * signs
        if permute:
            vectors = vectors.roll(2, 1)
        return values, vectors

    torch.linalg.eigh = eigh
    try:
        yield
    finally:
        torch.linalg.eigh = original


def made_elsewhere(path, model=Tiny, permute=False, inputs=x, **kwargs):
    """Save an adapter made on another machine; returns what its model computes."""
    with another_machine(permute):
        there = frod(model(), **kwargs)
    there.save_pretrained(path)
    out = there.eval()(inputs())
    return getattr(out, "logits", out).detach()


def off(got, want):
    got = getattr(got, "logits", got)
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("permute", [False, True])
def test_pefts_fault_and_our_loader(tmp_path, permute, caplog):
    want = made_elsewhere(tmp_path, permute=permute)
    wrong = PeftModel.from_pretrained(Tiny(), tmp_path)
    assert off(wrong(x()), want) > 0.1
    with fk.peft.enabled(), caplog.at_level(logging.WARNING, logger="frodkernels"):
        right = PeftModel.from_pretrained(Tiny(), tmp_path)
    assert "derived again" in caplog.text and "blocks.0.up" in caplog.text
    assert off(right(x()), want) < 1e-5


def test_the_layer_is_wrong_by_more_than_its_size(tmp_path):
    """The fault itself, in one layer: 140 % is what two unrelated outputs of equal size differ by."""
    with another_machine(permute=True):
        there = frod()
    there.save_pretrained(tmp_path)
    here = PeftModel.from_pretrained(Tiny(), tmp_path)
    a, b = layers(there.eval())[0], layers(here)[0]
    assert torch.equal(a.frod_V["default"], b.frod_V["default"])
    assert torch.equal(a.frod_lambda_l["default"], b.frod_lambda_l["default"])
    assert off(b(x()), a(x())) > 0.5
    fk.peft.accelerate(here)
    assert torch.equal(a.frod_U["default"], b.frod_U["default"])  # not merely close


def test_accelerate_mends_a_model_that_plain_peft_loaded(tmp_path, caplog):
    want = made_elsewhere(tmp_path)
    model = PeftModel.from_pretrained(Tiny(), tmp_path)
    with caplog.at_level(logging.WARNING, logger="frodkernels"):
        report = fk.peft.accelerate(model)
    assert len(report.rederived) == 4 and min(report.rederived.values()) > 0.1
    assert "derived again" in caplog.text and "U re-derived: base_model.model.blocks.0.up (default)" in repr(report)
    assert off(model(x()), want) < 1e-5
    assert not fk.peft.accelerate(model).rederived
    fk.peft.restore(model)  # plain PEFT computes right from here on, too
    assert off(model(x()), want) < 1e-5


def test_merged_by_plain_peft_then_accelerated(tmp_path):
    made_elsewhere(tmp_path)
    model = PeftModel.from_pretrained(Tiny(), tmp_path)
    model.merge_adapter()
    assert len(fk.peft.accelerate(model).rederived) == 4


def test_conv1d(tmp_path):
    kwargs = dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    want = made_elsewhere(tmp_path, gpt2, inputs=tokens, **kwargs)
    with fk.peft.enabled():
        model = PeftModel.from_pretrained(gpt2(), tmp_path)
    assert off(model(tokens()), want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(tmp_path, dtype):
    """The eigenvectors of 16-bit weights are found in float32; what is stored is rounded."""

    def build():
        return Tiny().to(dtype)

    def inputs():
        return x(dtype=dtype)

    want = made_elsewhere(tmp_path, build, inputs=inputs)
    plain = PeftModel.from_pretrained(build(), tmp_path)
    assert off(plain(inputs()), want) > 0.1
    report = fk.peft.accelerate(plain)
    assert report.rederived
    with fk.peft.enabled():
        model = PeftModel.from_pretrained(build(), tmp_path)
    for loaded in (plain, model):
        assert off(loaded(inputs()).float(), want.float()) < 4 * torch.finfo(dtype).eps


def test_untrained_and_trained_models_of_this_machine_keep_their_factors(tmp_path):
    for kwargs in ({}, {"sparse_rate": 0.0}, {"init_weights": False}):
        model = frod(**kwargs)
        model.save_pretrained(tmp_path)
        for candidate in (model, PeftModel.from_pretrained(Tiny(), tmp_path)):
            before = [layer.frod_U["default"].clone() for layer in layers(candidate)]
            assert not fk.peft.accelerate(candidate).rederived
            for layer, U in zip(layers(candidate), before, strict=True):
                assert torch.equal(layer.frod_U["default"], U)


def test_a_load_that_finds_its_own_basis_factors_nothing(tmp_path, monkeypatch):
    want = frod()
    want.save_pretrained(tmp_path)

    def refuse(self, V):
        raise AssertionError("a digest should have sufficed")

    monkeypatch.setattr(Bases, "factored", refuse)
    with fk.peft.enabled():
        model = PeftModel.from_pretrained(Tiny(), tmp_path)
    close(model(x()), want.eval()(x()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_a_trained_model_is_not_a_fault(dtype):
    model = frod().to(dtype)
    assert not fk.peft.accelerate(model).rederived
    model = frod()
    fk.peft.accelerate(model)
    assert not fk.peft.accelerate(model.to(dtype)).rederived


def test_few_rows_leave_null_directions(tmp_path):
    """Fewer stacked rows than columns: V holds a basis of W's null space, where U is normalised rounding."""

    class Narrow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up = torch.nn.Linear(24, 8)

        def forward(self, inputs):
            return self.up(inputs)

    model = frod(Narrow(), target_modules=["up"])
    model.save_pretrained(tmp_path)
    want = model.eval()(x())
    loaded = PeftModel.from_pretrained(Narrow(), tmp_path)
    assert not fk.peft.accelerate(loaded).rederived
    close(loaded(x()), want)


def test_same_bits_as_peft():
    for model in (frod(), frod(Tiny().to(torch.bfloat16))):
        for layer in layers(model):
            W, V = layer.get_base_layer().weight, layer.frod_V["default"]
            U, _ = derive(W, V, Bases())
            want, _ = layer._calculate_frod_u_and_lambda(V, W)
            assert torch.equal(U, want)


def test_singular_basis_takes_pefts_fallback():
    layer = layers(frod())[0]
    V = layer.frod_V["default"].clone()
    V[:, 3] = 0
    U, _ = derive(layer.get_base_layer().weight, V, Bases())
    want, _ = layer._calculate_frod_u_and_lambda(V, layer.get_base_layer().weight)
    close(U, want)


def test_loading_beside_another_adapter(tmp_path):
    """PEFT hands a second adapter the first one's V, so loading the second overwrites the first."""
    want = made_elsewhere(tmp_path)
    plain = frod().eval()
    mine = plain(x())
    plain.load_adapter(tmp_path, "elsewhere")
    assert off(plain(x()), mine) > 0.1  # PEFT: the first adapter is broken
    model = frod().eval()
    with fk.peft.enabled():
        model.load_adapter(tmp_path, "elsewhere")
    close(model(x()), mine, 1e-6)
    model.set_adapter("elsewhere")
    assert off(model(x()), want) < 1e-5
    model.set_adapter("default")
    close(model(x()), mine, 1e-6)


def test_plain_load_into_a_fast_model(tmp_path):
    """load_adapter outside enabled(): the other adapter is safe at once, the new one right from its first use."""
    want = made_elsewhere(tmp_path)
    model = frod().eval()
    mine = model(x())
    fk.peft.accelerate(model)
    model.load_adapter(tmp_path, "elsewhere")
    close(model(x()), mine, 1e-6)
    model.set_adapter("elsewhere")
    assert off(model(x()), want) < 1e-5


def test_weights_loaded_over_an_adapter(tmp_path):
    """load_adapter into an existing adapter replaces its basis in place."""
    want = made_elsewhere(tmp_path)
    with fk.peft.enabled():
        model = frod().eval()
        model(x())
        model.load_adapter(tmp_path, "default")
    assert off(model(x()), want) < 1e-5


def test_without_saved_projections(tmp_path, caplog):
    """Nothing in the file tells which V it was trained with: right on this machine, and said to be unverifiable."""
    model = frod(save_projection=False)
    model.save_pretrained(tmp_path)
    want = model.eval()(x())
    with fk.peft.enabled(), caplog.at_level(logging.WARNING, logger="frodkernels"):
        loaded = PeftModel.from_pretrained(Tiny(), tmp_path)
        close(loaded(x()), want)
        assert "without its projections" in caplog.text
        loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    close(loaded(x()), want)
    assert not fk.peft.accelerate(loaded).rederived


def test_offloaded_base_weight_is_reported_not_guessed():
    model = frod()
    layers(model)[0].get_base_layer().weight = torch.nn.Parameter(torch.empty(40, 24, device="meta"))
    report = fk.peft.accelerate(model)
    assert len(report.swapped) == 4 and "could not be checked" in report.notes[0]


def test_second_adapter_of_another_basis_survives_accelerate(tmp_path):
    made_elsewhere(tmp_path)
    with fk.peft.enabled():
        model = PeftModel.from_pretrained(Tiny(), tmp_path)
        model.add_adapter("fresh", config())
    assert {type(layer) for layer in layers(model)} == {FastFrodLinear}
    shake(model, 3)
    before = model(x())
    assert not fk.peft.accelerate(model).rederived
    assert torch.equal(model(x()), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_basis_overwritten_under_a_live_model(tmp_path, caplog, assign):
    """V alone, by load_state_dict: the next forward has the U that belongs to it."""
    model = frod().eval()
    fk.peft.accelerate(model)
    model(x())
    with torch.no_grad():
        model(x())
    flipped = {}
    for key, V in model.state_dict().items():
        if "frod_V" in key:
            flipped[key] = V * torch.where(torch.arange(len(V)) % 2 == 0, 1.0, -1.0)
    with caplog.at_level(logging.WARNING, logger="frodkernels"):
        model.load_state_dict(flipped, strict=False, assign=assign)
        got = model(x())
    assert "was overwritten" in caplog.text
    for layer in layers(model):
        want, _ = derive(layer.get_base_layer().weight, layer.frod_V["default"], Bases())
        assert torch.equal(layer.frod_U["default"], want)
    with torch.no_grad():
        close(model(x()), got)
    assert not fk.peft.accelerate(model).rederived


def test_moving_and_casting_is_not_overwriting(caplog, monkeypatch):
    model = frod().eval()
    fk.peft.accelerate(model)
    monkeypatch.setattr(Bases, "factored", lambda self, V: pytest.fail("nothing to judge"))
    with caplog.at_level(logging.WARNING, logger="frodkernels"):
        for dtype in (torch.bfloat16, torch.float64):
            model.to(dtype)
            model(x(dtype=dtype))
        model(x(dtype=torch.float64))
    assert not caplog.text


def test_a_basis_that_plain_peft_overwrote_is_said_to_be_lost(tmp_path, caplog):
    made_elsewhere(tmp_path)
    model = frod().eval()
    model.load_adapter(tmp_path, "elsewhere")
    with caplog.at_level(logging.WARNING, logger="frodkernels"):
        report = fk.peft.accelerate(model)
    notes = [note for note in report.notes if "lost" in note]
    assert len(notes) == 2  # one for each category
    assert all("'default'" in note and "'elsewhere'" in note and "load its file again" in note for note in notes)
    assert notes[0] in caplog.text and notes[0] in repr(report)
