# SPDX-License-Identifier: Apache-2.0
"""Layers of named models, how many tokens a step of theirs brings, and the sizes of the adapters they get."""

from __future__ import annotations

from collections.abc import Iterable
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


@dataclass(frozen=True)
class RankShape(Shape):
    """The layer with an adapter of ``rank`` directions; no sparse matrix."""

    rank: int

    @property
    def nnz(self) -> int:
        return 0

    def __str__(self) -> str:
        return f"{super().__str__()} r={self.rank}"


@dataclass(frozen=True)
class DeltaShape(RankShape):
    """The layer with a sparse change of its weight: as many entries as a LoRA adapter of ``rank`` has parameters."""

    @property
    def nnz(self) -> int:
        return self.rank * (self.m + self.n)


@dataclass(frozen=True)
class SampledShape(Shape):
    """A product [m, n] of T tokens, wanted at ``percent`` of its positions only."""

    percent: float

    @property
    def nnz(self) -> int:
        return max(1, round(self.m * self.n * self.percent / 100))

    def __str__(self) -> str:
        return f"{super().__str__()} {self.percent:g}%"


@dataclass(frozen=True)
class ConvShape(RankShape):
    """A convolution that keeps the image's size, as a layer of n = channels kernel^2 inputs and T = pixels.

    ``size`` is height and width of the one image.
    """

    kernel: int
    size: int

    @property
    def channels(self) -> int:
        return self.n // self.kernel**2


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


def ranked(shape: Shape, *ranks: int) -> tuple[RankShape, ...]:
    """``shape`` with each of the ranks."""
    return tuple(RankShape(**vars(shape), rank=rank) for rank in ranks)


BERT_LARGE = Shape("BERT-large", "attention", 1024, 1024, 1024, True)
OPT_SHORT = Shape("OPT-125M", "attention", 768, 768, 768, True)  # what the peak of memory is measured on, too
LLAMA_1B_KEY = Shape("Llama-3.2-1B", "k_proj", 512, 2048, 1024, False)

_ADAPTED = (OPT_SHORT, BERT_LARGE, LLAMA_1B_KEY, LLAMA_1B)

RANKED: dict[str, tuple[RankShape, ...]] = {
    "quick": (*ranked(OPT_SHORT, 8), *ranked(BERT_LARGE, 32)),
    "default": tuple(shape for base in _ADAPTED for shape in ranked(base, 8, 32)),
    "full": tuple(shape for base in (*_ADAPTED, LLAMA_8B) for shape in ranked(base, 8, 32)),
}

DELTAS: dict[str, tuple[DeltaShape, ...]] = {
    size: tuple(DeltaShape(**vars(base), rank=rank) for base, *ranks in chosen for rank in ranks)
    for size, chosen in {
        "quick": ((OPT_SHORT, 8), (BERT_LARGE, 20)),
        "default": ((OPT_SHORT, 8, 20), (BERT_LARGE, 8, 20), (LLAMA_1B_KEY, 8, 20), (LLAMA_1B, 8, 20, 32)),
        "full": ((OPT_SHORT, 8, 20), (BERT_LARGE, 8, 20), (LLAMA_1B_KEY, 8, 20), (LLAMA_1B, 8, 20, 32), (LLAMA_8B, 20)),
    }.items()
}

# A weight alone, which meets no tokens while adapters are exchanged in it.
MERGED: dict[str, tuple[DeltaShape, ...]] = {
    size: tuple(DeltaShape(**{**vars(base), "T": 0}, rank=rank) for rank in ranks)
    for size, base, ranks in (
        ("quick", LLAMA_1B, (8,)),
        ("default", LLAMA_8B, (8, 16, 32, 64)),
        ("full", LLAMA_8B, (8, 16, 32, 64)),
    )
}

COLUMNS: dict[str, tuple[RankShape, ...]] = {  # the rank is the number of columns
    "quick": ranked(OPT_SHORT, 8),
    "default": tuple(shape for base in (BERT_LARGE, LLAMA_1B_KEY, LLAMA_1B) for shape in ranked(base, 8, 16)),
    "full": tuple(shape for base in (BERT_LARGE, LLAMA_1B_KEY, LLAMA_1B, LLAMA_8B) for shape in ranked(base, 8, 16)),
}

PERCENTS = (0.1, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
SAMPLED: dict[str, tuple[SampledShape, ...]] = {
    size: tuple(SampledShape(**vars(base), percent=percent) for base in bases for percent in percents)
    for size, bases, percents in (
        ("quick", (LLAMA_1B_KEY,), (0.1, 2.0, 20.0)),
        ("default", (LLAMA_1B, LLAMA_3B), PERCENTS),
        ("full", (LLAMA_1B, LLAMA_3B, LLAMA_8B), PERCENTS),
    )
}

CONVOLUTION = ConvShape("Stable Diffusion", "3x3 conv, 32x32", 320, 320 * 9, 1024, True, rank=8, kernel=3, size=32)
CONVOLUTIONS: dict[str, tuple[ConvShape, ...]] = {"quick": (), "default": (CONVOLUTION,), "full": (CONVOLUTION,)}


def without_outputs(shapes: Iterable[Shape]) -> list[Shape]:
    """One shape for each (n, T) and rank: for what does not know m."""
    return list({(s.n, s.T, getattr(s, "rank", 0)): s for s in reversed(list(shapes))}.values())[::-1]
