# SPDX-License-Identifier: Apache-2.0
"""SparsePattern: what it refuses, what it keeps, how it compresses."""

import copy
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import frodkernels as fk
from frodkernels import pattern as pattern_module
from frodkernels.pattern import Compressed
from tests.support import KINDS, coo
from tests.tiles.decode import check_tiles

LIMIT = 2**31 - 1
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64)


def ids(*numbers, dtype=torch.int64):
    return torch.tensor(numbers, dtype=dtype)


# ---- hostile input ---------------------------------------------------------------------------------------------------

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and still a thing a file may hold
    QUANTIZED = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)

HOSTILE_INDICES = {
    "list": ([0, 1], "must be a 1-D integer tensor, got list"),
    "none": (None, "must be a 1-D integer tensor, got NoneType"),
    "float": (torch.tensor([0.0, 1.0]), "must hold integers, got dtype torch.float32"),
    "nan": (torch.tensor([0.0, float("nan")]), "must hold integers"),
    "half": (torch.tensor([0, 1]).half(), "must hold integers, got dtype torch.float16"),
    "bool": (torch.tensor([False, True]), "must hold integers, got dtype torch.bool"),
    "complex": (torch.tensor([0j, 1j]), "must hold integers, got dtype torch.complex64"),
    "quantized": (QUANTIZED, "must hold integers"),
    "scalar": (torch.tensor(1), r"must be 1-D, got shape \[\]"),
    "2-D": (torch.zeros(1, 2, dtype=torch.int64), r"must be 1-D, got shape \[1, 2\]"),
    "sparse": (ids(0, 1).to_sparse(), "must be a dense"),
    "meta": (torch.zeros(2, dtype=torch.int64, device="meta"), "is a meta tensor"),
    "negative": (ids(0, -1), r"\[1\] = -1 is negative"),
    "very negative": (ids(-(2**63), 0), r"\[0\] = -9223372036854775808 is negative"),
    "size": (ids(0, 4), r"\[1\] = 4 is out of range for size 4"),
    "one past 2^31": (ids(2**31, 0), r"\[0\] = 2147483648 is out of range"),
    "int64 max": (ids(0, 2**63 - 1), r"\[1\] = 9223372036854775807 is out of range"),
    "uint64 max": (ids(0, 2**64 - 1, dtype=torch.uint64), r"\[1\] = 18446744073709551615 is out of range"),
    "uint64 2^63": (ids(2**63, 0, dtype=torch.uint64), r"\[0\] = 9223372036854775808 is out of range"),
    "int8 negative": (ids(0, -128, dtype=torch.int8), r"\[1\] = -128 is negative"),
}


@pytest.mark.parametrize("which", ["rows", "cols"])
@pytest.mark.parametrize("index, message", HOSTILE_INDICES.values(), ids=HOSTILE_INDICES)
def test_bad_indices_are_named(index, message, which):
    good = ids(0, 1)
    rows, cols = (index, good) if which == "rows" else (good, index)
    with pytest.raises(ValueError, match=f"^{which}.*{message}"):
        fk.SparsePattern(rows, cols, (4, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_indices_are_refused():
    with pytest.raises(ValueError, match="rows must be a dense 1-D tensor"):
        fk.SparsePattern(torch.nested.nested_tensor([ids(0), ids(1)]), ids(0, 1), (4, 4))


@pytest.mark.parametrize("length", [0, 1, 3])
def test_unequal_lengths(length):
    with pytest.raises(ValueError, match=f"rows and cols must have equal lengths, got 2 and {length}"):
        fk.SparsePattern(ids(0, 1), torch.zeros(length, dtype=torch.int64), (4, 4))


@pytest.mark.parametrize("shape", [(4, 4), (2**26, 2**26)], ids=["compressed", "deferred"])
def test_duplicates_are_named(shape):
    with pytest.raises(ValueError, match=r"entry 3 duplicates position \(2, 1\)"):
        fk.SparsePattern(ids(0, 2, 3, 2), ids(0, 1, 3, 1), shape)


HOSTILE_SHAPES = {
    "number": (4, "pair of sizes"),
    "none": (None, "pair of sizes"),
    "one": ((4,), "pair of integers"),
    "three": ((4, 4, 4), "pair of integers"),
    "floats": ((4.0, 4.0), "pair of integers"),
    "strings": (("4", "4"), "pair of integers"),
    "text": ("44", "pair of integers"),
    "bools": ((True, True), "pair of integers"),
    "negative m": ((-1, 4), "shape: m = -1 is negative"),
    "negative n": ((4, -1), "shape: n = -1 is negative"),
    "m 2^31": ((2**31, 4), "shape: m = 2147483648 exceeds the largest pattern dimension"),
    "n 2^31": ((4, 2**31), "shape: n = 2147483648 exceeds"),
    "2^64": ((2**64, 2**64), "shape: m = 18446744073709551616 exceeds"),
    "float tensor": (torch.tensor([4.0, 4.0]), "pair of integers"),
    "scalar tensor": (torch.tensor(4), "pair of sizes"),
    "matrix": (torch.ones(2, 2, dtype=torch.int64), "pair of integers"),
    "negative tensor": (torch.tensor([4, -4]), "shape: n = -4 is negative"),
    "meta tensor": (torch.ones(2, dtype=torch.int64, device="meta"), "shape is a meta tensor"),
}


@pytest.mark.parametrize("shape, message", HOSTILE_SHAPES.values(), ids=HOSTILE_SHAPES)
def test_bad_shapes_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        fk.SparsePattern(ids(0, 1), ids(0, 1), shape)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_an_empty_matrix_holds_nothing(shape):
    assert fk.SparsePattern(ids(), ids(), shape).density == 0
    with pytest.raises(ValueError, match="out of range for size 0"):
        fk.SparsePattern(ids(0), ids(0), shape)


@pytest.mark.parametrize("bad", [ids(0, 1), torch.zeros(3, 2, dtype=torch.int64), [[0], [1]], None])
def test_from_coo_wants_two_rows(bad):
    with pytest.raises(ValueError, match=r"indices must be a \[2, nnz\] integer tensor"):
        fk.SparsePattern.from_coo(bad, (4, 4))


def test_from_coo_checks_like_the_constructor():
    with pytest.raises(ValueError, match=r"cols\[1\] = 9 is out of range"):
        fk.SparsePattern.from_coo(ids(0, 1, 1, 9).reshape(2, 2), (4, 4))


# ---- the compressed views --------------------------------------------------------------------------------------------


def check_views(pattern, rows, cols):
    """CSR and CSC hold the entries, in order, and lead back to where the caller had them."""
    rows, cols = rows.long(), cols.long()
    for view, groups, others, sizes in (
        (pattern.csr, rows, cols, pattern.shape),
        (pattern.csc, cols, rows, pattern.shape[::-1]),
    ):
        assert isinstance(view, Compressed)
        assert view.indptr.dtype == view.perm.dtype == torch.int32
        assert view.indices.dtype == (torch.uint16 if sizes[1] <= 65536 else torch.int32)
        assert view.indptr.shape == (sizes[0] + 1,) and view.indptr[0] == 0 and view.indptr[-1] == rows.numel()
        order, index = view.perm.long(), view.indices.long()
        assert torch.equal(order.sort().values, torch.arange(rows.numel()))
        assert torch.equal(index, others[order])
        owner = torch.repeat_interleave(torch.arange(sizes[0]), view.indptr.diff().long())
        assert torch.equal(owner, groups[order])
        same = owner[1:] == owner[:-1]
        assert (index[1:] > index[:-1])[same].all()
    back = pattern.coo()
    assert torch.equal(back[0], rows) and torch.equal(back[1], cols)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (3, 11), (11, 3)])
def test_views(shape, kind):
    rows, cols = coo(kind, *shape)
    pattern = fk.SparsePattern(rows, cols, shape)
    check_views(pattern, rows, cols)
    assert pattern.nnz == rows.numel() and pattern.shape == shape
    assert pattern.density == rows.numel() / (shape[0] * shape[1])


@st.composite
def patterns(draw):
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    flat = draw(st.lists(st.integers(0, m * n - 1), unique=True, max_size=40))
    return torch.tensor(flat, dtype=torch.int64) // n, torch.tensor(flat, dtype=torch.int64) % n, (m, n)


@given(patterns())
def test_views_of_any_pattern(args):
    rows, cols, shape = args
    check_views(fk.SparsePattern(rows, cols, shape), rows, cols)
    check_views(fk.SparsePattern.from_coo(torch.stack([rows, cols]), shape), rows, cols)


@given(patterns(), st.data())
def test_any_duplicate_is_found(args, data):
    rows, cols, shape = args
    if rows.numel() == 0:
        return
    twin = data.draw(st.integers(0, rows.numel() - 1))
    rows, cols = torch.cat([rows, rows[twin : twin + 1]]), torch.cat([cols, cols[twin : twin + 1]])
    with pytest.raises(ValueError, match=rf"duplicates position \({int(rows[twin])}, {int(cols[twin])}\)"):
        fk.SparsePattern(rows, cols, shape)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer_dtype(dtype):
    rows, cols = coo("random", 9, 9)
    check_views(fk.SparsePattern(rows.to(dtype), cols.to(dtype), (9, 9)), rows, cols)


@pytest.mark.parametrize("n, dtype", [(65535, torch.uint16), (65536, torch.uint16), (65537, torch.int32)])
def test_narrow_indices_up_to_65536(n, dtype):
    rows, cols = ids(2, 0, 1), ids(n - 1, 0, n - 2)
    pattern = fk.SparsePattern(rows, cols, (3, n))
    assert pattern.csr.indices.dtype == dtype and pattern.csc.indices.dtype == torch.uint16
    check_views(pattern, rows, cols)
    check_views(fk.SparsePattern(cols, rows, (n, 3)), cols, rows)


def test_strided_and_expanded_indices():
    pairs = ids(0, 1, 2, 3, 1, 0).reshape(3, 2)
    check_views(fk.SparsePattern(pairs[:, 0], pairs[:, 1], (4, 4)), pairs[:, 0], pairs[:, 1])
    rows = ids(1).expand(3)
    check_views(fk.SparsePattern(rows, ids(2, 0, 1), (4, 4)), rows, ids(2, 0, 1))


# ---- sharing, moving, copying ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (2**26, 2**26)], ids=["compressed", "deferred"])
def test_the_caller_keeps_no_handle_on_it(shape):
    indices = ids(0, 2, 1, 3).reshape(2, 2)
    pattern = fk.SparsePattern.from_coo(indices, shape)
    indices.fill_(10**9)
    pattern.coo()[0].fill_(-1)
    assert [t.tolist() for t in pattern.coo()] == [[0, 2], [1, 3]]


def test_copies_share():
    pattern = fk.SparsePattern(*coo("random", 5, 5), (5, 5))
    layers = copy.deepcopy({"a": pattern, "b": [pattern]})
    assert layers["a"] is pattern and layers["b"][0] is pattern


def test_to_is_remembered():
    rows, cols = coo("random", 5, 5)
    pattern = fk.SparsePattern(rows, cols, (5, 5))
    assert pattern.to("cpu") is pattern and pattern.to(torch.device("cpu")) is pattern
    moved = pattern.to("meta")
    assert moved is pattern.to(torch.device("meta")) and moved.to("cpu") is pattern
    assert moved.device.type == "meta" and moved.nnz == pattern.nnz and moved.shape == pattern.shape
    for view in (moved.csr, moved.csc):
        assert all(t.is_meta for t in view)


@pytest.mark.parametrize("shape", [(5, 5), (2**26, 2**26)], ids=["compressed", "deferred"])
def test_pickle(shape):
    rows, cols = coo("random", 5, 5)
    pattern = pickle.loads(pickle.dumps(fk.SparsePattern(rows, cols, shape)))
    assert pattern.shape == shape
    assert torch.equal(pattern.coo()[0], rows) and torch.equal(pattern.coo()[1], cols)


def test_repr():
    pattern = fk.SparsePattern(ids(0, 1), ids(1, 0), (4, 5))
    assert repr(pattern) == "SparsePattern(4 x 5, nnz=2, density=0.1, device='cpu')"


def test_it_is_immutable():
    pattern = fk.SparsePattern(ids(0, 1), ids(1, 0), (4, 5))
    for name in ("shape", "nnz", "device", "density", "csr", "csc", "anything_else"):
        with pytest.raises(AttributeError):
            setattr(pattern, name, None)


# ---- tiles -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch):
    """Counts how often tiles are built, and makes a build slow enough for threads to meet in it."""
    made = []
    build = pattern_module._build_tiles

    def counted(pattern, transpose, block):
        made.append((transpose, block, pattern.device.type))
        time.sleep(0.01)
        return build(pattern, transpose, block)

    monkeypatch.setattr(pattern_module, "_build_tiles", counted)
    return made


def test_tiles_are_built_once_and_shared_by_devices(builds):
    pattern = fk.SparsePattern(*coo("random", 40, 40), (40, 40))
    first = pattern.tiles(False, 128)
    assert pattern.tiles(False, 128) is first and builds == [(False, 128, "cpu")]
    moved = pattern.to("meta").tiles(False, 128)
    assert all(t.is_meta for t in moved) and [t.shape for t in moved] == [t.shape for t in first]
    assert pattern.to("meta").tiles(False, 128) is moved and len(builds) == 1
    pattern.to("meta").tiles(True, 256)
    assert builds == [(False, 128, "cpu"), (True, 256, "cpu")]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(40, 40), (30, 150), (150, 30)], ids=str)
def test_tiles_are_those_of_the_view(shape, transpose):
    pattern = fk.SparsePattern(*coo("random", *shape), shape)
    view, columns = (pattern.csc, shape[0]) if transpose else (pattern.csr, shape[1])
    check_tiles(pattern.tiles(transpose, 128), view, columns, shape[0] == shape[1], 128)


def test_threads_share_one_build(builds):
    pattern = fk.SparsePattern(*coo("random", 40, 40), (40, 40))
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: pattern.tiles(True, 128), range(32)))
    assert len(builds) == 1 and all(tiles is got[0] for tiles in got)


def test_tiles_first_used_under_inference_mode_serve_training():
    pattern = fk.SparsePattern(*coo("random", 40, 40), (40, 40))
    with torch.inference_mode():
        tiles = (*pattern.tiles(False, 128), *pattern.to("meta").tiles(False, 128), *pattern.to("meta").csr)
    assert not any(t.is_inference() for t in tiles)


@pytest.mark.parametrize("block", [0, -128, 100, 129, 4224])
def test_bad_tile_blocks_are_named(block):
    with pytest.raises(ValueError, match=f"block must be a multiple of 128 up to 4096, got {block}"):
        fk.SparsePattern(ids(0), ids(0), (1, 1)).tiles(False, block)


def test_no_tiles_beyond_what_they_can_hold():
    pattern = fk.SparsePattern(ids(0, 1), ids(65535, 0), (2, 65536))
    assert pattern.tiles(False, 128) == () and len(pattern.tiles(True, 128)) == 7
    assert pattern.to("meta").tiles(False, 128) == ()
    assert len(fk.SparsePattern(ids(0, 1), ids(65534, 0), (2, 65535)).tiles(False, 128)) == 7
    tall = fk.SparsePattern(ids(0, 2**22 - 1), ids(65534, 0), (2**22, 65535))
    assert tall.tiles(False, 128) == () and len(tall.tiles(False, 4096)) == 7


def test_no_tiles_without_the_native_library(monkeypatch):
    monkeypatch.setattr(pattern_module._native, "load", lambda: False)
    assert fk.SparsePattern(*coo("random", 40, 40), (40, 40)).tiles(False, 128) == ()


def test_copies_share_tiles_and_pickles_leave_them_behind(builds):
    pattern = fk.SparsePattern(*coo("random", 40, 40), (40, 40))
    bare = len(pickle.dumps(pattern))
    tiles = pattern.tiles(False, 128)
    assert copy.deepcopy(pattern).tiles(False, 128) is tiles
    assert len(pickle.dumps(pattern)) == bare
    again = pickle.loads(pickle.dumps(pattern)).tiles(False, 128)
    assert len(builds) == 2 and all(torch.equal(a, b) for a, b in zip(again, tiles, strict=True))


def test_nothing_is_tiled_for_the_cpu(builds):
    pattern = fk.SparsePattern(*coo("random", 40, 40), (40, 40))
    z = torch.randn(3, 40, requires_grad=True)
    fk.sparse_core(z, torch.ones(40), torch.ones(pattern.nnz), pattern).sum().backward()
    assert builds == []


# ---- scale -----------------------------------------------------------------------------------------------------------


def test_849347_nonzeros_at_9216(capsys):
    n, nnz = 9216, 849_347
    flat = torch.randperm(n * n)[:nnz]
    rows, cols = flat // n, flat % n
    start = time.perf_counter()
    pattern = fk.SparsePattern(rows, cols, (n, n))
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n  planned {nnz} nonzeros at n = {n} in {seconds:.3f} s")
    check_views(pattern, rows, cols)


def test_a_huge_claim_costs_nothing_until_it_is_used():
    """A file may say 2^31 - 1 squared: that is checked in the memory of its entries, not of its dimensions."""
    rows, cols = ids(0, LIMIT - 1, 5), ids(LIMIT - 1, 0, 7)
    pattern = fk.SparsePattern(rows, cols, (LIMIT, LIMIT))
    assert pattern.nnz == 3 and 0 < pattern.density < 1e-17
    assert torch.equal(pattern.coo()[0], rows) and torch.equal(pattern.coo()[1], cols)
    assert copy.deepcopy(pattern) is pattern
    with pytest.raises(ValueError, match="out of range"):
        fk.SparsePattern(ids(LIMIT), ids(0), (LIMIT, LIMIT))


def test_a_deferred_pattern_plans_at_first_use():
    m = 2**24 + 1
    rows, cols = ids(m - 1, 3, 3), ids(0, 1, 0)
    check_views(fk.SparsePattern(rows, cols, (m, 2)), rows, cols)
