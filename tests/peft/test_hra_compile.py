# SPDX-License-Identifier: Apache-2.0
"""A model with swapped HRA layers is one graph, whatever the number of tokens."""

import copy

import pytest
import torch

import frodkernels as fk
from tests.peft.hra_models import Images, hra, images, layers, twins, two
from tests.peft.models import IN, Tiny, close, x


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_a_mixed_convolution_is_one_graph(padding):
    """float32 directions over 16 bits, PEFT's default."""
    weight, x16 = torch.randn(4, 3, 3, 3).bfloat16(), torch.randn(2, 3, 8, 8).bfloat16().requires_grad_()
    u = torch.randn(27, 5, requires_grad=True)

    def adapted(x, u):
        return fk.hra_conv2d(x, weight, u, padding=padding)

    got, want = torch.compile(adapted, backend="aot_eager", fullgraph=True)(x16, u), adapted(x16, u)
    close(got, want, 1e-5)
    for ours, eager in zip(*(torch.autograd.grad(y.sum(), (x16, u)) for y in (got, want)), strict=True):
        close(ours, eager, 1e-5)


@pytest.mark.parametrize("mode", ["train", "eval", "two adapters, Gram-Schmidt", "16 bits"])
def test_one_graph(mode):
    base = Tiny(blocks=1)
    if "two" in mode:
        ours, _ = two(base, second=dict(apply_GS=True, init_weights=False))
        ours.base_model.set_adapter(["default", "other"])
    else:
        ours = hra(base.bfloat16() if "16" in mode else base)
    fk.peft.accelerate(ours)
    ours.train(mode != "eval")
    model = ours.base_model.model
    dtype = model.head.weight.dtype
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (5, 6, 9):
        with torch._dynamo.config.patch(error_on_recompile=T > 5):
            got = compiled(x(T, IN, dtype=dtype))
            close(got, model(x(T, IN, dtype=dtype)), 2e-2 if "16" in mode else 1e-5)
            model.zero_grad()
            got.sum().backward()
    assert all(layer.hra_u["default"].grad.abs().sum() > 0 for layer in layers(ours))


def test_convolutions():
    ours, plain = twins(Images())
    fk.peft.accelerate(ours)
    compiled = torch.compile(ours.base_model.model, backend="aot_eager", fullgraph=True)
    got = compiled(images())
    close(got, plain(images()))
    got.sum().backward()


def test_compiled_evaluation_sees_new_parameters():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    compiled = torch.compile(ours.eval().base_model.model, backend="aot_eager", fullgraph=True)
    plain.eval()
    with torch.no_grad():
        for count in range(3):
            for model in (ours, plain):
                for layer in layers(model):
                    layer.hra_u["default"].data[count] += 1
            close(compiled(x()), plain(x()))


def test_copies_and_merged_models_compile():
    ours, plain = twins(Tiny(blocks=1))
    fk.peft.accelerate(ours)
    twin = copy.deepcopy(ours)
    compiled = torch.compile(twin.base_model.model, backend="aot_eager", fullgraph=True)
    close(compiled(x()), plain(x()))
    twin.merge_adapter()
    close(compiled(x()), plain(x()))
    twin.unmerge_adapter()
    close(compiled(x()), plain(x()))


def test_hooked_base_layers():
    ours, plain = twins(Tiny(blocks=1))
    seen = []
    layers(ours)[0].base_layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fk.peft.accelerate(ours)
    compiled = torch.compile(ours.base_model.model, backend="aot_eager")
    close(compiled(x()), plain(x()))


def test_export():
    ours = hra()
    fk.peft.accelerate(ours)
    model = ours.eval().base_model.model
    T = torch.export.Dim("T", min=2, max=64)
    program = torch.export.export(model, (x(4, IN),), dynamic_shapes=({0: T},))
    for count in (4, 9):
        close(program.module()(x(count, IN)), model(x(count, IN)))
