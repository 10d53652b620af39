# SPDX-License-Identifier: Apache-2.0
"""A swapped model is one graph, whatever the number of tokens."""

import copy

import pytest
import torch

import frodkernels as fk
from tests.peft.models import IN, Tiny, bert, close, config, frod, layers, tokens, twins, x


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["train", "eval", "two adapters, dropout"])
def test_one_graph(mode):
    dropout = 0.3 if "dropout" in mode else 0.0
    ours = frod(Tiny(blocks=1), frod_dropout=dropout)
    if "two" in mode:
        ours.add_adapter("other", config(frod_dropout=dropout))
        ours.base_model.set_adapter(["default", "other"])
    fk.peft.accelerate(ours)
    ours.train(mode != "eval")
    model = ours.base_model.model
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (5, 6, 9):
        with torch._dynamo.config.patch(error_on_recompile=T > 5):
            torch.manual_seed(1)
            got = compiled(x(T, IN))
            torch.manual_seed(1)
            close(got, model(x(T, IN)))
            got.sum().backward()


def test_compiled_evaluation_sees_new_parameters():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    compiled = torch.compile(ours.eval().base_model.model, backend="aot_eager", fullgraph=True)
    plain.eval()
    with torch.no_grad():
        for scale in (1.0, 2.0, 3.0):
            for model in (ours, plain):
                for layer in layers(model):
                    layer.frod_lambda_l["default"].data.mul_(scale)
            close(compiled(x()), plain(x()))


def test_transformers_model():
    ours = frod(bert(), target_modules=["query"], layers_to_transform=[0])
    plain = copy.deepcopy(ours)
    fk.peft.accelerate(ours)
    compiled = torch.compile(ours, backend="aot_eager")
    close(compiled(tokens()).logits, plain(tokens()).logits)


def test_copies_compile():
    """At once, with a break in the graph to plan; as one graph after an eager call."""
    ours = frod(Tiny(blocks=1))
    fk.peft.accelerate(ours)
    twin = copy.deepcopy(ours)
    close(torch.compile(twin.base_model.model, backend="eager")(x()), ours(x()))
    torch._dynamo.reset()
    twin = copy.deepcopy(ours)
    twin(x())
    compiled = torch.compile(twin.base_model.model, backend="aot_eager", fullgraph=True)
    close(compiled(x()), ours(x()))


def test_export():
    ours = frod()
    fk.peft.accelerate(ours)
    model = ours.eval().base_model.model
    want = model(x(4, IN))
    T = torch.export.Dim("T", min=2, max=64)
    program = torch.export.export(model, (x(4, IN),), dynamic_shapes=({0: T},))
    close(program.module()(x(4, IN)), want)
    close(program.module()(x(9, IN)), model(x(9, IN)))
