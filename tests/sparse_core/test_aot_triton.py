# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the sparse core, compiled ahead of time for devices that are not here.

What is checked of every binary: no spills, shared memory that fits the smallest device, no atomics, 64-bit offsets into
the matrices of features, and gathers that are 16 bytes wide.
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

from frodkernels.triton_kernels import sparse_core_kernels as kernels
from frodkernels.triton_kernels._config import FLAT, tile_config

TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)] + [GPUTarget("hip", "gfx942", 64)]
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
SHARED_LIMIT = 99 * 1024  # bytes a block may have on sm_86, sm_89 and sm_120
TOKENS = {"wide": 4096, "short": 64, "decode": 1, "token_major": 4096}

for_targets = pytest.mark.parametrize("target", TARGETS, ids=lambda t: str(t.arch))


def compile_kernel(kernel, target, types, constants, options):
    """The compiled `kernel`; pointers are aligned to 16 bytes, as Triton finds those of whole tensors to be."""
    names = kernel.arg_names
    types = {"indptr_ptr": "*i32", "perm_ptr": "*i32", "lam_ptr": "*fp32", "values_ptr": "*fp32"} | types
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    whole = [i for i, name in enumerate(names) if name.endswith("_ptr") or name in ("n", "n_out")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def split_launch(launch):
    constants = {k: v for k, v in launch.items() if k.startswith("BLOCK")}
    return constants, {k: v for k, v in launch.items() if k not in constants}


@functools.cache
def compile_core(backward, target, dtype, index, kind="wide", unit=None):
    config = tile_config(ITEMSIZE[dtype], TOKENS[kind], kind == "token_major", target.warp_size)
    constants, options = split_launch(config.launch())
    constants |= {
        "HAS_LAM": True,
        "TOKEN_MAJOR": kind == "token_major",
        "UNIT": unit or 16 // ITEMSIZE[dtype],
        "ACC": tl.float32,
    }
    types = dict.fromkeys(["z_ptr", "u_ptr", "out_ptr", "dz_ptr"], "*" + dtype)
    types |= {"slot_values_ptr": "*fp32", "partial_ptr": "*fp32", "indices_ptr": "*" + index}
    if backward:
        constants |= {"NEED_DZ": True, "NEED_DLAM": True, "NEED_DVALUES": True}
    kernel = kernels.sparse_core_bwd_kernel if backward else kernels.sparse_core_fwd_kernel
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


def check_binary(compiled, tmp_path):
    is_cuda = "cubin" in compiled.asm
    assert compiled.asm["cubin" if is_cuda else "hsaco"][:4] == b"\x7fELF"
    assert spilled_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared <= SHARED_LIMIT
    assembly = compiled.asm["ptx" if is_cuda else "amdgcn"]
    assert not re.search(r"\b(atom|red)\.|_atomic_", assembly)


@for_targets
@pytest.mark.parametrize("index", ["u16", "i32"])
@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_core(backward, dtype, index, target, tmp_path):
    compiled = compile_core(backward, target, dtype, index)
    check_binary(compiled, tmp_path)
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    wide = re.findall(r"ld\.global(?:\.\w+)*\.v4\.b32|global_load_dwordx4", assembly)
    assert len(wide) >= 2  # at least the gather and the owned row


@for_targets
@pytest.mark.parametrize("unit", [None, 1], ids=["aligned", "odd"])
@pytest.mark.parametrize("kind", ["wide", "short", "decode", "token_major"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_configuration(backward, kind, unit, target, tmp_path):
    check_binary(compile_core(backward, target, "bf16", "u16", kind, unit), tmp_path)


@for_targets
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_flat_passes(dtype, target, tmp_path):
    constants, options = split_launch(FLAT)
    types = {"values_ptr": "*" + dtype, "slot_values_ptr": "*fp32"}
    check_binary(compile_kernel(kernels.gather_values_kernel, target, types, constants, options), tmp_path)
    types = {"partial_ptr": "*fp32", "dvalues_ptr": "*" + dtype, "dlam_ptr": "*" + dtype}
    constants |= {"NEED_DLAM": True, "NEED_DVALUES": True, "ACC": tl.float32}
    check_binary(compile_kernel(kernels.reduce_partials_kernel, target, types, constants, options), tmp_path)


@pytest.mark.parametrize("kind", ["wide", "token_major"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_offsets_into_features_are_64_bit(backward, kind):
    ir = compile_core(backward, TARGETS[0], "bf16", "u16", kind).asm["ttir"]
    widths = re.findall(r"arith\.muli .* : tensor<\S*x(i\d+)>", ir)
    assert widths and set(widths) == {"i64"}
