# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the sampled product and the scatter, compiled ahead of time for devices that are not here.

What is checked of every binary: no spills worth the name, shared memory that fits the smallest device, no atomics and
64-bit offsets into the matrices; of the tiled product that it runs on tensor cores and loads 16 bytes at a time.
"""

import functools
import os
import re
import subprocess

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so not under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from frodkernels.triton_kernels import sampled_kernels as kernels
from frodkernels.triton_kernels._config import SAMPLED_TILES, SCATTER
from frodkernels.triton_kernels.sampled import load_unit

TARGETS = {str(arch): GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
DTYPES = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16, "fp64": tl.float64}
SHARED_LIMIT = 99 * 1024  # bytes a block may have on sm_86, sm_89 and sm_120
PRODUCTS = r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_"
A_NUMBER_OR_TWO = 16  # bytes, which ptxas keeps aside of a loop to fit another block on an SM

for_targets = pytest.mark.parametrize("target", TARGETS)


def compile_kernel(kernel, target, types, constants, options):
    """The compiled `kernel`; pointers are aligned to 16 bytes, as Triton finds those of whole tensors to be."""
    names = kernel.arg_names
    types = {"indptr_ptr": "*i32", "perm_ptr": "*i32", "scale": "fp64"} | types
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options=options)


def split_launch(launch, kernel):
    constants = {p.name for p in kernel.params if p.is_constexpr}
    return {k: v for k, v in launch.items() if k in constants}, {k: v for k, v in launch.items() if k not in constants}


@functools.cache
def compile_product(target, dtype="bf16", a_tokens=True, b_tokens=True, split=True, index="u16", acc=None):
    acc = acc or ("fp64" if dtype == "fp64" else "fp32")
    itemsize = DTYPES[dtype].primitive_bitwidth // 8
    config = SAMPLED_TILES[8 if acc == "fp64" else itemsize]
    constants, options = split_launch(config.launch(), kernels.sampled_product_kernel)
    constants |= {
        "A_TOKENS": a_tokens,
        "B_TOKENS": b_tokens,
        "SPLIT": split,
        "UNIT": load_unit(itemsize),
        "DOT": DTYPES[acc if acc == "fp64" else dtype],
        "ACC": DTYPES[acc],
    }
    types = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "indices_ptr": f"*{index}"}
    types["out_ptr"] = f"*{acc}" if split else f"*{dtype}"
    return compile_kernel(kernels.sampled_product_kernel, target, types, constants, options)


@functools.cache
def compile_scatter(target, weight="bf16", values="fp32", acc="fp32", copy=False, accumulate=True, index="u16"):
    kernel = kernels.scatter_values_kernel
    constants, options = split_launch(SCATTER, kernel)
    constants |= {"COPY": copy, "ACCUMULATE": accumulate, "HAS_OLD": True, "ACC": DTYPES[acc]}
    types = {
        "weight_ptr": f"*{weight}",
        "old_ptr": f"*{weight}",
        "values_ptr": f"*{values}",
        "indices_ptr": f"*{index}",
    }
    types |= dict.fromkeys(["row_stride"], "i64")
    return compile_kernel(kernel, target, types, constants, options)


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


def check_product(compiled, tmp_path, tensor_cores, spills=0):
    check_binary(compiled, tmp_path, spills)
    text = assembly(compiled)
    assert bool(re.search(PRODUCTS, text)) or not tensor_cores
    # NVIDIA's loads go to shared memory while the tile before is multiplied; AMD's lanes are twice as many
    wide = r"cp\.async\.cg\S* \[[^]]*\], \[[^]]*\], 0x10|global_load_dwordx[24]"
    assert len(re.findall(wide, text)) >= 2


@for_targets
@pytest.mark.parametrize("tokens", [True, False], ids=["feature_major", "token_major"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_product(dtype, tokens, target, tmp_path):
    compiled = compile_product(target, dtype, tokens, tokens)
    check_product(compiled, tmp_path, tensor_cores=dtype == "bf16")


@pytest.mark.parametrize("target", ["80", "90", "gfx942"])
@pytest.mark.parametrize("a_tokens", [True, False])
def test_one_split_and_mixed_layouts(a_tokens, target, tmp_path):
    compiled = compile_product(target, "fp16", a_tokens, not a_tokens, split=False, index="i32")
    check_product(compiled, tmp_path, True, A_NUMBER_OR_TWO)


@for_targets
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_product_in_float64(dtype, target, tmp_path):
    check_binary(compile_product(target, dtype, acc="fp64"), tmp_path, A_NUMBER_OR_TWO)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sums_are_added_up_outside(dtype):
    """Left to itself the compiler would fold the addition into the product, and the tensor cores would truncate it."""
    ir = compile_product("90", dtype).asm["ttir"]
    (dot,) = re.findall(r"(%\S+) = tt\.dot ", ir)
    assert re.search(rf"arith\.addf %\S+, {re.escape(dot)} ", ir)
    (start,) = re.findall(r"= tt\.dot \S+, \S+, (%\S+?),? ", ir)
    assert re.search(rf"{re.escape(start)} = arith\.constant dense<0\.0+e\+00>", ir)


SCATTERS = [("bf16", "fp32", "fp32", False), ("fp16", "fp16", "fp32", False), ("fp32", "fp64", "fp64", False)]
SCATTERS += [("bf16", "fp64", "fp64", False), ("i16", "i16", "fp32", True), ("i64", "i64", "fp64", True)]


@for_targets
@pytest.mark.parametrize("weight, values, acc, copy", SCATTERS)
def test_scatter(weight, values, acc, copy, target, tmp_path):
    check_binary(compile_scatter(target, weight, values, acc, copy, not copy), tmp_path)


def test_scatter_gets_its_scale_in_double_precision():
    types = {p.name: p.annotation_type for p in kernels.scatter_values_kernel.params}
    assert types["scale"] == "fp64"


def test_scatter_rounds_after_every_operation():
    text = assembly(compile_scatter("90", "fp32", "fp32"))
    assert re.search(r"\bmul\.(rn\.)?f32", text) and re.search(r"\badd\.(rn\.)?f32", text)
    assert not re.search(r"\bfma\.", text)


def products_of(compiled, names):
    """Widths of the multiplications whose result is called one of `names`, by name."""
    found = {name: set() for name in names}
    for value, width in re.findall(
        r"%([a-z_]+?)_?\d* = arith\.muli .* : (?:tensor<\S*x)?(i\d+)>?", compiled.asm["ttir"]
    ):
        if value in found:
            found[value].add(width)
    return found


@pytest.mark.parametrize("tokens", [True, False])
def test_offsets_into_matrices_are_64_bit(tokens):
    assert products_of(compile_product("80", "bf16", tokens, tokens), ["offsets"]) == {"offsets": {"i64"}}
    assert products_of(compile_scatter("80"), ["entry", "value"]) == {"entry": {"i64"}, "value": {"i64"}}
