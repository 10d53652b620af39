# SPDX-License-Identifier: Apache-2.0
"""PaCA's module: columns trained in place, one product each way, and its state."""

import copy

import pytest
import torch
import torch.nn.functional as F

from frodkernels.nn.paca import PaCALinear

M, N, K = 12, 20, 4


def make(bias=True, dtype=torch.float32, **kwargs):
    return PaCALinear.from_linear(torch.nn.Linear(N, M, bias=bias, dtype=dtype), K, **kwargs)


def test_it_starts_as_the_layer_it_adapts_and_shares_its_weight():
    linear = torch.nn.Linear(N, M)
    want = linear(torch.ones(3, N)).detach()
    layer = PaCALinear.from_linear(linear, K)
    assert torch.equal(layer(torch.ones(3, N)), want)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["column_weight"]
    assert layer.columns.tolist() == sorted(set(layer.columns.tolist())) and layer.columns.numel() == K


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_trains_as_a_layer_whose_other_columns_are_frozen(bias, dtype):
    layer = make(bias, dtype)
    full = torch.nn.Linear(N, M, bias=bias, dtype=dtype)
    full.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    frozen = layer.weight.detach().clone()
    optimisers = [torch.optim.AdamW(p, lr=0.1, weight_decay=0.0) for p in ([layer.column_weight], full.parameters())]
    others = [j for j in range(N) if j not in layer.columns]
    for _ in range(5):
        x, target = torch.randn(7, N, dtype=dtype), torch.randn(7, M, dtype=dtype)
        for model, optimiser in zip((layer, full), optimisers, strict=True):
            optimiser.zero_grad()
            F.mse_loss(model(x), target).backward()
            if model is full:
                model.weight.grad[:, others] = 0
                if bias:
                    model.bias.grad.zero_()
            optimiser.step()
        torch.testing.assert_close(layer(x), full(x))
    assert torch.equal(layer.weight[:, others], frozen[:, others])
    assert not torch.equal(layer.weight[:, layer.columns], frozen[:, layer.columns])


def test_only_the_chosen_inputs_are_kept():
    layer = make()
    x = torch.randn(30, N, requires_grad=True)
    live = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), layer.columns)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in live] == [(30, K)]


def test_called_twice_before_the_backward():
    """Shared layers and accumulated gradients: what is written again are the same numbers."""
    layer = make()
    a, b = torch.randn(3, N), torch.randn(4, N)
    ya, yb = layer(a), layer(b)
    (ya.sum() + yb.sum()).backward()
    want = torch.ones(M, 7).float() @ torch.cat([a, b])[:, layer.columns]
    torch.testing.assert_close(layer.column_weight.grad, want)


def test_a_parameter_changed_between_forward_and_backward_is_noticed():
    layer = make()
    y = layer(torch.randn(3, N, requires_grad=True))
    with torch.no_grad():
        layer.column_weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_every_backward_has_the_columns_of_its_own_forward():
    """W is shared by calls with other columns in between: averaged weights, functional_call, two layers of one W."""
    layer = make(dtype=torch.float64)
    first, second = (torch.randn(M, K, dtype=torch.float64) for _ in range(2))
    x = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    y = torch.func.functional_call(layer, {"column_weight": first}, (x,))
    torch.func.functional_call(layer, {"column_weight": second}, (x.detach(),))
    (got,) = torch.autograd.grad(y.sum(), x)
    weight = layer.weight.detach().clone().index_copy(1, layer.columns, first)
    torch.testing.assert_close(got, weight.sum(0).expand(3, N))


def test_a_layer_that_is_more_than_its_weight_is_refused():
    class Tripled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    hooked = torch.nn.Linear(N, M)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    for linear in (Tripled(N, M), hooked):
        with pytest.raises(ValueError, match="^linear must be a plain"):
            PaCALinear.from_linear(linear, K)


def test_a_weight_that_wants_a_gradient_is_refused():
    layer = make().requires_grad_(True)
    with pytest.raises(NotImplementedError, match="^weight requires grad"):
        layer(torch.randn(3, N))
    with pytest.raises(ValueError, match="^x must be"):
        layer(torch.ones(3, N, dtype=torch.int32))


def test_it_exports():
    layer, x = make(), torch.randn(3, N)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_writes_behind_autograds_back_are_seen():
    layer = make()
    layer.column_weight.data.copy_(torch.randn(M, K))
    x = torch.randn(3, N)
    weight = layer.weight.detach().clone().index_copy(1, layer.columns, layer.column_weight.detach())
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wider_columns_over_a_narrow_weight(dtype):
    layer = make(dtype=dtype)
    layer.column_weight = torch.nn.Parameter(layer.column_weight.detach().float() + 1e-3)
    x = torch.randn(5, N).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert layer.column_weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.column_weight.grad, x[:, layer.columns].float().sum(0).expand(M, K))


def test_merge_copies_and_state_dict():
    layer = make()
    with torch.no_grad():
        layer.column_weight.normal_()
    x = torch.randn(3, N)
    merged = layer.merge()
    assert type(merged) is torch.nn.Linear and merged.weight.data_ptr() != layer.weight.data_ptr()
    assert torch.equal(merged(x), layer(x))
    other = make()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and torch.equal(other.columns, layer.columns)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.column_weight.zero_()
    assert not torch.equal(twin(x), layer(x))
    state = layer.state_dict()
    state["columns"] = torch.tensor([0, 1, 2, N])
    with pytest.raises(ValueError, match=r"^columns\[3\]"):
        other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_it_compiles():
    layer = make(dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        with torch.no_grad():
            layer.column_weight.add_(0.5)
        got = torch.autograd.grad(compiled(x).square().sum(), (x, layer.column_weight))
        want = torch.autograd.grad(layer(x).square().sum(), (x, layer.column_weight))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "arguments, name",
    [
        (dict(k=0), "k"),
        (dict(k=N + 1), "k"),
        (dict(k=True), "k"),
        (dict(columns=torch.tensor([0, 0])), r"columns\["),
        (dict(columns=torch.tensor([-1])), r"columns\["),
        (dict(columns=torch.tensor([0.5])), "columns"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        PaCALinear.from_linear(torch.nn.Linear(N, M), **arguments)
    with pytest.raises(ValueError, match="^linear "):
        PaCALinear.from_linear(torch.nn.ReLU())
    with pytest.raises(ValueError, match="^x must be"):
        make()(torch.randn(3, N + 1))


def test_repr():
    assert repr(make()) == f"PaCALinear(in_features={N}, out_features={M}, columns={K}, bias=True)"
