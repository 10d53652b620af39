# SPDX-License-Identifier: Apache-2.0
"""HRA's functions under torch.compile, export, fake tensors and activation checkpointing."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import frodkernels as fk
from tests.householder.cases import Chain, Conv, make_chain, make_conv, make_layer


@pytest.fixture
def dynamo():
    """A clean dynamo in which a second compilation of a frame is an error."""
    import torch._dynamo as dynamo

    dynamo.reset()
    with dynamo.config.patch(error_on_recompile=True):
        yield dynamo
    dynamo.reset()


class Module(nn.Module):
    """As a user would write one: everything but x is a parameter. ``options`` go to the function."""

    def __init__(self, case, **options):
        super().__init__()
        self.kind, self.options = type(case), options
        for name, tensor in case.tensors().items():
            if name != "x":
                setattr(self, name, nn.Parameter(tensor))
        if self.kind is Conv:
            self.options |= case.options

    def forward(self, x):
        if self.kind is Chain:
            return fk.householder(x, self.u, **self.options)
        function = fk.hra_conv2d if self.kind is Conv else fk.hra_linear
        return function(x, self.weight, self.u, self.bias, **self.options)


f32 = dict(dtype=torch.float32)


def modules():
    """name -> (module, T -> x)"""
    chain, layer = make_chain(20, 4, 1, **f32), make_layer(12, 20, 4, 1, **f32)
    conv = make_conv(5, 3, (3, 2), 4, (1, 4, 4), **f32, stride=2, padding=1)
    tokens = lambda T: torch.randn(2, T, 20)  # noqa: E731
    images = lambda T: torch.randn(2, 3, T + 3, 9)  # noqa: E731
    return {
        "chain": (Module(chain, transpose=True), tokens),
        "orthogonalized": (Module(layer, orthogonalize=True), tokens),
        "auto": (Module(layer), tokens),
        "input": (Module(layer, side="input"), tokens),
        "output": (Module(layer, side="output"), tokens),
        "conv": (Module(conv), images),
    }


every = pytest.mark.parametrize("name", list(modules()))


def step(f, x):
    """(output, gradient of x); the parameters' gradients are left in place."""
    x = x.clone().requires_grad_()
    y = f(x)
    y.float().square().mul(torch.linspace(0, 1, y.shape[-1])).sum().backward()
    return y.detach(), x.grad


def assert_same_step(compiled, module, x):
    module.zero_grad()
    want = step(module, x)
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    got = step(compiled, x)
    near = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, want, **near)
    torch.testing.assert_close([p.grad for p in module.parameters()], grads, **near)


@every
def test_one_graph_for_every_number_of_tokens(dynamo, name):
    module, make = modules()[name]
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 2, 64, 333):
        assert_same_step(compiled, module, make(T))


@pytest.mark.parametrize("side", ["input", "output"])
def test_one_graph_under_autocast(dynamo, side):
    module, _ = modules()[side]

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 64, 33):
        x = torch.randn(T, 20)
        got, want = step(compiled, x), step(f, x)
        assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
        torch.testing.assert_close(got, want)


def test_inference_compiles_too(dynamo):
    module, make = modules()["auto"]
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for context in (torch.no_grad, torch.inference_mode):
        dynamo.reset()
        for T in (5, 64):
            with context():
                torch.testing.assert_close(compiled(x := make(T)), module(x), rtol=1e-5, atol=1e-5)


def test_a_rank_deficient_chain_compiles_without_a_warning(dynamo):
    """Asking would break the graph."""
    u = make_chain(20, 2, 1, **f32).u.repeat_interleave(2, dim=1)
    compiled = torch.compile(fk.householder, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="u is rank-deficient")
        compiled(torch.randn(5, 20), u, orthogonalize=True)


def test_the_penalty_compiles(dynamo):
    compiled = torch.compile(fk.orthogonality_penalty, fullgraph=True, backend="aot_eager")
    (u,) = make_chain(20, 5, 1, **f32).leaves("u")
    got, want = compiled(u), fk.orthogonality_penalty(u)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, u), torch.autograd.grad(want, u))


def test_bad_arguments_are_named_while_compiling(dynamo):
    module, _ = modules()["auto"]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"weight must be \[m, 19\]"):
        compiled(torch.randn(3, 19))


@pytest.mark.parametrize("name, strict", [("orthogonalized", False), ("auto", True), ("auto", False), ("conv", False)])
def test_export(name, strict):
    module, make = modules()[name]
    module.eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = {2: 2 * tokens} if name == "conv" else {1: tokens}
    x = torch.randn(2, 3, 12, 9) if name == "conv" else make(6)
    program = torch.export.export(module, (x,), dynamic_shapes=(shapes,), strict=strict)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    op = "reflect" if name == "auto" else "householder"
    assert f"frodkernels.{op}.default" in {str(node.target) for graph in graphs for node in graph.nodes}
    for T in (4, 34, 100):
        x = torch.randn(2, 3, T, 9) if name == "conv" else make(T)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-4)


def test_export_saves_and_loads(tmp_path):
    module, make = modules()["auto"]
    program = torch.export.export(module.eval(), (x := make(6),))
    torch.export.save(program, tmp_path / "layer.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "layer.pt2").module()(x), module(x), rtol=1e-4, atol=1e-4)


# ---- without numbers -------------------------------------------------------------------------------------------------


def cases(*lead):
    half = dict(dtype=torch.bfloat16, param_dtype=torch.float32)
    chain, layer = make_chain(20, 4, *lead, **half), make_layer(12, 20, 4, *lead, **half)
    yield chain, {"transpose": True}
    yield chain, {"orthogonalize": True}
    yield from ((layer, {"side": side}) for side in ("auto", "input", "output"))
    yield layer, {"orthogonalize": True}
    yield make_conv(5, 3, (3, 2), 4, (*lead[:1], 7, 9), **half, padding=1), {}


@pytest.mark.parametrize("lead", [(7,), (0,), (2, 3)], ids=str)
def test_fake_tensors(lead):
    for case, options in cases(*lead):
        case.leaves()
        real = case(**options)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            for name, tensor in case.tensors().items():
                setattr(case, name, mode.from_tensor(tensor))
            fake = case(**options)
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
            fake.sum().backward()
        for leaf in case.tensors().values():
            assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


def test_meta_tensors():
    """A model built on meta tensors can be run for its shapes."""
    for case, options in cases(2, 3):
        real = case(**options)
        case = case.to("meta")
        case.leaves()
        y = case(**options)
        assert y.is_meta and (y.shape, y.dtype) == (real.shape, real.dtype)
        y.sum().backward()
        assert case.u.grad.is_meta and case.u.grad.shape == case.u.shape
        penalty = fk.orthogonality_penalty(case.u)
        assert penalty.is_meta and penalty.shape == ()


@every
def test_functorch_says_that_it_cannot(name):
    """An autograd.Function whose forward takes ctx is refused by torch.func: with an error, not with a wrong number."""
    module, make = modules()[name]
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: module(x).sum())(make(5))


# ---- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@every
def test_checkpointing_changes_no_bit(name, use_reentrant):
    module, make = modules()[name]
    x = make(30)
    want = step(module, x)
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    got = step(lambda x: checkpoint(module, x, use_reentrant=use_reentrant), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), grads, strict=True))


def test_checkpointing_under_autocast():
    module, make = modules()["auto"]

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    want = step(f, x := make(30))
    got = step(lambda x: checkpoint(f, x, use_reentrant=False), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_checkpointing_compiles(dynamo):
    module, make = modules()["auto"]
    compiled = torch.compile(
        lambda x: checkpoint(module, x, use_reentrant=False), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for T in (5, 64):
        assert_same_step(compiled, module, make(T))
