# SPDX-License-Identifier: Apache-2.0
"""What groups, contestants and sizes are called on the page and in its figures."""

from __future__ import annotations

from bench._interleave import FLOOR
from bench.results import Row

LABELS = {
    FLOOR: "floor",
    "peft": "PEFT",
    "torch": "plain torch",
    "torch:factor": "plain torch, u S⁻ᵀ first",
    "torch:csr": "torch CSR",
    "torch:dense": "torch dense",
    "torch:weight": "torch, W + S",
    "torch:clone": "torch, clone of W",
    "torch:partial": "torch, the paper's form",
    "compile": "torch.compile",
    "onednn": "oneDNN's product, sampled",
    "auto": "**frodkernels**",
    "frodkernels": "**frodkernels**",
    "activation": "activation",
    "fold": "fold",
    "materialize": "materialize",
    "input": "input side",
    "output": "output side",
    "entries": "by entries",
    "blocks": "by blocks",
    "function": "as a function",
    "accelerated": "PEFT, accelerated",
    "product": "aᵀb alone",
    "stream": "a and b copied",
    "lora8": "LoRA r=8",
    "lora16": "LoRA r=16",
    "lora": "LoRA, same r",
}
OURS = ("auto", "frodkernels", "accelerated")
PATHS = ("activation", "fold", "materialize", "input", "output", "entries", "blocks", "function")
CONTEXT = ("product", "stream")  # they do less than the job

MEMORY = "hra_memory"
SAMPLED = "sampled_product"
SWITCHING = "adapter_switching"
OPS = {
    "frod_linear": "FRoD layer",
    "sparse_core": "Sparse core alone",
    "hra_linear": "HRA layer",
    "hra_conv2d": "HRA convolution",
    "householder": "Reflections alone",
    MEMORY: "HRA model: peak of memory",
    "sparse_delta_linear": "SHiRA layer",
    "paca_linear": "PaCA layer",
    SAMPLED: "Sampled product",
    SWITCHING: "Rapid switching",
}
TRAINED = {"sparse_delta_linear": "values", "paca_linear": "columns"}  # HRA's u elsewhere
FLOORS = {SAMPLED: "(aᵀb)[pattern]", SWITCHING: "copy of W"}
MODES = {
    "step": "forward + backward",
    "forward": "forward, nothing cached",
    "eval": "evaluation, parameters unchanged between calls",
    "backward": "backward",
    "merge": "an adapter into the weight",
    "unmerge": "an adapter out of the weight",
    "switch": "one adapter for another",
}
DTYPES = ("float32", "bfloat16", "bfloat16+float32", "float16", "float16+float32")


def mode_title(op: str, mode: str) -> str:
    return "no gradients" if op == SAMPLED else MODES[mode]


def dtype_title(op: str, dtype: str) -> str:
    """As in "bfloat16, u in float32"."""
    kind, *trained = dtype.split("+")
    return ", ".join((kind, *(f"{TRAINED.get(op, 'u')} in {wide}" for wide in trained)))


def _size(row: Row) -> list[str]:
    """What of a shape the op knows."""
    if row.op == "sparse_core":  # not m
        return [f"n={row.n}", f"nnz={row.nnz}", f"T={row.T}"]
    if row.op == "householder":  # nor here
        return [f"n={row.n}", f"T={row.T}", *([f"r={row.rank}"] if row.rank else [])]
    if row.op == SAMPLED:
        return [f"{row.m}×{row.n}", f"T={row.T}", f"{100 * row.nnz / (row.m * row.n):.3g} %"]
    if row.op == SWITCHING:  # no tokens
        return [f"{row.m}×{row.n}", f"r={row.rank}"]
    letter = "k" if row.op == "paca_linear" else "r"
    return [f"{row.n}→{row.m}", f"T={row.T}", *([f"{letter}={row.rank}"] if row.rank else [])]


def label(row: Row) -> str:
    """A line of a table."""
    size = ", ".join(_size(row))
    named = row.op not in ("sparse_core", "householder", SAMPLED, SWITCHING)
    return f"{row.model} {row.layer}, {size}" if named else size


def tick(row: Row) -> str:
    """The same on a figure's axis."""
    if row.op == "sparse_core":
        return f"n={row.n}\nT={row.T}"
    first, *rest = _size(row)
    if row.op in ("householder", SAMPLED, SWITCHING):
        return f"{first}\n{', '.join(rest)}"
    return f"{row.model}\n{row.layer}\n{', '.join((first, *rest))}"
