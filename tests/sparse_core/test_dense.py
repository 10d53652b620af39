# SPDX-License-Identifier: Apache-2.0
"""The dense product: the same map and gradients, and where the native backend takes it."""

import pytest
import torch

import frodkernels as fk
from frodkernels import dense
from frodkernels.ops import sparse_core as ops
from frodkernels.reference import sparse_core as reference
from tests.support import KINDS, assert_no_worse_than_torch, make_case

PAIRS = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
ALL = [True, True, True]


def outputs(module, case, token_major=False):
    return module.sparse_core(*case.forward, token_major), *module.sparse_core_backward(
        *case.backward, ALL, token_major
    )


@pytest.mark.parametrize("dtype, param_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m, n", [(40, 40), (35, 20), (1, 9), (1, 1)])
@pytest.mark.parametrize("token_major", [False, True])
def test_the_same_map_and_gradients(m, n, kind, dtype, param_dtype, token_major):
    cases = [make_case(m, n, 70, kind, dtype, param_dtype, seed=seed) for seed in range(8)]  # one number may be lucky
    ours, torchs = ([outputs(module, case, token_major) for case in cases] for module in (dense, reference))
    exact = [(case.exact_forward(), *case.exact_backward()) for case in cases]
    for i in range(4):
        got, right, plain = ([outs[i] for outs in each] for each in (ours, exact, torchs))
        assert_no_worse_than_torch(*(torch.cat([t.flatten() for t in ts]) for ts in (got, right, plain)))
        assert [t.stride() for t in got] == [t.stride() for t in plain]


@pytest.mark.parametrize(
    "needs", [[True, False, False], [False, True, False], [False, False, True], [False] * 3], ids=str
)
def test_only_what_is_needed(needs):
    case = make_case(20, 20, 33, dtype=torch.bfloat16)
    whole = dense.sparse_core_backward(*case.backward, ALL)
    for full, got, need in zip(whole, dense.sparse_core_backward(*case.backward, needs), needs, strict=True):
        assert torch.equal(got, full) if need else got.numel() == 0 and got.dtype == full.dtype


def test_the_choice():
    at = dict(T=4096, rows=4096, columns=4096, dtype=torch.bfloat16, break_even=0.05)
    n2 = 4096 * 4096
    assert not dense.wins(entries=n2 // 100, **at)
    assert dense.wins(entries=n2 // 10, **at)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert not dense.wins(entries=n2, **at | dict(dtype=dtype))
    for refused in (dict(T=1024), dict(rows=2**20, columns=2**12)):
        assert not dense.wins(entries=n2, **at | refused)


def test_never_on_the_cpu():
    case = make_case(200, 200, 300, "dense", torch.bfloat16)
    assert not dense.dense_is_faster(case.z, case.lam, case.values, case.pattern.csr.indptr)


def test_the_native_backend_takes_it_where_it_is_faster(monkeypatch):
    case = make_case(20, 20, 33, dtype=torch.bfloat16)
    monkeypatch.setattr(dense, "dense_is_faster", lambda *_: True)
    want = outputs(dense, case)
    with fk.backend("native"):
        got = ops.sparse_core(*case.forward), *ops.sparse_core_backward(*case.backward, ALL)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with fk.backend("reference"):  # asked for by name: no other way is taken
        assert torch.equal(ops.sparse_core(*case.forward), reference.sparse_core(*case.forward))
