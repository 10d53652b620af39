# SPDX-License-Identifier: Apache-2.0
"""The sampled product by dense blocks: what the model makes of it, and that the library's table is the model's."""

import dataclasses
import json

import pytest
import torch

from bench.kernels import counts
from bench.kernels.counts import Sampling, Scatter
from bench.roofline import __main__ as command
from bench.roofline import blocks, model, sampling
from bench.roofline.devices import BY_NAME
from frodkernels.ops import sampled_way_gpu as way

A100, H100, L40S = (BY_NAME[name] for name in ("A100", "H100", "L40S"))
OF_TABLE = {80: "A100", 89: "RTX 4090", 90: "H100", 100: "B200"}


def kernel_of(case, device, sample=None):
    return next(c for c in counts.run(case, device.target, sample).values() if c.function in blocks.EQUAL)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("n", [100, 1000])
def test_the_model_knows_the_grid(toolkit, n, dtype):
    """The launcher's own: row blocks, ranges of columns and splits; also where ranges hold several blocks."""
    for sms in (1, 7, 132):
        device = dataclasses.replace(A100, sms=sms)
        case = Sampling(n, n * n // 100, 300, dtype)
        c = kernel_of(case, device, model.SAMPLE)
        assert 0 < blocks.mean(c, case, device) <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_model_takes_the_first_block_for_all(toolkit, dtype):
    """Bytes from L2 and instructions that the model makes of one block, against a full run."""
    case, device = Sampling(768, 58982, 512, dtype), dataclasses.replace(A100, sms=8)
    c = kernel_of(case, device)
    work = next(w for w in model.works(case, device) if w.kernel == c.kernel)
    assert work.l2_bytes == pytest.approx(32 * c.loads, rel=0.1)
    busiest = -(-c.grid // 8) / c.grid  # of all blocks, on one SM
    assert work.mma == pytest.approx(c.mma * busiest, rel=0.05)


def test_tensor_cores_are_what_binds(toolkit):
    """Modelled: a large product near the rate of mma.sync on A100, two thirds of it on H100, where L2 binds."""
    case = Sampling(4096, 1677721, 4096)
    for device, most in ((A100, 1.15), (H100, 1.5)):
        (time,) = [t for t in model.times(case, device) if t.work.mma]
        least = 2 * case.n**2 * case.T / (device.mma_flops * device.sms * device.clock)
        assert least < time.seconds() <= most * least
    assert max(time.parts, key=time.parts.get) == "L2"


def test_blocks_win_where_patterns_are_dense(toolkit):
    """Their time hardly grows with the entries; that of single entries is proportional to them."""
    entries, dense = sampling.ways(1024, 1024, "bfloat16", A100)
    assert dense(0.3) < 1.6 * dense(0.01) and entries(0.3) > 4 * entries(0.03)
    assert dense(0.01) > entries(0.01) and dense(0.3) < entries(0.3)


@pytest.mark.parametrize(
    "capability, dtype", [(80, torch.bfloat16), (90, torch.bfloat16), (80, torch.float32)], ids=str
)
def test_the_table_is_the_models(toolkit, capability, dtype):
    name = str(dtype).removeprefix("torch.")
    found = sampling.record(*sampling.CHOSEN, name, BY_NAME[OF_TABLE[capability]])
    assert found["label"] == "modelled"
    assert way.gpu_break_even(capability, dtype) == pytest.approx(found["density"], rel=0.1)


def test_which_row_of_the_table():
    assert way.gpu_break_even(75, torch.bfloat16) == way.NEVER
    assert way.gpu_break_even(87, torch.float32) == way.gpu_break_even(86, torch.float32)
    assert way.gpu_break_even(103, torch.float16) == way.gpu_break_even(100, torch.bfloat16)
    for capability in way.BREAK_EVEN:
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert 0 < way.gpu_break_even(capability, dtype) <= way.NEVER


def test_multiply_adds_of_float64_are_counted():
    """Where a device has next to none, blocks of zeros cost too much: never."""
    assert sampling._wide("float32", 1e9, 1000, L40S) == 0
    assert sampling._wide("float64", 1e9, 1000, L40S) == pytest.approx(1e12 / (2 * 142 * 2.52e9))


def test_a_scatter_costs_a_sector_an_entry(toolkit):
    case = Scatter(512, 2621)
    (c,) = counts.run(case, A100.target).values()
    (time,) = model.times(case, A100)
    entries = [s for s in c.sites if s.file == "scatter.cuh" and s.bytes == 2]
    assert all(s.sectors <= case.nnz for s in entries)
    assert 0 < time.work.hbm_bytes <= 32 * (c.loads + c.stores) * 1.1


def test_the_command(toolkit, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "SIZES", ((512, 256),))
    monkeypatch.setattr(sampling, "DTYPES", ("bfloat16", "float64"))
    assert command.main(["--sampled", "--device", "A100,L40S"]) == 0
    out = capsys.readouterr().out
    assert "Modelled" in out and "| bfloat16 | 512, 256 |" in out and "| L40S |" in out
    assert command.main(["--sampled", "--json", "--device", "A100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(r["device"], r["dtype"], r["label"]) for r in found} == {
        ("A100", "bfloat16", "modelled"), ("A100", "float64", "modelled"),
    }  # fmt: skip
