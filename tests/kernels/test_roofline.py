# SPDX-License-Identifier: Apache-2.0
"""The model: its rules on made-up work, its dense constants, and the goals at the two large shapes."""

import dataclasses
import json

import pytest

from bench.kernels.counts import Case
from bench.roofline import __main__ as command
from bench.roofline import cases, dispatch, model
from bench.roofline.devices import BY_NAME, DEVICES, LATENCY

A100, H100 = BY_NAME["A100"], BY_NAME["H100"]
WORK = model.Work(
    kernel="k", grid=108, per_sm=1, rounds=1, wavefronts=1.41e5, gather=1e5, mma=1e3, instructions=1e5, alu=4e4,
    fma=1e4, l2_bytes=4.5e7, hbm_bytes=1.7e7, first_bytes=0.0, limiter="registers",
)  # fmt: skip
REACH_FLOOR, REACH_DENSE = 1.6, 0.5


def test_a_kernel_takes_as_long_as_its_busiest_resource():
    t = model.time(WORK, A100)
    start = model.DEPENDENT_LOADS * LATENCY
    assert t.bound == "shared" and t.parts["shared"] == pytest.approx(100e-6)
    assert t.parts["L2"] == pytest.approx(10e-6) and t.parts["HBM"] == pytest.approx(10e-6, rel=1e-3)
    assert t.parts["tensor"] == pytest.approx(1e3 * 4096 / 2048 / 1.41e9)
    assert t.parts["issue"] == pytest.approx(1e5 / 4 / 1.41e9)
    assert t.parts["ALU"] == pytest.approx(4e4 / 2 / 1.41e9) and t.parts["FMA"] == pytest.approx(1e4 / 2 / 1.41e9)
    assert t.seconds() == pytest.approx(100e-6 + start)
    assert t.seconds(0.85) == pytest.approx(100e-6 / 0.85 + start)


@pytest.mark.parametrize(
    "field, amount, bound",
    [
        ("l2_bytes", 4.5e9, "L2"),
        ("hbm_bytes", 1.7e9, "HBM"),
        ("mma", 1e6, "tensor"),
        ("instructions", 1e7, "issue"),
        ("alu", 1e7, "ALU"),
        ("fma", 1e7, "FMA"),
    ],
)
def test_every_resource_can_bind(field, amount, bound):
    t = model.time(dataclasses.replace(WORK, **{field: amount}), A100)
    assert t.bound == bound and t.seconds() > model.time(WORK, A100).seconds()


def test_first_copies_take_time():
    t = model.time(dataclasses.replace(WORK, first_bytes=4.5e6), A100)
    assert t.start == pytest.approx(model.DEPENDENT_LOADS * LATENCY + 1e-6)


@pytest.mark.parametrize(
    "device, shape, gemm_us", [(A100, 0, 1126), (H100, 0, 397), (A100, 1, 3261), (H100, 1, 1161)], ids=str
)
def test_gemm_as_the_design_assumed(device, shape, gemm_us):
    found = model.dense(cases.calls("forward", cases.REACH[shape])[0], device)
    assert 1e6 * found["gemm"] == pytest.approx(gemm_us, rel=0.03)
    assert 0 < found["write"] < found["gemm"]


@pytest.mark.parametrize(
    "device, shape, hbm_us, gather_us", [(A100, 0, 79, 141), (H100, 0, 45, 93), (A100, 1, 102, 402), (H100, 1, 58, 264)]
)
def test_floors_as_the_design_assumed(device, shape, hbm_us, gather_us):
    found = model.floors(cases.calls("forward", cases.REACH[shape])[0], device)
    assert 1e6 * found["HBM"] == pytest.approx(hbm_us, rel=0.03)
    assert 1e6 * found["gather"] == pytest.approx(gather_us, rel=0.01)


@pytest.mark.parametrize("shape", cases.REACH, ids=lambda s: s.name)
@pytest.mark.parametrize("device", [A100, H100], ids=lambda d: d.name)
def test_reach(toolkit, device, shape):
    """Modelled: the product at most 1.6 times the largest of its floors and half of what a dense product takes."""
    found = cases.record("forward", shape, device)
    assert found["label"] == "modelled"
    assert found["floor_us"] == max(found["floors_us"].values()) > 0
    assert found["modelled_us"] >= found["floor_us"]
    assert found["over_floor"] <= REACH_FLOOR, found
    assert found["over_dense"] <= REACH_DENSE, found


def test_more_tokens_take_proportionally_longer(toolkit):
    """Beyond what starting costs."""
    few, many = (
        model.seconds(model.works(Case("forward", 2048, 41943, T), A100), A100) for T in (108 * 32, 2 * 108 * 32)
    )
    start = sum(t.start for t in model.times(Case("forward", 2048, 41943, 32), A100))
    assert many - start == pytest.approx(2 * (few - start), rel=0.15)


def test_json(toolkit, monkeypatch, capsys):
    monkeypatch.setattr(cases, "SHAPES", (cases.Shape("small", 512, 256, 2621),))
    assert command.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(r["device"], r["op"]) for r in found} == {(d.name, op) for d in DEVICES for op in cases.OPS}
    for r in found:
        assert r["label"] == "modelled" and r["modelled_us"] < r["modelled_us_at_85"]
        assert (r["n"], r["T"], r["nnz"]) == (512, 256, 2621)
    for device in DEVICES:
        us = {r["op"]: r["modelled_us"] for r in found if r["device"] == device.name}
        assert us["backward"] > max(us["transpose"], us["parameters"])


def test_tables_say_that_they_are_modelled(toolkit, monkeypatch, capsys):
    monkeypatch.setattr(cases, "SHAPES", (cases.Shape("small", 512, 256, 2621),))
    assert command.main(["--device", "A100", "--op", "forward"]) == 0
    out = capsys.readouterr().out
    assert "Modelled" in out and "| A100 | forward |" in out
    assert command.main(["--summary", "--device", "A100,H100"]) == 0
    out = capsys.readouterr().out
    assert "Modelled" in out and "| T 256, n 512, nnz 2621 | backward |" in out
    with pytest.raises(SystemExit):
        command.main(["--device", "A1"])
    capsys.readouterr()


def test_break_even():
    assert dispatch.crossing(lambda d: 3.0 - 100 * d) == pytest.approx(0.03)
    assert dispatch.crossing(lambda d: 0.01 - 100 * d) == 0.001  # dense from the first on
    assert dispatch.crossing(lambda d: 3.0 - d) == 1.0  # never


def test_work_between_counted_densities():
    """Each resource grows on its own line: one that is small at first may bind later."""
    high = dataclasses.replace(WORK, wavefronts=1.41e5 * 1.1, hbm_bytes=1.7e7 * 5)
    far = dispatch.between(WORK, high, 4.0)
    assert far.wavefronts == pytest.approx(1.41e5 * 1.4) and far.hbm_bytes == pytest.approx(1.7e7 * 17)
    assert model.time(high, A100).bound == "shared" and model.time(far, A100).bound == "HBM"
    assert dispatch.between(WORK, high, 0.0) == WORK and dispatch.between(WORK, high, 1.0) == high
    assert dispatch.between(high, WORK, 99.0).wavefronts == 0.0
    with pytest.raises(ValueError, match="not one kernel"):
        dispatch.between(WORK, dataclasses.replace(WORK, kernel="other"), 0.5)


def test_dense_wins_where_it_should(toolkit):
    """At few tokens never; at many, somewhere between the usual 1 % and a third."""
    few, many = (dispatch.break_even(1024, T, H100).density for T in (32, 8192))
    assert few == 1.0 and 0.01 < many < 0.33


def test_few_tokens():
    def rows(*pairs):
        return [dispatch.FewTokens("A100", 4096, T, tensor, fma) for T, tensor, fma in pairs]

    assert dispatch.fma_below(rows((32, 5, 1), (64, 5, 3), (128, 5, 6))) == 128
    assert dispatch.fma_below(rows((32, 5, 9), (64, 5, 10))) == 0
    assert dispatch.fma_below(rows((32, 5, 1), (64, 5, 2))) == 65
