# SPDX-License-Identifier: Apache-2.0
"""What launches do, counted by running them: the executor's checker runs the library's own bindings, launchers and
kernels on CPU tensors, and sees every memory request of every warp.

Sectors are 32 bytes of global memory. A wavefront is one cycle of an SM's shared memory: 128 bytes. "Least" is what the
same requests would take at best: all bytes of a warp's request side by side, no bank twice.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.kernels.patterns import uniform
from tests.simt import executor

ROOT = Path(__file__).resolve().parents[2]
GATHERS = re.compile(r"ldmatrix\w*\((?!tokens|rows)|features \+")  # source lines that read features of entries
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
FIRST = 1 << 40  # of a launch's blocks, run the first


@dataclass(frozen=True)
class Target:
    """What the launchers ask a device for."""

    sms: int
    shared_per_block: int
    capability: int


@dataclass(frozen=True)
class Site:
    """The requests of one source line."""

    file: str
    line: int
    text: str
    space: str
    write: bool
    bytes: int
    requests: int
    sectors: int
    sectors_least: int
    wavefronts: int
    wavefronts_least: int

    @property
    def copies(self) -> bool:
        """cp.async: past the registers, and at 16 bytes past L1."""
        return "cp_async" in self.text

    @property
    def gathers(self) -> bool:
        return self.space == "shared" and not self.write and self.bytes == 16 and bool(GATHERS.search(self.text))


@dataclass(frozen=True)
class Counts:
    """One kernel's launches. Everything but ``launches`` and ``grid`` counts only the ``blocks`` that ran."""

    kernel: str
    launches: int
    grid: int
    blocks: int
    threads: int
    shared_bytes: int
    mma: int
    barriers: int
    sites: tuple[Site, ...]

    @property
    def function(self) -> str:
        """The name in the source."""
        return self.kernel.split("<")[0]

    @property
    def scale(self) -> float:
        """From the blocks that ran to the grid."""
        return self.grid / self.blocks

    def total(self, what: str, where: Callable[[Site], bool] = lambda site: True) -> int:
        return sum(getattr(site, what) for site in self.sites if where(site))

    def of_space(self, what: str, space: str, write: bool | None = None) -> int:
        return self.total(what, lambda s: s.space == space and (write is None or s.write == write))

    @property
    def loads(self) -> int:
        """Sectors read from L2, or from L1 where they are there already."""
        return self.of_space("sectors", "global", False)

    @property
    def stores(self) -> int:
        return self.of_space("sectors", "global", True)

    @property
    def gather_wavefronts(self) -> int:
        return self.total("wavefronts", lambda s: s.gathers)

    @property
    def gather_least(self) -> int:
        return self.total("wavefronts_least", lambda s: s.gathers)

    @property
    def other_wavefronts(self) -> int:
        return self.of_space("wavefronts", "shared") - self.gather_wavefronts

    @property
    def other_least(self) -> int:
        return self.of_space("wavefronts_least", "shared") - self.gather_least

    @property
    def register_wavefronts(self) -> int:
        """128-byte beats of global requests between registers and L1: those of cp.async are not among them."""
        sites = [s for s in self.sites if s.space == "global" and not s.copies]
        return sum(max(s.requests, -(-s.sectors // 4)) for s in sites)


@functools.cache
def _line(file: str, line: int) -> str:
    """The text of a line; the executor names files without their folders."""
    found = sorted((ROOT / "csrc").rglob(Path(file).name))
    return found[0].read_text(encoding="utf-8").splitlines()[line - 1].strip() if found and line > 0 else ""


def collect(call: Callable[[], object], target: Target, sample: dict[str, int] | None = None) -> dict[str, Counts]:
    """The counts of the kernels that ``call`` launches through ``torch.ops.simt_check``, by kernel."""
    module = executor.checker()
    module.configure(**dataclasses.asdict(target), sample=sample or {})
    module.reset()
    try:
        call()
        kernels, sites = module.kernels(), module.sites()
    finally:
        module.configure()
        module.reset()
    by_kernel: dict[str, list[Site]] = {name: [] for name in kernels}
    for s in sites:
        fields = {f.name: s[f.name] for f in dataclasses.fields(Site) if f.name != "text"}
        by_kernel[s["kernel"]].append(Site(text=_line(s["file"], s["line"]), **fields))
    return {
        name: Counts(
            name, k["launches"], k["grid"], k["blocks"], k["block_threads"], k["shared_bytes"], k["mma"],
            k["barriers"], tuple(by_kernel[name]),
        )
        for name, k in kernels.items()
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of the library: ``op`` is forward, transpose (dz) or gradient (dvalues and dlam)."""

    op: str
    n: int
    nnz: int
    T: int
    dtype: str = "bfloat16"
    tiles: bool = True  # hand over the tensor-core plan where the device takes one

    @property
    def rank(self) -> None:
        """It has none."""


@dataclass(frozen=True)
class Reflections:
    """One call of the Householder ops, all features alike: ``op`` is householder or householder_backward (all of it).

    Tokens without a row on 16 bytes (``aligned``) are not for the tensor cores.
    """

    op: str
    n: int
    rank: int
    T: int
    dtype: str = "bfloat16"
    aligned: bool = True

    @property
    def nnz(self) -> None:
        """It has none."""


@dataclass(frozen=True)
class Sampling:
    """One sampled product of n x n features, results in float32: ``tiled`` by dense blocks, else entry by entry.

    ``token_major``: features as activations lie. ``tiles``: as ``Case`` has them, for products entry by entry.
    """

    n: int
    nnz: int
    T: int
    dtype: str = "bfloat16"
    tiled: bool = True
    token_major: bool = False
    tiles: bool = True

    @property
    def op(self) -> str:
        return "sampled_product" if self.tiled else "sampled_product by entries"

    @property
    def rank(self) -> None:
        """It has none."""


@dataclass(frozen=True)
class Scatter:
    """One scatter of float32 values to the entries of an n x n matrix, added up; the old entries are kept."""

    n: int
    nnz: int
    dtype: str = "bfloat16"
    op: str = "scatter_values_"
    T: None = None
    rank: None = None


AnyCase = Case | Reflections | Sampling | Scatter


@functools.lru_cache(maxsize=8)
def features(n: int, T: int, dtype: str) -> torch.Tensor:
    some = torch.randn(n, min(T, 64), generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    return some.repeat(1, -(-T // some.shape[1]))[:, :T].contiguous()


def plan(case: Case | Sampling, target: Target) -> list[torch.Tensor]:
    """The tensor-core plan that the library would build for this device; empty where it takes none."""
    module = executor.checker()
    module.configure(**dataclasses.asdict(target))
    block = torch.ops.simt_check.native_tile_block(torch.empty(0), case.n)
    return list(uniform(case.n, case.nnz).tiles(case.op != "forward", block)) if case.tiles and block else []


def run_reflections(case: Reflections, target: Target, sample: dict[str, int] | None = None) -> dict[str, Counts]:
    """The counts of one call, factors in float32 (float64 tokens: in float64)."""
    kind = torch.float64 if case.dtype == "float64" else torch.float32
    generator = torch.Generator().manual_seed(2)
    x = features(case.T, case.n + 1, case.dtype)[:, not case.aligned :][:, : case.n]
    if case.aligned:
        x = x.contiguous()
    left, right = (torch.randn(case.n, case.rank, generator=generator).to(kind) for _ in range(2))
    coefficients = torch.zeros(case.T, case.rank, dtype=kind)
    ops = torch.ops.simt_check
    calls = {
        "householder": lambda: ops.native_householder(x, left, right, None),
        "householder_backward": lambda: ops.native_householder_backward(
            x, x, coefficients, left, right, None, [True, True]
        ),
    }
    return collect(calls[case.op], target, sample)


def run_sampling(case: Sampling, target: Target, sample: dict[str, int] | None = None) -> dict[str, Counts]:
    """The counts of one call."""
    pattern, x = uniform(case.n, case.nnz), features(case.n, case.T, case.dtype)
    x = x.t().contiguous().t() if case.token_major else x
    tiles: Any = None if case.tiled else plan(case, target) or None
    ops = torch.ops.simt_check
    return collect(
        lambda: ops.native_sampled_product(x, x, *pattern.csc, torch.float32, case.tiled, tiles), target, sample
    )


def run_scatter(case: Scatter, target: Target, sample: dict[str, int] | None = None) -> dict[str, Counts]:
    """The counts of one call."""
    pattern = uniform(case.n, case.nnz)
    weight = torch.zeros(case.n, case.n, dtype=DTYPES[case.dtype])
    values, old = torch.ones(case.nnz), torch.empty(case.nnz, dtype=weight.dtype)
    ops = torch.ops.simt_check
    return collect(lambda: ops.native_scatter_values_(weight, values, *pattern.csr, 0.5, True, old), target, sample)


def run(case: AnyCase, target: Target, sample: dict[str, int] | None = None) -> dict[str, Counts]:
    """The counts of one call, parameters in float32 (float64 features: in float64)."""
    if isinstance(case, Reflections):
        return run_reflections(case, target, sample)
    if isinstance(case, Sampling):
        return run_sampling(case, target, sample)
    if isinstance(case, Scatter):
        return run_scatter(case, target, sample)
    pattern = uniform(case.n, case.nnz)
    z = features(case.n, case.T, case.dtype)
    kind = torch.float64 if case.dtype == "float64" else torch.float32
    generator = torch.Generator().manual_seed(2)
    lam = torch.randn(case.n, generator=generator).to(kind)
    values = torch.randn(case.nnz, generator=generator).to(kind)
    tiles: Any = plan(case, target) or None
    ops = torch.ops.simt_check
    calls = {
        "forward": lambda: ops.native_sparse_core(z, lam, values, *pattern.csr, False, tiles),
        "transpose": lambda: ops.native_sparse_core(z, lam, values, *pattern.csc, False, tiles),
        "gradient": lambda: ops.native_sparse_core_backward(
            z, z, lam, values, *pattern.csc, [False, True, True], False, tiles
        ),
    }
    return collect(calls[case.op], target, sample)
