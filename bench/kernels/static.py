# SPDX-License-Identifier: Apache-2.0
"""Figures read from compiled kernels: registers, stack, shared memory, and what their instructions are.

Reads cubins, or what holds them (the built library). The tools, cuobjdump and c++filt, are Triton's and binutils'.
Counts of instructions are static: not weighted by how often they run, except that ``per_event`` looks at the innermost
loop.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.simt import coverage

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "frodkernels" / "_C.abi3.so"
RESERVED = 1024  # cubins of sm_90 and later list the driver's own shared memory too

TENSOR = re.compile(r"(H|I|B|D|Q|O|HG|IG|QG|UTCH|UTCQ|UTCI|UTC\w*)MMA\b")
CLASSES = {
    "global_loads": r"LDG\b",
    "global_loads_128": r"LDG\.(?:\S*\.)?128\b",
    "global_stores": r"STG\b",
    "global_stores_128": r"STG\.(?:\S*\.)?128\b",
    "async_copies": r"LDGSTS\b",
    "shared_loads": r"LDS\b",
    "shared_stores": r"STS\b",
    "matrix_loads": r"LDSM\b",
    "local_loads": r"LDL\b",
    "local_stores": r"STL\b",
    "atomics": r"(?:ATOMG|ATOMS|ATOM|RED|REDG|REDS|SUATOM|SURED)\b",
    "barriers": r"(?:BAR|SYNCS)\b",
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in CLASSES.items()}
# Pipes that do less than a warp instruction a clock and scheduler on some architectures.
_PIPES = {
    "alu": re.compile(r"(?:LOP3|SHF|PRMT|IADD3|VIADD|ISETP|SEL|LEA|IMNMX|VIMNMX|FSETP|FSEL|FMNMX|PLOP3)\b"),
    "fma": re.compile(r"(?:FFMA|FFMA2|FMUL|FADD|IMAD|HFMA2|HMUL2|HADD2)\b"),
}
_EVENT = re.compile(r"(?:LDG|STG|LDGSTS|LDS|STS|LDSM|HMMA|LD|ST)\b")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[^\s;]+)*)([^;]*);")


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. ``threads`` is the most a block may have, None where it does not say."""

    name: str
    symbol: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    threads: int | None
    instructions: int
    tensor_ops: dict[str, int] = field(hash=False)
    counts: dict[str, int] = field(hash=False)
    per_event: dict[str, float] = field(hash=False)  # "all", "alu", "fma"; see _per_event
    atomic_kinds: tuple[str, ...] = ()

    @property
    def spills(self) -> int:
        return self.counts["local_loads"] + self.counts["local_stores"]

    @property
    def function(self) -> str:
        """The name in the source: no namespace, no template arguments."""
        return re.sub(r"<.*", "", self.name).split("::")[-1]

    @property
    def scalar(self) -> str:
        """The first template argument's dtype, "" where there is none."""
        found = re.search(r"<(__half|__nv_bfloat16|float|double)\b", self.name)
        return {"__half": "float16", "__nv_bfloat16": "bfloat16", "float": "float32", "double": "float64"}.get(
            found.group(1) if found else "", ""
        )


class NoTool(Exception):
    """A tool that reads binaries is missing; the message names it."""


@functools.cache
def _cuobjdump() -> str:
    try:
        import triton
    except ImportError as error:
        raise NoTool("cuobjdump comes with Triton: pip install triton") from error
    return str(triton.knobs.nvidia.cuobjdump.path)


def _run(*command: str, cwd: str | None = None, text: str | None = None) -> str:
    return subprocess.run(command, cwd=cwd, input=text, capture_output=True, text=True, check=True).stdout


def _without_parameters(name: str) -> str:
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and not name.startswith("(anonymous namespace)", i):
            return name[:i]
    return name


def _demangle(symbols: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        raise NoTool("c++filt was not found: install binutils")
    lines = _run(tool, text="\n".join(symbols) + "\n").splitlines()
    return [_without_parameters(line.removeprefix("void ")) for line in lines]


Code = list[tuple[int, str, str]]  # address, instruction, operands


def _loops(code: Code) -> list[tuple[int, int]]:
    """From the target of a backward branch to it, in addresses."""
    found = []
    for address, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target.group(1), 16) < address:
            found.append((int(target.group(1), 16), address))
    return found


def _per_event(code: Code) -> dict[str, float]:
    """Instructions to each one that moves data or is of a tensor core, in the loop where the work is: all of them, and
    those of two pipes.

    That is the smallest loop with tensor instructions, the one with most of them if there are several; in a kernel
    without them, the innermost loop with most events; in one without loops, all its code.
    """
    tensor = any(TENSOR.match(op) for _, op, _ in code)
    working = TENSOR if tensor else _EVENT
    bodies = {}
    works = {op for _, op, _ in code if working.match(op)}
    for first, last in {*_loops(code), (0, code[-1][0])}:
        body = [op for address, op, _ in code if first <= address <= last and not op.startswith("NOP")]
        if not works.isdisjoint(body):
            bodies[first, last] = body
    inner = [
        body
        for at, body in bodies.items()
        if not any(other != at and at[0] <= other[0] and other[1] <= at[1] for other in bodies)
    ]
    if not inner:
        return {"all": 0.0, **dict.fromkeys(_PIPES, 0.0)}
    body = max(inner, key=lambda ops: (sum(op in works for op in ops), -len(ops)))
    events = sum(bool(_EVENT.match(op)) for op in body)
    pipes = {name: sum(bool(p.match(op)) for op in body) / events for name, p in _PIPES.items()}
    return {"all": len(body) / events, **pipes}


def _threads(cubin: bytes) -> dict[str, int]:
    """The most threads a block may have, by symbol: attributes in the ELF sections .nv.info.<symbol>."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for name_at, _, _, _, offset, length in headers:
        at = headers[names][4] + name_at
        name = cubin[at : cubin.index(b"\0", at)].decode()
        if not name.startswith(".nv.info."):
            continue
        end = offset + length
        while offset < end:
            kind, attribute, more = struct.unpack_from("<BBH", cubin, offset)
            if kind == 4 and attribute in (0x05, 0x10):  # a value of `more` bytes; MAX_THREADS, REQNTID
                found[name.removeprefix(".nv.info.")] = math.prod(struct.unpack_from("<III", cubin, offset + 4))
            offset += 4 + (more if kind == 4 else 0)
    return found


def _cubins(path: Path, folder: str) -> list[Path]:
    head = path.read_bytes()[:20]
    if head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") == 190:  # EM_CUDA
        return [path]
    _run(_cuobjdump(), "-xelf", "all", str(path.resolve()), cwd=folder)
    return sorted(Path(folder).iterdir())


def _read(cubin: Path) -> list[Kernel]:
    sass, usage = (_run(_cuobjdump(), flag, str(cubin)) for flag in ("--dump-sass", "--dump-resource-usage"))
    threads = _threads(cubin.read_bytes())
    arch = int(re.search(r"sm_(\d+)", sass).group(1))  # type: ignore[union-attr]
    resources = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+):\n\s*(.*)", usage)
    }
    parts = [part.split("\n", 1) for part in re.split(r"\n\s*Function : ", sass)[1:]]
    names = _demangle([name.strip() for name, _ in parts]) if parts else []
    found = []
    for (symbol, body), name in zip(parts, names, strict=True):
        code = [(int(address, 16), op, rest) for address, op, rest in _INSTRUCTION.findall(body)]
        used = resources[symbol.strip()]
        shared = used["SHARED"] - (RESERVED if arch >= 90 and used["SHARED"] >= RESERVED else 0)
        ops = collections.Counter(op for _, op, _ in code)
        tensor = {op: times for op, times in ops.items() if TENSOR.match(op)}
        counts = {key: sum(times for op, times in ops.items() if p.match(op)) for key, p in _PATTERNS.items()}
        found.append(Kernel(
            name=name, symbol=symbol.strip(), arch=arch, registers=used["REG"], stack=used["STACK"],
            local=used["LOCAL"], shared=shared, threads=threads.get(symbol.strip()),
            instructions=sum(not op.startswith("NOP") for _, op, _ in code), tensor_ops=tensor, counts=counts,
            per_event=_per_event(code),
            atomic_kinds=tuple(sorted(op for op in ops if _PATTERNS["atomics"].match(op))),
        ))  # fmt: skip
    return found


def read(path: Path) -> list[Kernel]:
    """The kernels of a cubin or of a file that holds cubins, of every architecture."""
    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # nvdisasm takes a second or two for each
            return [kernel for kernels in pool.map(_read, _cubins(path, folder)) for kernel in kernels]


@functools.cache
def library() -> list[Kernel]:
    """The kernels of the built library. Reading it takes many seconds, so the result is kept in build/kernels."""
    if not LIBRARY.exists():
        raise FileNotFoundError(f"{LIBRARY} is not built: make setup")
    key = hashlib.sha256(LIBRARY.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    return cached("static", key, lambda: read(LIBRARY))


Result = TypeVar("Result")


def cached(name: str, key: str, make: Callable[[], Result]) -> Result:
    """What ``make`` returns, or returned for the same key the last time."""
    path = ROOT / "build" / "kernels" / f"{name}.pickle"
    with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError):
        kept_key, result = pickle.loads(path.read_bytes())
        if kept_key == key:
            return result
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(pickle.dumps((key, made)))
    part.replace(path)
    return made


def declared() -> set[str]:
    """The names of the ``__global__`` functions in csrc/cuda."""
    return set(coverage.kernels_of(ROOT / "csrc" / "cuda"))
