# SPDX-License-Identifier: Apache-2.0
"""Stage "machine": what the numbers of this report were taken on and with."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

from bench._machine import ROOT, describe, load_warning
from bench.gpu.stage import OK, Item, Mark, Options, Record, Unavailable, not_ok, record, table

NAME, TITLE = "machine", "Machine"

# nvidia-smi's fields; one it does not know is asked for no more (they come and go between releases)
SMI = (
    "name", "driver_version", "pci.bus_id", "memory.total", "memory.used", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "clocks_throttle_reasons.active", "power.draw", "power.limit", "temperature.gpu",
    "ecc.mode.current", "persistence_mode", "compute_mode", "mig.mode.current", "pcie.link.gen.current",
)  # fmt: skip
PACKAGES = ("torch", "triton", "peft", "transformers", "diffusers", "accelerate", "numpy", "frodkernels")
TELLING = ("CUDA_", "TRITON_", "TORCH", "PYTORCH_", "FRODKERNELS_", "OMP_NUM_THREADS", "NVIDIA_TF32_OVERRIDE")


def items(options: Options) -> list[Item]:
    return [Item("gpu", 120), Item("nvidia-smi", 120), Item("versions", 60), Item("doctor", 300)]


def budget(options: Options) -> float:
    return 900.0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu(options: Options) -> Record:
    import torch

    if options.device == "cpu":
        return record(OK, f"dry run on {describe(torch.device('cpu')).name}", threads=torch.get_num_threads())
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names = (
            "name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size", "warp_size",
            "shared_memory_per_block_optin", "shared_memory_per_multiprocessor", "regs_per_multiprocessor",
            "clock_rate", "memory_clock_rate", "memory_bus_width",
        )  # fmt: skip
        found: dict[str, Any] = {name: getattr(properties, name, None) for name in names}
        found["free_memory"] = torch.cuda.mem_get_info(index)[0]
        devices.append(found)
    one = devices[torch.cuda.current_device()]
    memory, l2 = one["total_memory"] / 2**30, (one["L2_cache_size"] or 0) / 2**20
    summary = (
        f"{one['name']}, sm_{one['major']}{one['minor']}, {one['multi_processor_count']} SMs, {memory:.1f} GiB "
        f"({one['free_memory'] / 2**30:.1f} free), L2 {l2:.0f} MiB"
    )
    return record(OK, summary, devices=devices, cuda=torch.version.cuda, bf16=torch.cuda.is_bf16_supported())


def parse_smi(text: str) -> list[dict[str, str]]:
    """What ``nvidia-smi --query-gpu=... --format=csv`` printed: one dict per GPU."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    return [dict(zip(rows[0], row, strict=False)) for row in rows[1:]] if rows else []


def _smi() -> Record:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise Unavailable("no nvidia-smi on PATH")
    fields = list(SMI)
    while fields:
        asked = subprocess.run(
            [tool, f"--query-gpu={','.join(fields)}", "--format=csv"], capture_output=True, text=True, timeout=60
        )
        unknown = [name for name in fields if f'"{name}"' in asked.stdout + asked.stderr]
        if asked.returncode == 0 or not unknown:
            break
        fields = [name for name in fields if name not in unknown]
    gpus = parse_smi(asked.stdout)
    if asked.returncode or not gpus:
        raise Unavailable(f"nvidia-smi failed: {(asked.stdout + asked.stderr).strip()[:200]}")
    others = subprocess.run(
        [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    busy = [line for line in others.stdout.splitlines() if line.strip()]
    noise = f"; {len(busy)} other processes use it: times are noisy" if busy else ""
    return record(OK, f"driver {gpus[0].get('driver_version', '?')}{noise}", gpus=gpus, other_processes=busy)


def _versions() -> Record:
    import torch

    from frodkernels.__main__ import native_build, native_line

    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(TELLING)}
    commit = describe(torch.device("cpu")).commit
    return record(
        OK,
        f"commit {commit}; native library: {native_line()}",
        versions=versions,
        variables=variables,
        commit=commit,
        native=native_build(),
        torch_config=torch.__config__.show(),
        cpu=describe(torch.device("cpu")).name,
        cores=os.cpu_count(),
        load=load_warning(),
    )


def _doctor() -> Record:
    done = subprocess.run([sys.executable, "-m", "frodkernels"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    text = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise RuntimeError(f"the doctor ended with status {done.returncode}: {text[-400:]}")
    return record(OK, text.splitlines()[0], text=text)


def run(item: str, options: Options, mark: Mark) -> Record:
    return {"gpu": lambda: _gpu(options), "nvidia-smi": _smi, "versions": _versions, "doctor": _doctor}[item]()


def verdict(records: dict[str, Record]) -> str:
    return records["gpu"]["summary"]


def render(records: dict[str, Record]) -> str:
    parts = [table(["", ""], [[name, one["summary"]] for name, one in records.items()], text=True)]
    data = records.get("versions", {}).get("data", {})
    if data:
        parts.append(table(["package", "version"], [list(pair) for pair in data["versions"].items()], text=True))
    for gpu in records.get("nvidia-smi", {}).get("data", {}).get("gpus", []):
        parts.append(table(["nvidia-smi", ""], [list(pair) for pair in gpu.items()], text=True))
    doctor = records.get("doctor", {}).get("data", {}).get("text")
    if doctor:
        parts.append("<details><summary>The doctor, <code>python -m frodkernels</code></summary>\n")
        parts.append(f"```text\n{doctor}\n```\n\n</details>\n")
    return "\n".join(parts)


def expected(records: dict[str, Record]) -> list[str]:
    missing = {"nvidia-smi": ("ok", "unavailable")}  # a machine without a GPU rarely has it
    return [line for name, one in records.items() for line in not_ok({name: one}, missing.get(name, ("ok",)))]
