# SPDX-License-Identifier: Apache-2.0
"""Static figures of the Triton kernels, compiled ahead of time with the launch settings of the library's own table."""

from __future__ import annotations

import importlib
import pkgutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.kernels import static

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
ELEMENTS = {"indptr_ptr": "i32", "perm_ptr": "i32", "indices_ptr": "u16"}  # features: the dtype asked for; others fp32
FEATURES = ("z_ptr", "u_ptr", "out_ptr", "dz_ptr", "x_ptr", "g_ptr", "base_ptr", "a_ptr", "b_ptr")
FEATURES += ("weight_ptr", "old_ptr")  # a weight has the dtype of the features
SIZES = ("n", "n_out", "m", "x_stride", "g_stride", "base_stride", "width")  # multiples of 16 in a model
RANK, SPLITS = 32, 4  # of the figures: reflections, and the splits of a sum over features


@dataclass(frozen=True)
class Compiled:
    """``threads`` and ``shared`` (dynamic) of a launch."""

    kernel: static.Kernel
    threads: int
    shared: int


def declared() -> dict[str, Any]:
    """Every Triton kernel of the library that is launched, by name."""
    import triton

    package = importlib.import_module("frodkernels.triton_kernels")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
                found[name] = value
    return found


def _launch(function: Any, names: list[str], dtype: str, tokens: int) -> dict[str, Any]:
    from frodkernels.triton_kernels._config import (
        FLAT,
        SAMPLED_TILES,
        SCATTER,
        householder_config,
        householder_kind,
        tile_config,
    )

    if "FOLD" in names:
        return SAMPLED_TILES[ITEMSIZE[dtype]].launch()
    if "COPY" in names:
        return dict(SCATTER)
    if "BLOCK" in names:
        return dict(FLAT)
    if "RANK" in names:
        kind = "gradient" if "gradient" in function.__name__ else householder_kind(tokens)
        return householder_config(kind, ITEMSIZE[dtype], RANK).launch()
    return tile_config(ITEMSIZE[dtype], tokens, False).launch()


def _settings(function: Any, dtype: str, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of the constant parameters, and the options of the launch."""
    import torch
    import triton.language as tl

    from frodkernels.triton_kernels import householder

    names = [p.name for p in function.params if p.is_constexpr]
    launch = _launch(function, names, dtype, tokens)
    features = getattr(torch, dtype)
    known = {
        "UNIT": 16 // ITEMSIZE[dtype],
        "ACC": tl.float32,
        "TOKEN_MAJOR": False,
        "RANK": RANK,
        "SPLITS": SPLITS,
        "X_PARTS": householder.feature_parts(features),
        "PARTS": householder.update_parts(features),
        "PART": tl.bfloat16,
        "DOT": getattr(tl, dtype),
        "A_TOKENS": False,  # token-major activations
        "B_TOKENS": False,
        "SPLIT": False,
        "COPY": False,
        "ACCUMULATE": True,
        **launch,
    }
    constants = {}
    for name in names:
        if name not in known and not name.startswith(("HAS_", "NEED_")):
            raise LookupError(f"no value is known for the constant {name}")
        constants[name] = known.get(name, True)
    return constants, {name: value for name, value in launch.items() if name not in constants}


def compile_kernel(name: str, arch: int, dtype: str = "bfloat16", tokens: int = 8192) -> Compiled:
    """The kernel as it is launched for features of ``dtype``, for compute capability ``arch``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = declared()[name]
    constants, options = _settings(function, dtype, tokens)
    signature = {}
    for argument in function.arg_names:
        kind = NAMES[dtype] if argument in FEATURES else ELEMENTS.get(argument, "fp32")
        pointer = argument.endswith("_ptr")
        signature[argument] = "constexpr" if argument in constants else f"*{kind}" if pointer else "i32"
    signature |= {p.name: p.annotation_type for p in function.params if p.annotation_type}
    # As at run time: pointers of whole tensors are aligned to 16 bytes, and so are sizes that are multiples of it where
    # the kernel lets Triton look at them.
    known = [p.name.endswith("_ptr") or (p.name in SIZES and not p.do_not_specialize) for p in function.params]
    aligned = [i for i, whole in enumerate(known) if whole]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        (kernel,) = static.read(path)
    return Compiled(kernel, 32 * made.metadata.num_warps, made.metadata.shared)
