# SPDX-License-Identifier: Apache-2.0
"""Launches every native CUDA kernel at least once, on odd shapes: what compute-sanitizer watches.

    python -m bench.gpu.launches DEVICE [--names] [--few]

``--names`` prints the names of the GPU kernels that ran (through torch.profiler), one a line, after "kernel ".
Every operator ``frodkernels::native_*`` that has a kernel for the device must be among the calls here.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator

import torch

import frodkernels as fk
from bench._machine import ROOT
from frodkernels import _native, _ops
from tests.simt import coverage

# features, tokens, density: decode, odd, one past a tile, several feature blocks; sparse as adapters are, and full rows
SIZES = [(19, 1, 0.3), (33, 7, 0.5), (129, 65, 0.05), (130, 257, 0.02), (515, 129, 0.01), (640, 513, 0.01)]
SMALL_BLOCK = 128  # features of a block of the tensor-core plan; the device's own choice is the other one
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# these compute nothing on a device
NOT_CALLED = {"native_build_info", "native_cpu_isa", "native_tiles", "native_tile_block", "native_why_not"}
NOT_CALLED |= {f"native_reflections{which}" for which in ("", "_again", "_gradient")}  # there for the CPU alone
NOT_CALLED |= {"native_reflect", "native_reflect_backward"}  # likewise
NOT_CALLED |= {"native_sparse_core_add_", "native_sparse_core_backward_add_"}  # likewise


def native_ops(device: str) -> list[str]:
    """The native operators that have a kernel for ``device`` ("cpu" or "cuda")."""
    _native.load()
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "::native_" in name}
    found = [n for n in sorted(names) if _ops.native_serves(n.removeprefix("native_"), device)]
    return [name for name in found if name not in NOT_CALLED]


def pattern_of(n: int, density: float, generator: torch.Generator) -> fk.SparsePattern:
    nnz = max(1, int(n * n * density))
    flat = torch.randperm(n * n, generator=generator)[:nnz]
    return fk.SparsePattern(flat // n, flat % n, (n, n))


def _sparse_core(device: torch.device, few: bool) -> Iterator[Callable[[], object]]:
    """Both ops: every dtype, both layouts of the output, every choice of gradients, with and without tiles."""
    generator = torch.Generator().manual_seed(0)
    core, backward = (_ops.native(name) for name in ("sparse_core", "sparse_core_backward"))
    like = torch.empty(0, device=device)
    for n, T, density in SIZES[:2] if few else SIZES:
        pattern = pattern_of(n, density, generator).to(device)
        own_block = torch.ops.frodkernels.native_tile_block(like, n)  # 0: no tensor-core kernels here
        for dtype in DTYPES:
            u, z = (torch.randn(n, T, generator=generator).to(device, dtype) for _ in range(2))
            parameters = (torch.randn(n, generator=generator), torch.randn(pattern.nnz, generator=generator))
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            blocks = {own_block, SMALL_BLOCK} if own_block and z.element_size() == 2 else set()
            plans: list[tuple[list, list]] = [([], [])]
            plans += [(list(pattern.tiles(False, k)), list(pattern.tiles(True, k))) for k in sorted(blocks)]
            for param_dtype, (rows, columns), major in itertools.product({acc, dtype}, plans, (False, True)):
                lam, values = (p.to(device, param_dtype) for p in parameters)
                yield functools.partial(core, z, lam, values, *pattern.csr, major, rows)
                yield functools.partial(core, u, lam, values, *pattern.csc, major, columns)
                for needs in ([True] * 3, [True, False, False], [False, True, True]):
                    yield functools.partial(backward, u, z, lam, values, *pattern.csc, needs, major, columns)
                yield functools.partial(core, z.t().contiguous().t(), None, values, *pattern.csr, major)


# tokens, features in, features out (None: as many, and no base), rank: odd and even rows, small and large blocks
REFLECTIONS = [
    (1, 19, None, 3), (7, 136, 40, 8), (33, 130, None, 33), (130, 520, 264, 16), (700, 1032, None, 128),
    (10003, 136, None, 8),
]  # fmt: skip


def _householder(device: torch.device, few: bool) -> Iterator[Callable[[], object]]:
    """The three ops: every dtype, rows on 16 bytes and off, with and without base, every choice of results."""
    generator = torch.Generator().manual_seed(0)
    names = ("householder", "householder_backward", "householder_gradient")
    forward, backward, gradient = (_ops.native(name) for name in names)
    for T, n, m, r in REFLECTIONS[:3] if few else REFLECTIONS:
        width = n if m is None else m

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        factors = draw(n, r), draw(width, r), draw(T, r)
        tokens = draw(T, n), draw(T, width)
        for dtype, sums in itertools.product(DTYPES, (torch.float32, torch.float64)):
            if dtype == torch.float64 and sums != dtype:
                continue
            short, wide, coefficients = (t.to(device, sums) for t in factors)
            x, g = (t.to(device, dtype) for t in tokens)
            base, dx_base = (None, None) if m is None else (g, x)
            yield functools.partial(forward, x, short, wide, base)
            yield functools.partial(forward, x, short, None, None)
            yield functools.partial(forward, x.t().contiguous().t(), short, wide, base)
            yield functools.partial(gradient, x, coefficients)
            for needs in ([True, True], [True, False], [False, True]):
                yield functools.partial(backward, g, x, coefficients, wide, short, dx_base, needs)


def _sampled(device: torch.device, few: bool) -> Iterator[Callable[[], object]]:
    """Both ways: every dtype of operands and result, tokens or features contiguous, both, off 16 bytes; with tiles."""
    generator = torch.Generator().manual_seed(0)
    sampled = _ops.native("sampled_product")
    like = torch.empty(0, device=device)
    for n, T, density in SIZES[:2] if few else SIZES:
        pattern = pattern_of(n, density, generator).to(device)
        own_block = torch.ops.frodkernels.native_tile_block(like, n)
        for dtype in DTYPES:
            a, b = (torch.randn(n, T, generator=generator).to(device, dtype) for _ in range(2))
            tokens_a, tokens_b = (x.t().contiguous().t() for x in (a, b))
            odd = torch.cat([a, a[:, :1]], 1)[:, 1:]  # rows that start anywhere
            for out in {dtype, torch.float32, torch.float64}:
                for tiled in (False, True):
                    for pair in ((a, b), (tokens_a, tokens_b), (tokens_a, b), (odd, b)):
                        yield functools.partial(sampled, *pair, *pattern.csc, out, tiled)
            for block in sorted({own_block, SMALL_BLOCK}) if own_block and a.element_size() == 2 else ():
                yield functools.partial(
                    sampled, a, b, *pattern.csc, torch.float32, False, list(pattern.tiles(True, block))
                )


def _scatter(device: torch.device, few: bool) -> Iterator[Callable[[], object]]:
    """Every pair of dtypes, added and put, with and without the old entries, a matrix and its transpose."""
    generator = torch.Generator().manual_seed(0)
    scatter = _ops.native("scatter_values_")
    for n, _, density in SIZES[:2] if few else SIZES:
        pattern = pattern_of(n, density, generator).to(device)
        for dtype, values_dtype in itertools.product(DTYPES, DTYPES):
            weight = torch.randn(n, n, generator=generator).to(device, dtype)
            values = torch.randn(pattern.nnz, generator=generator).to(device, values_dtype)
            old = torch.empty(pattern.nnz, device=device, dtype=dtype)
            for accumulate, scale in ((True, 0.5), (False, 1.0)):
                for matrix, kept in ((weight, old), (weight.t(), None)):
                    yield functools.partial(scatter, matrix, values, *pattern.csr, scale, accumulate, kept)


# operator -> the calls that launch its kernels
CALLS: dict[str, Callable[[torch.device, bool], Iterator[Callable[[], object]]]] = {
    "native_sparse_core": _sparse_core,
    "native_sparse_core_backward": _sparse_core,
    "native_householder": _householder,
    "native_householder_backward": _householder,
    "native_householder_gradient": _householder,
    "native_sampled_product": _sampled,
    "native_scatter_values_": _scatter,
}


def uncovered(device: str) -> list[str]:
    """Operators with a kernel for ``device`` that nothing here calls."""
    return [name for name in native_ops(device) if name not in CALLS]


def declared_kernels() -> set[str]:
    """The names of the ``__global__`` functions in csrc/cuda."""
    return set(coverage.kernels_of(ROOT / "csrc" / "cuda"))


def call_all(device: torch.device, few: bool = False) -> int:
    """Launch everything that is there; the number of calls."""
    made = 0
    for source in dict.fromkeys(CALLS[name] for name in native_ops(device.type) if name in CALLS):
        for call in source(device, few):
            call()
            made += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.launches", description=__doc__)
    parser.add_argument("device")
    parser.add_argument("--names", action="store_true")
    parser.add_argument("--few", action="store_true", help="two small sizes only")
    options = parser.parse_args()
    device = torch.device(options.device)
    if not options.names:
        made = call_all(device, options.few)
    else:
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=kinds) as profiler:
            made = call_all(device, options.few)
        on_device = device.type.upper()
        names = {event.name for event in profiler.events() if event.device_type.name == on_device}
        for name in sorted(names):
            print(f"kernel {name}")
    print(f"calls {made}")
    print(f"uncovered {' '.join(uncovered(device.type))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
