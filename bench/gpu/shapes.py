# SPDX-License-Identifier: Apache-2.0
"""What is measured, and at which sizes: most important first, for a run may be stopped at any time.

n: features that enter a layer, and the size of S; m: features that leave it; T: tokens of a step. MetaMathQA's recipe
has 4 texts of up to 768 tokens; FLUX.2-klein's 512 x 512 pictures are 1024 tokens beside 512 of text, twice a batch; at
1024 x 1024, 4096 beside 512.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.shapes import SPARSE_RATE, RankShape, Shape


@dataclass(frozen=True)
class Sized(Shape):
    """A shape with a density of its own."""

    rate: float = SPARSE_RATE

    @property
    def nnz(self) -> int:
        return max(1, int(self.n * self.n * self.rate))

    def __str__(self) -> str:
        return f"{super().__str__()} {100 * self.rate:g} %"


def _core(model: str, layer: str, n: int, T: int, rate: float = SPARSE_RATE) -> Sized:
    return Sized(model, layer, n, n, T, False, rate)


# z [n, T]; the first two are those of the roofline's goals
CORE = (
    _core("Llama-3-8B", "hidden", 4096, 8192),
    _core("FLUX.2-klein", "mlp_out", 9216, 4608),
    _core("Llama-3.2-3B", "hidden", 3072, 3072),
    _core("FLUX.2-klein", "hidden", 3072, 3072),
    _core("Llama-3.2-3B", "mlp", 8192, 3072),
    _core("Llama-3-8B", "mlp", 14336, 8192),
    _core("Llama-3.2-3B", "short", 3072, 256),
    _core("Llama-3.2-3B", "decode", 3072, 4),
)
RATES = (0.005, 0.02, 0.03, 0.05, 0.10)  # beside the default 1 %: where does a dense product win?
SWEEP = tuple(_core("sweep", "hidden", n, T, rate) for n, T in ((4096, 8192), (9216, 4608)) for rate in RATES)

LAYERS = tuple(
    Sized(model, layer, m, n, T, False)
    for model, layer, m, n, T in (
        ("Llama-3.2-3B", "q_proj", 3072, 3072, 3072),
        ("Llama-3.2-3B", "v_proj", 1024, 3072, 3072),
        ("FLUX.2-klein", "linear_out", 3072, 9216, 3072),
        ("FLUX.2-klein", "to_qkv_mlp_proj", 27648, 3072, 3072),
        ("FLUX.2-klein", "linear_in", 18432, 3072, 2048),
        ("FLUX.2-klein", "to_q", 3072, 3072, 2048),
        ("Llama-3.2-3B", "up_proj", 8192, 3072, 3072),
        ("Llama-3.2-3B", "down_proj", 3072, 8192, 3072),
        ("Llama-3-8B", "q_proj", 4096, 4096, 8192),
        ("Llama-3-8B", "v_proj", 1024, 4096, 8192),
        ("Llama-3-8B", "up_proj", 14336, 4096, 8192),
        ("Llama-3-8B", "down_proj", 4096, 14336, 8192),
    )
)

# Chained reflections: alone (m = n), and in a layer. The first two are those of the roofline's goals.
REFLECTIONS = tuple(
    RankShape(model, layer, n, n, T, False, rank)
    for model, layer, n, T, rank in (
        ("Llama-3-8B", "hidden", 4096, 8192, 8),
        ("Llama-3-8B", "hidden", 4096, 8192, 32),
        ("FLUX.2-klein", "mlp_out", 9216, 4608, 32),
        ("Llama-3.2-3B", "hidden", 3072, 3072, 32),
        ("Llama-3.2-3B", "hidden", 3072, 3072, 128),
        ("Llama-3.2-3B", "decode", 3072, 4, 32),
    )
)
REFLECTED = tuple(
    RankShape(model, layer, m, n, T, False, 32)
    for model, layer, m, n, T in (
        ("Llama-3.2-3B", "q_proj", 3072, 3072, 3072),
        ("FLUX.2-klein", "linear_out", 3072, 9216, 3072),
        ("FLUX.2-klein", "to_qkv_mlp_proj", 27648, 3072, 3072),
        ("Llama-3-8B", "v_proj", 1024, 4096, 8192),
    )
)

QUICK_REFLECTIONS, QUICK_REFLECTED = REFLECTIONS[:2], REFLECTED[:1]
DRY_REFLECTED = (RankShape("Tiny", "q_proj", 16, 16, 20, False, 3),)
QUICK_CORE, QUICK_SWEEP, QUICK_LAYERS = CORE[:3], tuple(s for s in SWEEP if s.n == 4096)[::2], LAYERS[:3]
DRY_CORE = (_core("Tiny", "hidden", 16, 20, 0.05),)
DRY_LAYERS = (Sized("Tiny", "q_proj", 12, 16, 20, False, 0.05),)


@dataclass(frozen=True)
class Job:
    """One group of contestants."""

    op: str
    mode: str
    shape: Sized | RankShape
    dtype: str

    @property
    def id(self) -> str:
        return f"{self.op}/{self.mode}/{self.shape}/{self.dtype}"


def jobs(dry_run: bool = False, quick: bool = False) -> list[Job]:
    """bfloat16 first, the adapters' own case; float16 and float32 after it, the sweep in between. The gradients of the
    parameters alone are in bfloat16 only, for the comparison with their model."""
    if dry_run:
        modes = ("forward", "transpose", "parameters", "backward")
        found = [Job("sparse_core", mode, shape, "float32") for shape in DRY_CORE for mode in modes]
        found += [Job("frod_linear", "step", shape, "float32") for shape in DRY_LAYERS]
        return found + [Job(op, "step", s, "float32") for s in DRY_REFLECTED for op in ("householder", "hra_linear")]
    core, sweep, layers = (QUICK_CORE, QUICK_SWEEP, QUICK_LAYERS) if quick else (CORE, SWEEP, LAYERS)
    reflections, reflected = (QUICK_REFLECTIONS, QUICK_REFLECTED) if quick else (REFLECTIONS, REFLECTED)
    found = []
    for dtype in ("bfloat16", "float32") if quick else ("bfloat16", "float16", "float32"):
        modes = ("forward", "backward", "transpose", *(["parameters"] if dtype == "bfloat16" else []))
        found += [Job("sparse_core", mode, shape, dtype) for shape in core for mode in modes]
        found += [Job("frod_linear", mode, shape, dtype) for shape in layers for mode in ("step", "forward")]
        found += [Job("householder", mode, shape, dtype) for shape in reflections for mode in ("forward", "step")]
        if dtype != "float16":
            found += [Job("hra_linear", mode, shape, dtype) for shape in reflected for mode in ("step", "forward")]
            found += [Job("sparse_core", mode, shape, dtype) for shape in sweep for mode in ("forward", "backward")]
    return found
