# SPDX-License-Identifier: Apache-2.0
"""Small models with FRoD adapters, random weights, fixed seeds."""

from __future__ import annotations

import copy
import warnings

import torch
from peft import FrodConfig, PeftModel, get_peft_model
from peft.tuners.frod.layer import FrodLayer
from torch import Tensor, nn

IN, HIDDEN = 24, 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(IN, HIDDEN)
        self.down = nn.Linear(HIDDEN, IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Tiny(nn.Module):
    """Residual blocks and a head: categories "up" (m > n, bias) and "down" (m < n, none)."""

    def __init__(self, seed: int = 0, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(IN, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def config(**kwargs) -> FrodConfig:
    defaults = dict(target_modules=["up", "down"], sparse_rate=0.1, progressbar=False)
    return FrodConfig(**{**defaults, **kwargs})


def shake(model: nn.Module, seed: int = 1) -> None:
    """Move every adapter parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrodLayer):
                for store in (module.frod_lambda_l, module.frod_lambda_s_values):
                    for parameter in store.values():
                        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def frod(model: nn.Module | None = None, **kwargs) -> PeftModel:
    """A PeftModel with a shaken FRoD adapter "default"."""
    model = Tiny() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config(**kwargs))
    shake(model)
    return model


def twins(model: nn.Module | None = None, **kwargs) -> tuple[PeftModel, PeftModel]:
    """(to be accelerated, plain): equal in every bit."""
    model = frod(model, **kwargs)
    return model, copy.deepcopy(model)


def layers(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, FrodLayer)]


def x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    shape = shape or (3, 7, IN)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bert(seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            vocab_size=50,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


BERT_TARGETS = ["query", "key", "value", "dense"]


def gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


def tokens() -> Tensor:
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3))


def close(got: Tensor, want: Tensor, tol: float = 1e-5) -> None:
    """Equal up to ``tol`` of the largest entry."""
    scale = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=tol, atol=tol * max(scale, 1e-30))


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(a, b, strict=True))


def step(model: nn.Module, *args: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """(output, input gradient, {name: gradient}) of one training step."""
    model.zero_grad()
    args = tuple(a.clone().requires_grad_() if a.is_floating_point() else a for a in args)
    out = model(*args)
    out = getattr(out, "logits", out)
    out.square().sum().backward()
    return out.detach(), args[0].grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, plain, *args, tol=1e-5):
    got, want = step(ours, *args), step(plain, *args)
    close(got[0], want[0], tol)
    if want[1] is not None:
        close(got[1], want[1], tol)
    assert got[2].keys() == want[2].keys()
    for name, grad in want[2].items():
        assert got[2][name].dtype == grad.dtype
        # HRA: u's gradient is what is left of larger terms
        torch.testing.assert_close(got[2][name], grad, rtol=1e-4, atol=tol * float(grad.abs().max()) + 1e-5)
