# SPDX-License-Identifier: Apache-2.0
"""What a FRoD layer keeps, allocates and calls: nothing dense, nothing sorted, nothing read back to the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import frodkernels as fk
from tests.frod.cases import PATHS, make_layer

M, N, T = 48, 64, 20  # every T x N or T x M is smaller than N x N

FORBIDDEN = (
    "sort",
    "argsort",
    "unique",
    "coalesce",
    "nonzero",
    "item",
    "_local_scalar_dense",
    "to_dense",
    "to_sparse",
    "sparse_coo",
    "_to_copy",
    "masked_select",
)


class Recorder(TorchDispatchMode):
    """Every op that runs, and the size of every tensor that is new memory."""

    def __init__(self):
        super().__init__()
        self.ops, self.sizes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append(func.overloadpacket.__name__)
        held = {
            t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in held:
                self.sizes.append(t.numel())
        return out


def record(layer, path):
    """Forward and backward of a layer whose leaves all train."""
    layer.leaves()
    layer(path=path)  # whatever is done once has been done
    with Recorder() as recorder:
        layer(path=path).sum().backward()
    return recorder


def test_the_activation_path_allocates_nothing_square():
    recorder = record(make_layer(M, N, T), "activation")
    assert max(recorder.sizes) <= T * N
    assert recorder.ops.count("sparse_core") == recorder.ops.count("sparse_core_backward") == 1
    assert recorder.ops.count("mm") + recorder.ops.count("addmm") == 4  # the four GEMMs of the association order


@pytest.mark.parametrize("path", PATHS)
def test_no_sort_no_copy_and_no_host_sync(path):
    recorder = record(make_layer(M, N, T), path)
    assert not [op for op in recorder.ops if op in FORBIDDEN]


def test_the_middle_is_never_dense_on_any_path():
    """Path C builds W [m, n] by design, but no path builds S + D [n, n] or its gradient."""
    m, n = 16, 64
    for path in PATHS:
        recorder = record(make_layer(m, n, 8), path)
        assert max(recorder.sizes) < n * n


def saved(layer, path):
    """{data_ptr: bytes} of what the forward keeps beyond the arguments themselves."""
    held = {t.untyped_storage().data_ptr() for t in (layer.U, layer.V, layer.lam, layer.values)}
    held |= {t.untyped_storage().data_ptr() for view in (layer.pattern.csr, layer.pattern.csc) for t in view}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in held:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(path=path)
    return kept, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_saved_for_backward(dtype):
    """A saves z and not x; B saves z and the folded U; C saves x and W."""
    size = torch.finfo(dtype).bits // 8
    expected = {"activation": T * N, "fold": T * N + M * N, "materialize": T * N + M * N}
    for path, numbers in expected.items():
        layer = make_layer(M, N, T, dtype=dtype, param_dtype=torch.float32)
        layer.leaves()
        kept, _ = saved(layer, path)
        assert sum(kept.values()) == numbers * size, path
        assert (layer.x.untyped_storage().data_ptr() in kept) == (path == "materialize")


def test_the_graph_holds_no_reference_to_x():
    import weakref

    layer = make_layer(M, N, T)
    layer.leaves("lam", "values")
    x = layer.x.clone()
    gone = weakref.ref(x)
    y = layer(x, path="activation")
    del x
    assert gone() is None
    y.sum().backward()


def test_a_pattern_is_shared_by_every_call():
    """The plan is handed on, never copied: two layers' graphs hold the same index tensors."""
    layer = make_layer(M, N, T)
    layer.leaves()
    pointers = []

    def pack(t):
        if not t.is_floating_point():
            pointers.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(path="activation"), layer(path="activation")
    assert pointers and set(pointers) == {t.data_ptr() for t in layer.pattern.csc}


def test_repeated_steps_leak_nothing():
    import gc

    layer = make_layer(M, N, T)
    leaves = layer.leaves()

    def step():
        torch.autograd.grad(layer().sum(), leaves)

    step()
    gc.collect()
    before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for _ in range(5):
        step()
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= before


def test_frod_weight_needs_no_dense_middle():
    layer = make_layer(16, 64, 8)
    leaves = layer.leaves("lam", "values")
    args = layer.U, layer.V, *leaves, layer.pattern
    with Recorder() as recorder:
        fk.frod_weight(*args).sum().backward()
    assert max(recorder.sizes) < 64 * 64
    assert not [op for op in recorder.ops if op in FORBIDDEN]


@pytest.mark.parametrize("path", PATHS)
def test_factors_of_another_dtype_are_not_kept_twice(path):
    """Under autocast U and V are cast for the moment; what the backward keeps is the frozen factors themselves."""
    layer = make_layer(M, N, T)
    layer.leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(path=path)
    square = [t for t in saved if t.numel() == N * N]
    assert square and all(t.data_ptr() == layer.V.data_ptr() for t in square)
