# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the chained reflections, compiled ahead of time for devices that are not here.

What is checked of every binary: tensor-core products, no spills worth the name, shared memory that fits the smallest
device, no atomics and 64-bit offsets into the matrices of features; where rows allow it, loads of 16 bytes.
"""

import functools
import os
import re
import subprocess

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so not under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from frodkernels.triton_kernels import householder
from frodkernels.triton_kernels import householder_kernels as kernels
from frodkernels.triton_kernels._config import FLAT, householder_config

TARGETS = {str(arch): GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
FEATURES = ("x_ptr", "g_ptr", "base_ptr", "out_ptr")
SIZES = ("n", "m", "x_stride", "g_stride", "base_stride", "width")
SHARED_LIMIT = 99 * 1024  # bytes a block may have on sm_86, sm_89 and sm_120
PRODUCTS = r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_"


@functools.cache
def compile_kernel(name, target, dtype="bf16", rank=32, kind="wide", odd=False):
    """The kernel ``householder_<name>``; `odd`: nothing is known of sizes, as Triton passes those of odd widths."""
    kernel = getattr(kernels, f"householder_{name}_kernel" if name else "householder_kernel")
    acc = "fp64" if dtype == "fp64" else "fp32"
    config = householder_config("gradient" if name == "gradient" else kind, DTYPES[dtype].itemsize, rank)
    launch = dict(FLAT) if name == "reduce" else config.launch()
    known = {
        "RANK": rank,
        "SPLITS": 4,
        "HAS_G": True,
        "X_PARTS": householder.feature_parts(DTYPES[dtype]),
        "PARTS": householder.update_parts(DTYPES[dtype]),
        "PART": tl.bfloat16,
        "ACC": tl.float64 if acc == "fp64" else tl.float32,
        **launch,
    }
    constants = {p.name: known[p.name] for p in kernel.params if p.is_constexpr}
    names = kernel.arg_names
    types = {n: f"*{dtype if n in FEATURES else acc}" if n.endswith("_ptr") else "i32" for n in names}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    whole = [i for i, n in enumerate(names) if n.endswith("_ptr") or (n in SIZES and not odd)]
    aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {k: v for k, v in launch.items() if k not in constants}
    return triton.compile(source, target=TARGETS[target], options=options)


def spilled_bytes(compiled, folder):
    """Bytes of per-thread memory that registers were spilled to."""
    if "cubin" in compiled.asm:
        path = folder / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        found = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    else:
        found = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", compiled.asm["amdgcn"])
    assert len(found) == 2
    return sum(int(size) for size in found)


def assembly(compiled):
    return compiled.asm["ptx" if "cubin" in compiled.asm else "amdgcn"]


def check_binary(compiled, tmp_path, spills=0):
    assert compiled.asm["cubin" if "cubin" in compiled.asm else "hsaco"][:4] == b"\x7fELF"
    assert spilled_bytes(compiled, tmp_path) <= spills
    assert compiled.metadata.shared <= SHARED_LIMIT
    assert not re.search(r"\b(atom|red)\.|_atomic_", assembly(compiled))


KERNELS = [("bf16", t) for t in TARGETS] + [("fp32", t) for t in ("80", "gfx942")] + [("fp16", "90")]


@pytest.mark.parametrize("dtype, target", KERNELS)
@pytest.mark.parametrize("name", ["", "gradient"], ids=["fused", "gradient"])
def test_kernels(name, dtype, target, tmp_path):
    compiled = compile_kernel(name, target, dtype)
    check_binary(compiled, tmp_path)
    text = assembly(compiled)
    assert re.search(PRODUCTS, text)
    wide = r"ld\.global(?:\.\w+)*\.v4\.b32|cp\.async\.cg\S* \[[^]]*\], \[[^]]*\], 0x10|global_load_dwordx4"
    assert len(re.findall(wide, text)) >= 4


@pytest.mark.parametrize("target", ["90", "gfx942"])
@pytest.mark.parametrize("name", ["project", "update"])
def test_halves_of_the_fused_kernel(name, target, tmp_path):
    compiled = compile_kernel(name, target)
    check_binary(compiled, tmp_path)
    assert re.search(PRODUCTS, assembly(compiled))


@pytest.mark.parametrize("target", ["90", "gfx942"])
def test_flat_pass(target, tmp_path):
    check_binary(compile_kernel("reduce", target), tmp_path)


CONFIGURATIONS = [("", "wide", 8), ("", "wide", 64), ("", "wide", 128), ("", "decode", 32), ("", "decode", 128)]
CONFIGURATIONS += [("gradient", "gradient", 8), ("gradient", "gradient", 64), ("gradient", "gradient", 128)]
CONFIGURATIONS = [(*c, "80") for c in CONFIGURATIONS] + [(*c, "gfx942") for c in CONFIGURATIONS if c[2] == 128]
A_NUMBER_OR_TWO = 16  # bytes, which ptxas keeps aside of a loop to fit another block on an SM


@pytest.mark.parametrize("name, kind, rank, target", CONFIGURATIONS)
def test_configurations(name, kind, rank, target, tmp_path):
    check_binary(compile_kernel(name, target, "bf16", rank, kind), tmp_path, A_NUMBER_OR_TWO)


@pytest.mark.parametrize("dtype, rank, target", [("fp32", 128, "90"), ("fp64", 32, "80"), ("fp64", 32, "gfx942")])
@pytest.mark.parametrize("name", ["", "gradient"], ids=["fused", "gradient"])
def test_wide_types(name, dtype, rank, target, tmp_path):
    check_binary(compile_kernel(name, target, dtype, rank), tmp_path, A_NUMBER_OR_TWO)


@pytest.mark.parametrize("target", ["80", "gfx942"])
@pytest.mark.parametrize("name", ["", "gradient"], ids=["fused", "gradient"])
def test_odd_widths_and_ranks(name, target, tmp_path):
    check_binary(compile_kernel(name, target, rank=7, odd=True), tmp_path, A_NUMBER_OR_TWO)


def test_offsets_that_multiply_by_tokens_are_64_bit():
    narrow, wide = set(), set()
    for name in ("", "gradient"):
        ir = compile_kernel(name, "80", odd=True, rank=7).asm["ttir"]
        for value, width in re.findall(r"%([a-z_]+?)_?\d* = arith\.muli .* : tensor<\S*x(i\d+)>", ir):
            (wide if width == "i64" else narrow).add(value)
    assert narrow <= {"left", "right"}  # [features, ranks]
    assert {"rows", "base_rows", "out_rows", "x", "q"} <= wide


@pytest.mark.parametrize("name", ["", "project", "gradient"])
def test_sums_start_at_zero_and_are_added_up_outside(name):
    """Left to itself the compiler would fold the addition into the product, and the tensor cores would truncate it."""
    ir = compile_kernel(name, "80").asm["ttir"]
    dots = re.findall(r"(%\S+) = tt\.dot ", ir)
    assert dots and any(re.search(rf"arith\.addf %\S+, {re.escape(dot)} ", ir) for dot in dots)
