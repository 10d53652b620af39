# SPDX-License-Identifier: Apache-2.0
"""Stage "model": which modelled time stands beside which measured one."""

from __future__ import annotations

import json
import subprocess

import pytest

from bench.gpu import model, shapes
from bench.gpu.stage import Options
from bench.roofline import cases, devices


def silent(_: str) -> None:
    pass


H100_SXM = "NVIDIA H100 80GB HBM3"


def test_model_and_measurement_are_joined():
    row = dict(op="sparse_core", impl="native", mode="backward", n=4096, T=8192, nnz=167772, dtype="bfloat16", ms="0.5")
    one = dict(op="backward", device="H100", n=4096, T=8192, nnz=167772, dtype="bfloat16", modelled_us=250.0)
    changes = ({"device": "A100"}, {"op": "parameters"}, {"T": 4608}, {"dtype": "f32"}, {"tiles": False}, {"n": None})
    others = [{**one, **change} for change in changes]
    pairs = model.join([*others, one], [row, {**row, "impl": "peft"}, {**row, "ms": ""}], H100_SXM)
    assert [(pair["measured_us"], pair["modelled_us"], pair["ratio"]) for pair in pairs] == [(500.0, 250.0, 2.0)]
    assert model.read_records(json.dumps([one])) == model.read_records(json.dumps({"records": [one]})) == [one]
    assert model.read_records(f"{json.dumps(one)}\n{json.dumps(one)}\n") == [one, one]
    found = {"comparison": {"status": "ok", "summary": "1 pair", "data": {"pairs": pairs}}}
    assert "modelled" in model.render(found) and "2.00" in model.render(found)


@pytest.mark.parametrize("device, machine, same", [
    ("H100", H100_SXM, True), ("H100", "NVIDIA H100 PCIe", False), ("H100", "NVIDIA H100 NVL", False),
    ("H100", "NVIDIA H200", False), ("H100", f"{H100_SXM} MIG 1g.10gb", False),
    ("A100", "NVIDIA A100-SXM4-80GB", True), ("A100", "NVIDIA A100-SXM4-40GB", False),
    ("A100", "NVIDIA A100 80GB PCIe", False), ("A100", "NVIDIA A100-PCIE-40GB", False),
    ("RTX 4090", "NVIDIA GeForce RTX 4090", True), ("RTX 4090", "NVIDIA GeForce RTX 4090 Laptop GPU", False),
    ("RTX 4090", "NVIDIA GeForce RTX 4090 D", False), ("RTX 4090", "NVIDIA RTX 6000", False),
    ("L40S", "NVIDIA L40S", True), ("L40S", "NVIDIA L40", False), ("B200", "NVIDIA B200", True),
    ("B200", "NVIDIA GB200", False),
])  # fmt: skip
def test_only_the_part_that_was_modelled_is_joined(device, machine, same):
    assert model.is_this(device, machine) == same


def _roofline(monkeypatch, records):
    """Puts ``records`` in the place of bench.roofline's; the time limits it is given."""
    limits = []

    def run(line, timeout, **how):
        limits.append(timeout)
        return subprocess.CompletedProcess(line, 0, json.dumps(records), "")

    monkeypatch.setattr(model.subprocess, "run", run)
    return limits


def test_every_modelled_op_of_a_shape_is_joined_with_its_measurement(monkeypatch):
    """All that the model has a time of is measured under the same name and size."""
    assert set(model.PARTS) == set(devices.BY_NAME)
    jobs = [job for job in shapes.jobs() if job.op == "sparse_core" and job.dtype == "bfloat16"]
    names = dict(op="sparse_core", impl="native", dtype="bfloat16", ms="0.5")
    rows = [dict(names, mode=j.mode, n=j.shape.n, T=j.shape.T, nnz=j.shape.nnz) for j in jobs]
    first = jobs[0].shape
    same = dict(device="H100", impl="native", dtype="bfloat16", n=first.n, T=first.T, nnz=first.nnz, modelled_us=250.0)
    limits = _roofline(monkeypatch, [dict(same, op=op, mode=op) for op in cases.OPS])
    found = model.run("comparison", Options(scale=3.0, inputs={"rows": rows, "machine": H100_SXM}), silent)
    assert sorted(pair["mode"] for pair in found["data"]["pairs"]) == sorted(cases.OPS)
    assert limits == [1500.0]


@pytest.mark.parametrize("machine, capability, like", [
    ("NVIDIA H100 PCIe", 90, "H100"), ("NVIDIA H200", 90, "H100"), ("NVIDIA A100-SXM4-40GB", 80, "A100"),
    ("NVIDIA L40S-48Q", 89, "L40S"), ("NVIDIA RTX A6000", 86, "A100"), ("Tesla V100", 70, "none"),
    ("a CPU", None, "none"),
])  # fmt: skip
def test_another_device_is_told_the_nearest_model(monkeypatch, machine, capability, like):
    names = ("A100", "H100", "L40S", "RTX 4090", "B200")
    _roofline(monkeypatch, [dict(op="forward", device=name, n=1, T=1, nnz=1, modelled_us=1.0) for name in names])
    found = model.run("comparison", Options(inputs={"rows": [], "machine": machine, "capability": capability}), silent)
    assert found["status"] == "ok" and f"nearest model: {like}" in found["summary"] and not found["data"]["pairs"]
