# SPDX-License-Identifier: Apache-2.0
"""The dense product: the same map and gradients, and where the native backend takes it."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

import frodkernels as fk
from frodkernels import _backends, dense
from frodkernels.functional import _views
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


# ---- where it is taken -----------------------------------------------------------------------------------------------

ROW_OF = {80: "A100", 86: "RTX 4090", 89: "RTX 4090", 90: "H100", 100: "B200", 120: "RTX 4090"}


@pytest.fixture(scope="module")
def documented():
    """The table of docs/kernels.md (Dispatch): device -> n -> T -> density."""
    text = (Path(__file__).parents[2] / "docs/kernels.md").read_text(encoding="utf-8").partition("### Dispatch")[2]
    header = re.search(r"^\| device \| n \|(( T \d+ \|)+)$", text, re.MULTILINE)
    tokens = [int(T) for T in re.findall(r"T (\d+)", header[1])]
    table = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), text[header.end() :].split("\n")[2:]):
        device, n, *densities = (cell.strip() for cell in line.strip("|").split("|"))
        table.setdefault(device, {})[int(n)] = dict(zip(tokens, map(float, densities), strict=True))
    return table


@pytest.fixture
def on_cuda(monkeypatch):
    """Makes tensors count as those of a CUDA device of the capability it is called with."""

    def pretend(capability, work=0):
        monkeypatch.setattr(dense, "DENSE_WORK", work)
        monkeypatch.setattr(dense, "_on_cuda", lambda features: True)
        monkeypatch.setattr(dense, "_capability", lambda device: capability)

    return pretend


def chosen(rows, columns, T, entries, lam=False, dtype=torch.bfloat16, param_dtype=torch.float32):
    """The choice for ``entries`` nonzeros, those of lam among them. Only shapes and dtypes are looked at: meta."""
    stored = entries - (rows if lam else 0)
    assert stored >= 0
    return dense.dense_is_faster(
        torch.empty(columns, T, dtype=dtype, device="meta"),
        torch.empty(rows, dtype=param_dtype, device="meta") if lam else None,
        torch.empty(stored, dtype=param_dtype, device="meta"),
        torch.empty(rows + 1, dtype=torch.int32, device="meta"),
    )


def assert_crosses_at(density, rows, columns, T, lam):
    last = math.floor(density * rows * columns)  # entries up to which gathering is faster
    assert not chosen(rows, columns, T, last, lam)
    assert chosen(rows, columns, T, last + 1, lam) == (density < 1)


def test_the_constants_are_the_documented_ones(documented):
    assert set(dense.BREAK_EVEN) == set(ROW_OF)
    for capability, rows in dense.BREAK_EVEN.items():
        table = documented[ROW_OF[capability]]
        assert tuple(table) == dense.SIZES
        for n, row in zip(dense.SIZES, rows, strict=True):
            assert dict(zip(dense.TOKENS, row, strict=True)) == {T: d for T, d in table[n].items() if T >= 128}


@pytest.mark.parametrize("lam", [False, True], ids=["S", "S and lam"])
@pytest.mark.parametrize("capability", ROW_OF)
def test_the_choice_follows_the_documented_table(capability, lam, documented, on_cuda):
    on_cuda(capability)
    for n, row in documented[ROW_OF[capability]].items():
        for T, density in row.items():
            assert_crosses_at(density if T >= 128 else 1.0, n, n, T, lam)


def test_little_work_never_pays_for_making_the_matrix(on_cuda):
    on_cuda(90, dense.DENSE_WORK)
    assert not chosen(1024, 1024, 512, 1024 * 1024)  # the table alone would take it
    n, T = 2048, 2**12
    assert n * n * T == dense.DENSE_WORK
    assert chosen(n, n, T, n * n) and not chosen(n, n, T - 1, n * n)


@pytest.mark.parametrize("capability, like", [(87, 86), (88, 86), (91, 90), (103, 100), (110, 100), (121, 120)])
def test_an_unknown_device_is_taken_for_the_highest_known_one_below(capability, like, documented, on_cuda):
    on_cuda(capability)
    for T, density in documented[ROW_OF[like]][2048].items():
        assert_crosses_at(density if T >= 128 else 1.0, 2048, 2048, T, False)


def test_a_device_below_all_known_ones_never_multiplies_densely(on_cuda):
    on_cuda(75)
    assert not any(chosen(n, n, T, n * n) for n in dense.SIZES for T in dense.TOKENS)


def nearest(entries, x):
    return min(entries, key=lambda entry: abs(math.log2(entry) - math.log2(x)))


def test_sizes_between_the_entries_take_the_nearest(documented):
    tokens = [128, 129, 255, 257, 300, 511, 900, 1023, 1025, 2048, 3000, 4095, 4097, 8192, 8193, 10**6]
    sizes = [1, 300, 1024, 1448, 1449, 2047, 2896, 2897, 5000, 6143, 6145, 9216, 20000]
    for capability, T, (rows, columns) in itertools.product(ROW_OF, tokens, itertools.product(sizes, sizes)):
        want = documented[ROW_OF[capability]][nearest(dense.SIZES, math.sqrt(rows * columns))][nearest(dense.TOKENS, T)]
        assert dense.break_even(capability, rows * columns, T) == want, (capability, T, rows, columns)


@pytest.mark.parametrize("T", [0, 1, 127])
def test_never_for_few_tokens(T, on_cuda):
    on_cuda(100)
    assert not chosen(1024, 1024, T, 1024**2)
    assert chosen(1024, 1024, 128, 1024**2)


@pytest.mark.parametrize("rows, columns", [(512, 2048), (2048, 512), (4096, 16384)])
def test_rectangular_patterns_count_by_their_area(rows, columns, documented, on_cuda):
    on_cuda(90)
    n = math.isqrt(rows * columns)
    assert_crosses_at(documented["H100"][nearest(dense.SIZES, n)][512], rows, columns, 512, False)


def test_never_stays_never_where_entries_outnumber_the_matrix(on_cuda):
    on_cuda(89)
    assert not chosen(1024, 1024, 512, 1024**2 + 1024, lam=True)  # a full S and lam
    assert chosen(1024, 1024, 2048, 1024**2 + 1024, lam=True)


def test_an_empty_matrix_is_not_multiplied(on_cuda):
    on_cuda(90)
    assert not chosen(0, 64, 4096, 0) and not chosen(64, 0, 4096, 0)


def test_only_bfloat16_features_and_no_float64_parameters(on_cuda):
    on_cuda(90)
    full = dict(rows=1024, columns=1024, T=4096, entries=1024**2)
    for param_dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert chosen(**full, param_dtype=param_dtype)
    assert not chosen(**full, param_dtype=torch.float64)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert not chosen(**full, dtype=dtype)


def test_no_matrix_above_two_gibibytes(on_cuda):
    on_cuda(90)
    rows, columns = 2**15, 2**14  # in float32 just 2 GiB
    assert chosen(rows, columns, 8192, rows * columns)
    assert not chosen(rows, columns + 1, 8192, rows * (columns + 1))


def test_no_pattern_is_too_dense_for_tiles_and_too_sparse_for_a_dense_product_of_many_tokens():
    densities = [row[-2:] for rows in dense.BREAK_EVEN.values() for row in rows]
    assert max(itertools.chain(*densities)) < _views._TILED_DENSITY


def test_never_on_the_cpu():
    case = make_case(200, 200, 300, "dense", torch.bfloat16)
    assert not dense.dense_is_faster(case.z, case.lam, case.values, case.pattern.csr.indptr)


def test_the_device_is_asked_for_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (8, 9), 1: (12, 0)}[device.index])
    dense._capability.cache_clear()
    try:
        assert [dense._capability(torch.device("cuda", i)) for i in range(2)] == [89, 120]
    finally:
        dense._capability.cache_clear()


@pytest.mark.parametrize("name", ["native", "auto"])
def test_the_native_backend_takes_it_where_it_is_faster(name, monkeypatch):
    case = make_case(20, 20, 33, dtype=torch.bfloat16)
    monkeypatch.setattr(dense, "dense_is_faster", lambda *_: True)
    want = outputs(dense, case)
    with fk.backend(name):
        got = ops.sparse_core(*case.forward), *ops.sparse_core_backward(*case.backward, ALL)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_other_backends_never_take_it(name, monkeypatch):
    case = make_case(20, 20, 33, dtype=torch.bfloat16)
    monkeypatch.setattr(dense, "dense_is_faster", lambda *_: True)
    monkeypatch.setattr(_backends, "implementation", lambda op, device: (name, getattr(reference, op)))
    case.z[3, 5] = math.nan  # reaches all outputs of its token in a dense product
    got = ops.sparse_core(*case.forward), *ops.sparse_core_backward(*case.backward, ALL)
    for ours, want in zip(got, outputs(reference, case), strict=True):
        assert torch.equal(ours.isnan(), want.isnan()) and torch.equal(ours.nan_to_num(), want.nan_to_num())
    assert outputs(dense, case)[0].isnan().sum() > got[0].isnan().sum()
