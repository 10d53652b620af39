# SPDX-License-Identifier: Apache-2.0
"""FLUX.2's transformer for machines without diffusers: its linear layers, names and sizes, in plain blocks.

A stand-in for timing adapters, not the model: no modulation, no rotary embedding, no norm of queries and keys. The
adapted layers, the tokens and the attention are those of the architecture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint


def _linear(n: int, m: int) -> nn.Linear:
    return nn.Linear(n, m, bias=False)


def _normed(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:])


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        inner = int(width * ratio)
        self.linear_in, self.linear_out = _linear(width, 2 * inner), _linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.linear_in(x).chunk(2, -1)
        return self.linear_out(silu(gate) * value)


class JointAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (_linear(width, width) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (_linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([_linear(width, width), nn.Dropout(0.0)])
        self.to_add_out = _linear(width, width)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        pairs = (
            (self.add_q_proj, self.to_q),
            (self.add_k_proj, self.to_k),
            (self.add_v_proj, self.to_v),
        )
        q, k, v = (torch.cat([of_text(text), of_image(image)], 1) for of_text, of_image in pairs)
        out = _attend(q, k, v, self.heads)
        words = text.shape[1]
        return self.to_out[0](out[:, words:]), self.to_add_out(out[:, :words])


class DoubleBlock(nn.Module):
    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.attn = JointAttention(width, heads)
        self.ff, self.ff_context = FeedForward(width, ratio), FeedForward(width, ratio)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        more_image, more_text = self.attn(_normed(image), _normed(text))
        image, text = image + more_image, text + more_text
        return image + self.ff(_normed(image)), text + self.ff_context(_normed(text))


class ParallelAttention(nn.Module):
    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.heads, self.width, self.inner = heads, width, int(width * ratio)
        self.to_qkv_mlp_proj = _linear(width, 3 * width + 2 * self.inner)
        self.to_out = _linear(width + self.inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate, value = self.to_qkv_mlp_proj(x).split([self.width] * 3 + [self.inner] * 2, -1)
        return self.to_out(torch.cat([_attend(q, k, v, self.heads), silu(gate) * value], -1))


class SingleBlock(nn.Module):
    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.attn = ParallelAttention(width, heads, ratio)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(_normed(x))


class StandIn(nn.Module):
    """Takes diffusers' configuration and arguments of ``Flux2Transformer2DModel``; ignores what it has no use for."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        heads, ratio = config["num_attention_heads"], config["mlp_ratio"]
        width = heads * config["attention_head_dim"]
        self.x_embedder = _linear(config["in_channels"], width)
        self.context_embedder = _linear(config["joint_attention_dim"], width)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(width, heads, ratio) for _ in range(config["num_layers"]))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, heads, ratio) for _ in range(config["num_single_layers"])
        )
        self.proj_out = _linear(width, config["in_channels"])
        self.checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        self.checkpointing = True

    def _call(self, block: nn.Module, *tensors: Tensor) -> Any:
        return checkpoint(block, *tensors, use_reentrant=False) if self.checkpointing else block(*tensors)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            image, text = self._call(block, image, text)
        x = torch.cat([text, image], 1)
        for block in self.single_transformer_blocks:
            x = self._call(block, x)
        return (self.proj_out(_normed(x[:, text.shape[1] :])),)
