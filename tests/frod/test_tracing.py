# SPDX-License-Identifier: Apache-2.0
"""frod_linear under torch.compile, export, fake tensors and activation checkpointing."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import frodkernels as fk
from tests.frod.cases import PATHS, make_layer


@pytest.fixture
def dynamo():
    """A clean dynamo in which a second compilation of a frame is an error."""
    import torch._dynamo as dynamo

    dynamo.reset()
    with dynamo.config.patch(error_on_recompile=True):
        yield dynamo
    dynamo.reset()


class Layer(nn.Module):
    """As a user would write one: parameters to train, buffers that stay."""

    def __init__(self, layer, path="auto"):
        super().__init__()
        self.lam, self.values = nn.Parameter(layer.lam), nn.Parameter(layer.values)
        self.bias = nn.Parameter(layer.bias)
        self.register_buffer("U", layer.U)
        self.register_buffer("V", layer.V)
        self.pattern, self.path = layer.pattern, path

    def forward(self, x):
        return fk.frod_linear(x, self.U, self.V, self.lam, self.values, self.pattern, self.bias, path=self.path)


def step(f, x):
    """(output, gradient of x) and the parameters' gradients left in place."""
    x = x.clone().requires_grad_()
    y = f(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def assert_same_step(compiled, module, x):
    module.zero_grad()
    want = step(module, x)
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    got = step(compiled, x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close([p.grad for p in module.parameters()], grads)


@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_one_graph_for_every_number_of_tokens(dynamo, path):
    module = Layer(make_layer(12, 20, 1), path)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 2, 64, 4096, 33):
        assert_same_step(compiled, module, torch.randn(2, T, 20))


@pytest.mark.parametrize("path", PATHS)  # not "auto": eager mode may choose another one, and round elsewhere
def test_one_graph_under_autocast(dynamo, path):
    module = Layer(make_layer(12, 20, 1), path)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 64, 33):
        got, want = step(compiled, x := torch.randn(T, 20)), step(f, x)
        assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
        torch.testing.assert_close(got, want)


def test_inference_compiles_too(dynamo):
    module = Layer(make_layer(12, 20, 1))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for context in (torch.no_grad, torch.inference_mode):
        dynamo.reset()
        for T in (5, 64, 33):
            with context():
                torch.testing.assert_close(compiled(x := torch.randn(T, 20)), module(x))


def test_inductor(dynamo):
    module = Layer(make_layer(12, 20, 1))
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for T in (5, 64, 33):
        assert_same_step(compiled, module, torch.randn(T, 20))


def test_sparse_core_and_frod_weight_compile(dynamo):
    layer = make_layer(12, 20, 9)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def f(z, lam, values):
        W = fk.frod_weight(layer.U, layer.V, lam, values, layer.pattern)
        return fk.sparse_core(z, lam, values, layer.pattern) @ W.t()

    for T in (5, 64, 33):
        layer.leaves("lam", "values")
        z = torch.randn(T, 20)
        W = fk.frod_weight(layer.U, layer.V, layer.lam, layer.values, layer.pattern)
        want = fk.sparse_core(z, layer.lam, layer.values, layer.pattern) @ W.t()
        got = f(z, layer.lam, layer.values)
        torch.testing.assert_close(got, want)
        leaves = [layer.lam, layer.values]
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), rtol=1e-4, atol=1e-4
        )


def test_bad_arguments_are_named_while_compiling(dynamo):
    module = Layer(make_layer(12, 20, 1))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"x must be \[\.\.\., 20\]"):
        compiled(torch.randn(3, 19))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_export(path, strict):
    module = Layer(make_layer(12, 20, 1), path).eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(6, 20),), dynamic_shapes=({0: tokens},), strict=strict)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert "frodkernels.sparse_core.default" in {str(node.target) for graph in graphs for node in graph.nodes}
    for T in (2, 33, 1000):
        x = torch.randn(T, 20)
        torch.testing.assert_close(program.module()(x), module(x))


def test_export_saves_and_loads(tmp_path):
    module = Layer(make_layer(12, 20, 1)).eval()
    program = torch.export.export(module, (x := torch.randn(6, 20),))
    torch.export.save(program, tmp_path / "layer.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "layer.pt2").module()(x), module(x))


@pytest.mark.parametrize("path", ["auto", *PATHS])
@pytest.mark.parametrize("lead", [(7,), (0,), (2, 3)], ids=str)
def test_fake_tensors(path, lead):
    layer = make_layer(12, 20, *lead, dtype=torch.bfloat16, param_dtype=torch.float32)
    layer.leaves()
    real = layer(path=path)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name in ("x", "U", "V", "lam", "values", "bias"):
            setattr(layer, name, mode.from_tensor(getattr(layer, name)))
        fake = layer(path=path)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        fake.sum().backward()
    for name in ("x", "lam", "values", "bias"):
        leaf = getattr(layer, name)
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_meta_tensors(path):
    """A model built on meta tensors can be run for its shapes; the pattern goes along."""
    layer = make_layer(12, 20, 2, 3)
    for name in ("x", "U", "V", "lam", "values", "bias"):
        setattr(layer, name, getattr(layer, name).to("meta"))
    layer.leaves()
    y = layer(path=path)
    assert y.is_meta and y.shape == (2, 3, 12)
    y.sum().backward()
    assert layer.values.grad.is_meta and layer.values.grad.shape == layer.values.shape


def test_functional_call_works_and_functorch_says_that_it_does_not():
    """An autograd.Function whose forward takes ctx is refused by torch.func: with an error, not with a wrong number."""
    layer = make_layer(12, 20, 5)
    module = Layer(layer)
    doubled = {name: 2 * p for name, p in module.named_parameters()}  # lam, values and bias: the map doubles
    torch.testing.assert_close(torch.func.functional_call(module, doubled, (layer.x,)), 2 * module(layer.x))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: module(x).sum())(layer.x)


# ---- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_checkpointing_changes_no_bit(path, use_reentrant):
    module = Layer(make_layer(12, 20, 1), path)
    x = torch.randn(30, 20)
    want = step(module, x)
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    got = step(lambda x: checkpoint(module, x, use_reentrant=use_reentrant), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), grads, strict=True))


def test_checkpointing_under_autocast():
    module = Layer(make_layer(12, 20, 1))
    x = torch.randn(30, 20)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    want = step(f, x)
    got = step(lambda x: checkpoint(f, x, use_reentrant=False), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_checkpointing_compiles(dynamo):
    module = Layer(make_layer(12, 20, 1))

    def f(x):
        return checkpoint(module, x, use_reentrant=False)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 64):
        assert_same_step(compiled, module, torch.randn(T, 20))
