# SPDX-License-Identifier: Apache-2.0
"""The Householder kernels: what the model makes of them, and how they store."""

import dataclasses
import json

import pytest

from bench.kernels import counts
from bench.kernels.counts import Reflections
from bench.roofline import __main__ as command
from bench.roofline import householder, model, reflections
from bench.roofline.devices import BY_NAME

A100, H100 = BY_NAME["A100"], BY_NAME["H100"]
FORWARD, BACKWARD = 1.5, 1.9  # of the least HBM traffic; the backward reads g twice
GOALS = [(4096, 8192, 8), (4096, 8192, 32)]


@pytest.mark.parametrize("size", GOALS, ids=str)
@pytest.mark.parametrize("device", [A100, H100], ids=lambda d: d.name)
def test_reach(toolkit, device, size):
    """Modelled: near what HBM must move, and never slower than plain torch all in 16 bits, which keeps 8 bits of C."""
    forward, backward = (reflections.record(op, *size, device) for op in reflections.OPS)
    for r, most in ((forward, FORWARD), (backward, BACKWARD)):
        assert r["label"] == "modelled" and r["modelled_us"] >= r["floor_us"] > 0
        assert r["over_floor"] <= most, r
        assert r["modelled_us"] <= 1.05 * r["plain_us"]["torch_16_bits"], r
        assert r["modelled_us"] <= 0.3 * r["plain_us"]["torch_float32"], r
    assert backward["modelled_us"] > forward["modelled_us"]


def map_counts(case, target=A100.target):
    found = counts.run(case, target, model.SAMPLE)
    return next(c for c in found.values() if c.function in householder.MAPS)


def test_rows_that_shared_memory_holds_come_once(toolkit):
    case = Reflections("householder", 1024, 8, 64)
    c = map_counts(case)
    rows = case.T * case.n * 2
    assert householder.hbm_bytes(c, case, A100, 1, rows) == 2 * rows


def test_rows_that_no_cache_holds_come_twice(toolkit):
    case = Reflections("householder", 8192, 32, 4096)
    c = map_counts(case)
    rows = case.T * case.n * 2
    none, large = (dataclasses.replace(A100, cache=size) for size in (0.0, 1e9))
    assert householder.hbm_bytes(c, case, large, 1, rows) == 2 * rows
    assert 2.5 * rows < householder.hbm_bytes(c, case, none, 1, rows) < 3.01 * rows


def test_the_busiest_split(toolkit):
    """Of a gradient's splits: the first, which is counted, is one of the shortest."""
    case = Reflections("householder_backward", 1024, 8, 1000)
    found = counts.run(case, A100.target, model.SAMPLE)
    c = next(c for c in found.values() if c.function in householder.GRADIENTS)
    pieces, splits = 32, c.grid // 4
    longest, mean = householder.shares(c, case)
    assert longest == -(-pieces // splits) / (pieces // splits) and 1 <= mean <= longest


@pytest.mark.parametrize("T", [1, 16, 100, 1000, 8192])
def test_blocks_of_tokens(toolkit, T):
    c = map_counts(Reflections("householder", 256, 8, T))
    assert -(-T // (16 * householder.tiles(c, T))) == c.grid


def test_floors_and_plain_torch():
    forward, backward = (Reflections(op, 4096, 32, 8192) for op in reflections.OPS)
    row = 4096 * 8192 * 2
    assert householder.floors(forward, A100)["HBM"] == pytest.approx(2 * row / A100.hbm, rel=0.02)
    assert householder.floors(backward, A100)["HBM"] == pytest.approx(3 * row / A100.hbm, rel=0.02)
    for case in (forward, backward):
        plain = householder.plain_seconds(case, A100, 0.0)
        assert plain["torch_float32"] > plain["torch_16_bits"] > householder.floors(case, A100)["HBM"]


def test_tables_and_records(toolkit, monkeypatch, capsys):
    monkeypatch.setattr(reflections, "SIZES", ((256, 512, 8),))
    assert command.main(["--householder", "--device", "A100,H100"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Modelled") and "| 256, 512, 8 | householder_backward |" in out
    assert command.main(["--householder", "--json", "--device", "A100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["op"] for r in found] == list(reflections.OPS)
    for r in found:
        assert r["label"] == "modelled" and (r["n"], r["T"], r["rank"]) == (256, 512, 8)
        assert {k["kernel"].split("<")[0] for k in r["kernels"]} >= {
            "householder_mma_kernel",
            "householder_pack_kernel",
        }


def test_tokens_leave_16_bytes_at_a_time(library):
    """The compiler splits an assignment of 16 bytes where it pleases: only the code says what it did."""
    found = [k for k in library if k.function == "householder_mma_kernel"]
    assert {householder.tiles_of(k) for k in found} == {1, 2, 3, 4, 5}
    for k in found:
        assert k.counts["global_stores_128"] >= householder.tiles_of(k), (k.arch, k.name)
