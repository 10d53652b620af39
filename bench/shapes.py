# SPDX-License-Identifier: Apache-2.0
"""Layers of named models, and how many tokens a step of theirs brings."""

from __future__ import annotations

from dataclasses import dataclass

SPARSE_RATE = 0.01  # PEFT's default


@dataclass(frozen=True)
class Shape:
    """A linear layer [n] -> [m] called with T tokens; ``bias`` as the model has it."""

    model: str
    layer: str
    m: int
    n: int
    T: int
    bias: bool

    @property
    def name(self) -> str:
        return f"{self.model} {self.layer}"

    @property
    def nnz(self) -> int:
        """What PEFT samples: off-diagonal entries of S [n, n], at least one."""
        return max(1, int(self.n * self.n * SPARSE_RATE))

    def __str__(self) -> str:
        return f"{self.name} {self.n}->{self.m} T={self.T}"


ATTENTION = Shape("MiniLM-L6", "attention", 384, 384, 4096, True)
UP = Shape("MiniLM-L6", "up", 1536, 384, 4096, True)
DOWN = Shape("MiniLM-L6", "down", 384, 1536, 2048, True)
OPT = Shape("OPT-125M", "attention", 768, 768, 2048, True)
LLAMA_1B = Shape("Llama-3.2-1B", "q_proj", 2048, 2048, 1024, False)
LLAMA_3B = Shape("Llama-3.2-3B", "k_proj", 1024, 3072, 1024, False)
LLAMA_8B = Shape("Llama-3-8B", "q_proj", 4096, 4096, 1024, False)
FLUX = Shape("FLUX.2-klein", "mlp_out", 3072, 9216, 1024, False)

SIZES: dict[str, tuple[Shape, ...]] = {
    "quick": (ATTENTION, DOWN, OPT),
    "default": (ATTENTION, UP, DOWN, OPT, LLAMA_1B, LLAMA_3B),
    "full": (ATTENTION, UP, DOWN, OPT, LLAMA_1B, LLAMA_3B, LLAMA_8B, FLUX),
}
