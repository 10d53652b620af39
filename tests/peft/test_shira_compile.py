# SPDX-License-Identifier: Apache-2.0
"""A model with swapped SHiRA layers is one graph, whatever the number of tokens."""

import copy

import pytest
import torch

import frodkernels as fk
from tests.peft.models import IN, Tiny, close, x
from tests.peft.shira_models import layers, set_scale, shira, twins, two


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["train", "eval", "two adapters", "16 bits", "not planned yet"])
def test_one_graph(mode):
    base = Tiny(blocks=1)
    if "two" in mode:
        ours, _ = two(base)
        ours.base_model.set_adapter(["default", "other"])
    else:
        ours = shira(base.bfloat16() if "16" in mode else base)
    fk.peft.accelerate(ours)
    ours.train(mode != "eval")
    model = ours.base_model.model
    if "planned" in mode:
        model = copy.deepcopy(model)
    dtype = model.head.weight.dtype
    compiled = torch.compile(model, backend="aot_eager", fullgraph="planned" not in mode, dynamic=True)
    for T in (5, 6, 9):
        with torch._dynamo.config.patch(error_on_recompile=T > 5 and "planned" not in mode):
            got = compiled(x(T, IN, dtype=dtype))
            close(got, model(x(T, IN, dtype=dtype)), 2e-2 if "16" in mode else 1e-5)
            model.zero_grad()
            got.sum().backward()
    assert all(layer.shira_weight["default"].grad.abs().sum() > 0 for layer in layers(model))


def test_scales_that_change():
    ours, plain = twins(Tiny(blocks=1))
    fk.peft.accelerate(ours)
    compiled = torch.compile(ours.base_model.model, backend="aot_eager", fullgraph=True)
    for scale in (1.0, 0.5, -2.0, 0.0, 3):
        set_scale(ours, "default", scale), set_scale(plain, "default", scale)
        close(compiled(x()), plain(x()))
        ours.zero_grad(), plain.zero_grad()
        compiled(x()).sum().backward(), plain(x()).sum().backward()
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_compiled_evaluation_sees_new_parameters():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    compiled = torch.compile(ours.eval().base_model.model, backend="aot_eager", fullgraph=True)
    plain.eval()
    with torch.no_grad():
        for count in range(3):
            for model in (ours, plain):
                for layer in layers(model):
                    layer.shira_weight["default"].data[count] += 1
            close(compiled(x()), plain(x()))
    assert not any(layer._fast.cache.nbytes for layer in layers(ours))


def test_adapter_switches_and_merges():
    ours, plain = two(Tiny(blocks=1))
    fk.peft.accelerate(ours)
    compiled = torch.compile(ours.base_model.model, backend="aot_eager", fullgraph=True)
    for name in ("default", "other"):
        ours.set_adapter(name), plain.set_adapter(name)
        close(compiled(x()), plain(x()))
    ours.merge_adapter()
    close(compiled(x()), plain(x()))
    ours.unmerge_adapter()
    close(compiled(x()), plain(x()))


def test_hooked_base_layers():
    ours, plain = twins(Tiny(blocks=1))
    layers(ours)[0].base_layer.register_forward_hook(lambda module, args, out: None)
    fk.peft.accelerate(ours)
    compiled = torch.compile(ours.base_model.model, backend="aot_eager")
    close(compiled(x()), plain(x()))


def test_export():
    ours = shira()
    fk.peft.accelerate(ours)
    model = ours.eval().base_model.model
    T = torch.export.Dim("T", min=2, max=64)
    program = torch.export.export(model, (x(4, IN),), dynamic_shapes=({0: T},))
    for count in (4, 9):
        close(program.module()(x(count, IN)), model(x(count, IN)))
