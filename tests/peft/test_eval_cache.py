# SPDX-License-Identifier: Apache-2.0
"""In evaluation a swapped model equals PEFT's after every way there is to change a parameter."""

import pytest
import torch

import frodkernels as fk
from tests.peft.models import IN, close, config, layers, shake, twins, x


def both(ours, plain):
    """Building and cached; the same bits each time."""
    with torch.no_grad():
        for shape in ((2, IN), (64, IN)):
            first = ours(x(*shape))
            close(first, plain(x(*shape)))
            assert torch.equal(ours(x(*shape)), first)


@pytest.fixture
def pair():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    ours.eval(), plain.eval()
    both(ours, plain)
    assert all(layer._fast.caches["default"].nbytes for layer in layers(ours))
    return ours, plain


def builds(model):
    """The cached weights, None where there is room for none."""
    entries = [cache._entry for layer in layers(model) for cache in layer._fast.caches.values()]
    return [None if entry is None else entry[1] for entry in entries]


def optimiser_step(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.1)
    model(x()).square().sum().backward()  # still in eval mode
    optimiser.step()


def data_copy(model):
    for layer in layers(model):
        layer.frod_lambda_l["default"].data.copy_(torch.arange(layer.in_features) / 7.0)


def in_place(model):
    with torch.no_grad():
        layers(model)[0].frod_lambda_s_values["default"].add_(0.5)


def averaged(model):
    from torch.optim.swa_utils import AveragedModel

    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    shake(model, 21)
    average.update_parameters(model)
    for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
        p.data.copy_(q.data)


def load(model):
    state = {k: v * 1.5 if "lambda" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def load_assigned(model):
    state = {k: v * 1.5 if "lambda" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def load_basis(model):
    state = {k: v * 1.5 if "frod_V" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def vector(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.nn.utils.parameters_to_vector(parameters)
    torch.nn.utils.vector_to_parameters(flat * 1.2, parameters)


def replaced(model):
    for layer in layers(model):
        layer.frod_lambda_l["default"] = torch.nn.Parameter(layer.frod_lambda_l["default"].detach() * 2)


def train_and_back(model):
    model.train()
    optimiser_step(model)
    model.eval()


def cast_and_back(model):
    model.double()
    shake(model, 22)
    model.float()


def bias(model):
    for layer in layers(model):
        if layer.get_base_layer().bias is not None:
            layer.get_base_layer().bias.data.add_(1)


def basis_in_place(model):
    model.base_model.frod_V["up"]["default"].mul_(1.3)


def factor_in_place(model):
    layers(model)[0].frod_U["default"].mul_(1.3)


CHANGES = [
    optimiser_step, data_copy, in_place, averaged, load, load_assigned, load_basis, vector, replaced, train_and_back,
    cast_and_back, bias, basis_in_place, factor_in_place,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_after(pair, change):
    ours, plain = pair
    for model in pair:
        torch.manual_seed(8)
        change(model)
    both(ours, plain)
    assert all(weight is not None for weight in builds(ours))


def test_adapter_switches(pair):
    ours, plain = pair
    for model in pair:
        torch.manual_seed(3)
        model.add_adapter("other", config(init_weights=False))
    for name in ("other", "default", "other"):
        ours.set_adapter(name), plain.set_adapter(name)
        both(ours.eval(), plain.eval())
    assert all(set(layer._fast.caches) == {"other"} for layer in layers(ours))
    for model in pair:
        model.base_model.set_adapter(["default", "other"])
    both(ours, plain)
    with ours.disable_adapter(), plain.disable_adapter():
        both(ours, plain)
    both(ours, plain)


def test_kept_by_eval_dropped_by_train(pair):
    ours, _ = pair
    weights = builds(ours)
    ours.eval()
    both(*pair)
    assert all(a is b for a, b in zip(weights, builds(ours), strict=True))
    ours.train()
    assert not builds(ours)


def test_a_gradient_never_meets_the_cache(pair):
    ours, plain = pair
    for model in pair:
        inputs = x().requires_grad_()
        model(inputs).square().sum().backward()
        model.grad_of_x = inputs.grad
    close(ours.grad_of_x, plain.grad_of_x)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            close(a.grad, b.grad)


def test_not_in_training_mode():
    ours, plain = twins()
    fk.peft.accelerate(ours)
    with torch.no_grad():
        close(ours.train()(x()), plain.train()(x()))
    assert not builds(ours)


def test_frozen_adapters_are_cached_without_no_grad(pair):
    ours, plain = pair
    fk.peft.invalidate(ours)
    for model in pair:
        model.requires_grad_(False)
    for _ in range(3):
        close(ours(x()), plain(x()))
    assert all(weight is not None for weight in builds(ours))


def test_writing_to_the_frozen_basis_behind_autograd_needs_invalidate(pair):
    ours, plain = pair
    for model in pair:
        model.base_model.frod_V["up"]["default"].data.mul_(1.3)
    fk.peft.invalidate(ours)
    both(ours, plain)


@pytest.mark.parametrize("off", [False, 0])
def test_off(off):
    ours, plain = twins()
    report = fk.peft.accelerate(ours, eval_cache=off)
    assert "eval cache off" in repr(report)
    both(ours.eval(), plain.eval())
    assert not builds(ours)
    fk.peft.accelerate(ours)  # None keeps what an earlier call said
    both(ours, plain)
    assert not builds(ours)
    fk.peft.accelerate(ours, eval_cache=True)
    both(ours, plain)
    assert len(builds(ours)) == 4


def test_bounded():
    ours, plain = twins()
    one = 4 * 24 * 40
    fk.peft.accelerate(ours, eval_cache=2 * one)
    both(ours.eval(), plain.eval())
    assert sum(weight is not None for weight in builds(ours)) == 2
    assert layers(ours)[0]._fast.budget.used == 2 * one
    assert len({id(layer._fast.budget) for layer in layers(ours)}) == 1
    fk.peft.accelerate(ours, eval_cache=one)
    both(ours, plain)
    assert layers(ours)[0]._fast.budget.used == one


def test_functional_call_uses_its_own_parameters(pair):
    ours, plain = pair
    parameters = {k: v.detach() * 1.4 for k, v in ours.named_parameters()}
    with torch.no_grad():
        for _ in range(3):
            got = torch.func.functional_call(ours, parameters, (x(),))
            close(got, torch.func.functional_call(plain, parameters, (x(),)))
    both(ours, plain)


def test_inference_mode(pair):
    ours, plain = pair
    fk.peft.invalidate(ours)
    with torch.inference_mode():
        for _ in range(3):
            close(ours(x()), plain(x()))
    both(ours, plain)


def test_caches_may_come_and_go_in_other_threads():
    import threading

    from frodkernels.nn.eval_cache import CacheBudget, EvalCache

    budget, errors = CacheBudget(10**6), []

    def work():
        try:
            for _ in range(300):
                keep = [EvalCache(budget) for _ in range(5)]
                assert budget.used == 0 and keep
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
