# SPDX-License-Identifier: Apache-2.0
"""The executor's sampling: which blocks run, what is counted, and that the sample stands for the whole."""

import dataclasses

import pytest
import torch

from bench.kernels import counts
from bench.kernels.counts import FIRST, Case, Target
from bench.roofline import model
from bench.roofline.devices import BY_NAME
from tests.simt import executor

A100 = BY_NAME["A100"]
CASE = Case("forward", 1024, 10485, 512)


def one(found, function):
    return next(c for name, c in found.items() if name.split("<")[0] == function)


def test_every_kth_block_runs(toolkit):
    whole, some = (counts.run(CASE, A100.target, s) for s in (None, {"product_mma_kernel": 5}))
    a, b = one(whole, "product_mma_kernel"), one(some, "product_mma_kernel")
    assert a.grid == b.grid == a.blocks and b.blocks == -(-a.grid // 5) and b.scale == pytest.approx(a.grid / b.blocks)
    assert 0 < b.loads < a.loads and 0 < b.mma < a.mma
    assert b.loads * b.scale == pytest.approx(a.loads, rel=0.1)
    assert one(whole, "pack_kernel") == one(some, "pack_kernel")  # not named: runs in full


def test_only_the_sampled_part_is_written(toolkit):
    n, T = 256, 512
    z, values = torch.ones(n, T), torch.ones(1)
    indptr, index = torch.ones(n + 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    indptr[0] = 0
    module = executor.checker()
    written = []
    for every in (1, FIRST):
        module.configure(sample={"product_rows_kernel": every})
        module.reset()
        out = torch.ops.simt_check.native_sparse_core(z, torch.ones(n), values, indptr, index, index, False, None)
        written.append(int((out == 1).sum()))
        kernels = module.kernels()
        (k,) = kernels.values()
        assert k["blocks"] == (k["grid"] if every == 1 else 1) and k["grid"] > 1 and k["block_threads"] == 256
    module.configure()
    module.reset()
    assert written[0] >= n * T - T and written[1] <= written[0] * k["blocks"] / k["grid"] + T


def test_a_sample_is_checked(toolkit):
    with pytest.raises(ValueError, match=r"sample\[a_kernel\] must be at least 1"):
        executor.checker().configure(sample={"a_kernel": 0})
    with pytest.raises(TypeError):
        executor.checker().configure(sample={"a_kernel": -1})


@pytest.mark.parametrize("op", ["forward", "gradient"])
def test_the_model_takes_the_sample_for_the_whole(toolkit, op):
    """Bytes from L2 and gathered wavefronts that the model makes of one block, against a full run."""
    case = Case(op, 1024, 10485, 1024)
    target = Target(8, A100.target.shared_per_block, 80)  # few SMs: several rounds
    device = dataclasses.replace(A100, sms=8)
    assert device.target == target
    full = {name: c for name, c in counts.run(case, target).items() if c.mma}
    ((name, c),) = full.items()
    work = next(w for w in model.works(case, device) if w.kernel == name)
    assert work.l2_bytes == pytest.approx(32 * c.loads, rel=0.05)
    busiest = -(-c.grid // 8) / c.grid  # of all blocks, on one SM
    assert work.gather == pytest.approx(c.gather_wavefronts * busiest, rel=0.15)
    assert work.wavefronts > work.gather and work.mma == pytest.approx(c.mma * busiest, rel=0.15)
