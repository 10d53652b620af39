# SPDX-License-Identifier: Apache-2.0
"""One record per kernel, instance and architecture: static figures, and counts of a standard call that launches it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.kernels import counts, static, triton_aot
from bench.kernels.architectures import occupancy
from bench.kernels.counts import AnyCase, Case, Counts, Reflections, Sampling, Scatter
from bench.roofline import householder, model
from bench.roofline.devices import DEVICES, Device

Record = dict[str, Any]

# Standard calls: between them every kernel of csrc/cuda is launched, in its instance for the call's dtype.
STANDARD: tuple[AnyCase, ...] = (
    Case("forward", 4096, 167772, 128, "bfloat16"),
    Case("gradient", 4096, 167772, 128, "bfloat16"),
    Case("forward", 1024, 10485, 128, "float16"),
    Case("gradient", 1024, 10485, 128, "float16"),
    Case("forward", 1024, 10485, 256, "float32"),
    Case("gradient", 1024, 10485, 256, "float32"),
    Case("forward", 1024, 10485, 32, "float32"),
    Case("gradient", 1024, 10485, 32, "float32"),
    Case("forward", 1024, 10485, 256, "bfloat16", tiles=False),
    Case("gradient", 1024, 10485, 256, "bfloat16", tiles=False),
    Reflections("householder", 4096, 32, 512, "bfloat16"),
    Reflections("householder_backward", 4096, 32, 512, "bfloat16"),
    Reflections("householder_backward", 1024, 8, 256, "float16"),
    Reflections("householder_backward", 1024, 32, 256, "float32"),
    Sampling(1024, 104857, 2048, "bfloat16"),
    Sampling(1024, 104857, 2048, "float16", token_major=True),
    Sampling(1024, 104857, 1024, "float32"),
    Scatter(4096, 167772, "bfloat16"),
)
NOT_RUN = "no standard call launches this instance"
TRITON = "the executor runs CUDA C++ only: no counts of Triton kernels"
NO_DEVICE = "the model knows no device of this architecture"


def device_of(arch: int) -> Device:
    """The model's first device of that architecture; where it has none, one that only tells launchers its size."""
    known = [device for device in DEVICES if device.arch == arch]
    if known:
        return known[0]
    sms = {86: 84, 120: 170}[arch]  # RTX A6000's chip, RTX 5090
    return Device(f"sm_{arch}", arch, sms, *[0.0] * 7, 64)


def _static(kernel: static.Kernel, language: str, threads: int, dynamic: int) -> Record:
    """Figures of a launch with ``threads`` threads a block and ``dynamic`` bytes of shared memory."""
    resident = occupancy(kernel.arch, kernel.registers, kernel.shared + dynamic, threads)
    c = kernel.counts
    return {
        "kernel": kernel.function,
        "instance": kernel.name,
        "language": language,
        "arch": f"sm_{kernel.arch}",
        "registers": kernel.registers,
        "spills": kernel.spills,
        "stack": kernel.stack,
        "local": kernel.local,
        "smem": kernel.shared + dynamic,
        "smem_static": kernel.shared,
        "threads": threads,
        "occupancy": round(resident.share, 4),
        "blocks_per_sm": resident.blocks,
        "limiter": resident.limiter,
        "instructions": kernel.instructions,
        "tensor_ops": kernel.tensor_ops,
        "global_loads": c["global_loads"],
        "vector_loads": c["global_loads_128"],
        "global_stores": c["global_stores"],
        "vector_stores": c["global_stores_128"],
        "async_copies": c["async_copies"],
        "matrix_loads": c["matrix_loads"],
        "atomics": c["atomics"],
    }


def _counted(c: Counts, case: AnyCase) -> Record:
    return {
        "launches": c.launches,
        "grid": c.grid,
        "sectors": c.loads + c.stores,
        "sectors_least": c.of_space("sectors_least", "global"),
        "wavefronts": c.other_wavefronts,
        "wavefronts_least": c.other_least,
        "gather_wavefronts": c.gather_wavefronts,
        "gather_wavefronts_least": c.gather_least,
        "l2_bytes": 32 * c.loads,
        "store_bytes": 32 * c.stores,
        "mma": c.mma,
        "barriers": c.barriers,
        "op": case.op, "n": case.n, "nnz": case.nnz, "rank": case.rank, "T": case.T, "dtype": case.dtype,
    }  # fmt: skip


UNCOUNTED: Record = {
    **dict.fromkeys(_counted(Counts("", 1, 1, 1, 1, 0, 0, 0, ()), STANDARD[0])),
    "modelled_us": None,
    "device": None,
}


def instance_of(c: Counts, case: AnyCase, kernels: Sequence[static.Kernel]) -> static.Kernel | None:
    """The instance that ``case`` launched, of one architecture's kernels. Of several the widest."""
    mine = [k for k in kernels if k.function == c.function]
    if c.function == "householder_mma_kernel":
        mine = [k for k in mine if householder.tiles_of(k) == householder.tiles(c, case.T)]
    if c.function == "sampled_mma_kernel" and isinstance(case, Sampling):
        mine = [k for k in mine if k.name.endswith("true>") == case.token_major]
    sums = "float64" if case.dtype == "float64" else "float32"
    if c.function == "reduce_sources_kernel" and isinstance(case, Sampling) and case.tiled:
        mine = [k for k in mine if k.scalar == "float64"]  # what segments of tokens are added up in
        sums = "float64"
    for scalar in (case.dtype, sums, ""):
        found = [k for k in mine if k.scalar == scalar]
        if found:
            return max(found, key=lambda k: k.name)
    return None


def cuda(device: Device, cases: Sequence[AnyCase] = STANDARD) -> Iterator[Record]:
    """The library's kernels, with the counts and modelled times of ``cases`` on ``device``."""
    kernels = [k for k in static.library() if k.arch == device.arch]
    if not kernels:
        raise LookupError(f"the library was not built for sm_{device.arch}")
    seen = set()
    for case in cases:
        modelled = {t.work.kernel: t for t in model.times(case, device)} if device.clock else {}
        for name, c in counts.run(case, device.target).items():
            kernel = instance_of(c, case, kernels)
            if kernel is None:
                raise LookupError(f"{name} was launched, but the library for sm_{device.arch} has no such kernel")
            seen.add(kernel.name)
            time = modelled.get(name)
            yield {
                **_static(kernel, "CUDA", c.threads, c.shared_bytes),
                **_counted(c, case),
                "modelled_us": None if time is None else round(1e6 * time.seconds(), 2),
                "device": device.name,
                "note": None if time else NO_DEVICE,
            }
    for kernel in kernels:
        if kernel.name not in seen:
            figures = _static(kernel, "CUDA", kernel.threads or 256, 0)
            yield {**figures, **UNCOUNTED, "dtype": kernel.scalar or None, "note": NOT_RUN}


def triton(arch: int, dtype: str = "bfloat16") -> Iterator[Record]:
    for name in triton_aot.declared():
        made = triton_aot.compile_kernel(name, arch, dtype)
        figures = _static(made.kernel, "Triton", made.threads, made.shared)
        yield {**figures, **UNCOUNTED, "dtype": dtype, "note": TRITON}
