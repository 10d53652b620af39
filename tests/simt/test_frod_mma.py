# SPDX-License-Identifier: Apache-2.0
"""FRoD's layer from end to end on the CUDA kernels: the executor stands in for the device."""

import pytest
import torch

import frodkernels as fk
from frodkernels import _backends
from frodkernels.functional import _views
from frodkernels.ops import sparse_core as ops
from frodkernels.reference import frod as reference

T, M, N = 102, 48, 144


@pytest.fixture
def cuda_kernels(plain, monkeypatch):
    """Route the native backend of the CPU to the executor, with tiles of its device."""

    def block(device, columns):
        return torch.ops.simt.native_tile_block(torch.empty(0), columns)

    monkeypatch.setattr(_views, "_block", block)
    monkeypatch.setattr(_backends, "_load", lambda op, name: getattr(torch.ops.simt, f"native_{op}").default)
    monkeypatch.setattr(ops, "TENSOR_CORE_WORK", 0)
    monkeypatch.setattr(ops, "TENSOR_CORE_TOKENS", 0)
    plain.configure(sms=2)
    return plain


def layer(dtype, lead=(T,)):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5

    keep = torch.rand(N, N, generator=g) < 0.05
    rows, cols = keep.nonzero(as_tuple=True)
    pattern = fk.SparsePattern(rows, cols, (N, N))
    tensors = draw(*lead, N), draw(M, N), draw(N, N), draw(N), draw(pattern.nnz)
    x, U, V, lam, values = (t.to(d) for t, d in zip(tensors, (dtype, dtype, dtype, *[torch.float32] * 2), strict=True))
    return [x, U, V, lam, values], pattern, draw(*lead, M).to(dtype)


def gradients(linear, args, pattern, g):
    args = [a.detach().requires_grad_(i in (0, 3, 4)) for i, a in enumerate(args)]
    y = linear(*args, pattern)
    return y.detach(), *torch.autograd.grad(y, [args[0], *args[3:]], g)


@pytest.mark.parametrize("path", ["activation", "fold", "materialize"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_path(cuda_kernels, dtype, path):
    args, pattern, g = layer(dtype)
    got = gradients(lambda *a: fk.frod_linear(*a, path=path), args, pattern, g)
    want = gradients(reference.frod_linear, [a.double() for a in args], pattern, g.double())
    for ours, right in zip(got, want, strict=True):
        error = (ours.double() - right).norm() / right.norm()
        assert error < 8 * torch.finfo(dtype).eps  # five rounded products in a row; each op has its own exact bar
    launched = {name.split("<")[0] for name in cuda_kernels.launches()}
    assert {"product_mma_kernel", "gradient_mma_kernel"} <= launched


def test_leading_dimensions_and_the_bare_product(cuda_kernels):
    args, pattern, _ = layer(torch.bfloat16, (2, 51))
    whole = fk.frod_linear(*args, pattern, path="activation")
    flat = fk.frod_linear(args[0].reshape(102, N), *args[1:], pattern, path="activation")
    assert torch.equal(whole.reshape(102, M), flat)
    core = fk.sparse_core(args[0], args[3], args[4], pattern)
    assert core.shape == (2, 51, N) and core.is_contiguous()


def test_tiles_are_made_once_and_not_while_tracing(cuda_kernels, monkeypatch):
    _, pattern, _ = layer(torch.bfloat16)
    features = torch.zeros(N, T, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert len(_views.both_views(pattern, features)) == 6
    monkeypatch.undo()
    monkeypatch.setattr(_views, "_block", lambda device, columns: 256)
    _views.prepare(pattern)
    views = _views.both_views(pattern, features)
    assert len(views) == 20
    assert all(a is b for a, b in zip(views, _views.both_views(pattern, features), strict=True))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all(a is b for a, b in zip(views, _views.both_views(pattern, features), strict=True))
    assert len(_views.both_views(pattern, features.float())) == 6  # float32 has no use for them


@pytest.mark.parametrize("prepared", [True, False])
def test_one_graph_with_and_without_tiles(cuda_kernels, monkeypatch, prepared):
    """Tracing asks no device and builds nothing; what was prepared is used."""
    args, pattern, g = layer(torch.bfloat16)
    if prepared:
        _views.prepare(pattern)
        want = gradients(lambda *a: fk.frod_linear(*a, path="activation"), args, pattern, g)
    monkeypatch.setattr(_views, "_block", None)
    cuda_kernels.reset()
    torch._dynamo.reset()
    whole = torch.compile(lambda *a: fk.frod_linear(*a, path="activation"), fullgraph=True, backend="aot_eager")
    got = gradients(whole, args, pattern, g)
    launched = {name.split("<")[0] for name in cuda_kernels.launches()}
    assert ({"product_mma_kernel", "gradient_mma_kernel"} <= launched) == prepared
    assert not prepared or all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_export_takes_tiles(cuda_kernels, monkeypatch):
    args, pattern, _ = layer(torch.bfloat16)
    module = fk.nn.FrodLinear(*args[1:], pattern)  # prepares the pattern
    want = module(args[0])
    monkeypatch.setattr(_views, "_block", None)
    for strict in (True, False):
        program = torch.export.export(module, (args[0],), strict=strict)
        assert torch.equal(program.module()(args[0]), want)


def test_ops_with_tiles_are_registered_right(cuda_kernels):
    args, pattern, _ = layer(torch.bfloat16)
    z, lam, values = args[0].t().contiguous(), args[3], args[4]
    forward = (z, lam, values, *pattern.csr, False, list(pattern.tiles(False, 256)))
    backward = (z, z, lam, values, *pattern.csc, [True] * 3, False, list(pattern.tiles(True, 256)))
    torch.library.opcheck(ops.sparse_core, forward)
    torch.library.opcheck(ops.sparse_core_backward, backward)


def test_fake_tensors_ask_no_device_and_leave_no_trace(cuda_kernels, monkeypatch):
    monkeypatch.undo()
    _, pattern, _ = layer(torch.bfloat16)
    monkeypatch.setattr(_views._backends, "unavailable", lambda *_: None)
    with torch._subclasses.FakeTensorMode():
        assert _views._block(torch.device("cuda", 0), 4096) == 0
        fake = torch.empty(N, T, dtype=torch.bfloat16)
        assert len(_views.both_views(pattern, fake)) == 6
    assert (torch.device("cuda", 0), 4096) not in _views._blocks


def test_little_work_goes_to_the_other_kernels(cuda_kernels, monkeypatch):
    args, pattern, _ = layer(torch.bfloat16)
    monkeypatch.setattr(ops, "TENSOR_CORE_WORK", pattern.nnz * T + 1)
    fk.frod_linear(*args, pattern, path="activation")
    assert not any("mma" in name for name in cuda_kernels.launches())
    monkeypatch.setattr(ops, "TENSOR_CORE_WORK", pattern.nnz * T)
    monkeypatch.setattr(ops, "TENSOR_CORE_TOKENS", T + 1)
    fk.frod_linear(*args, pattern, path="activation")
    assert not any("mma" in name for name in cuda_kernels.launches())
    monkeypatch.setattr(ops, "TENSOR_CORE_TOKENS", T)
    fk.frod_linear(*args, pattern, path="activation")
    assert any("mma" in name for name in cuda_kernels.launches())


def test_views_are_told_apart():
    _, pattern, _ = layer(torch.bfloat16)
    tiles = pattern.tiles(False, 256)
    for rows, columns in (((), ()), (tiles, ()), ((), tiles), (tiles, tiles)):
        views = (*pattern.csr, *rows, *pattern.csc, *columns)
        assert len(_views.rows_view(views)) == 3 + len(rows)
        assert len(_views.columns_view(views)) == 3 + len(columns)
        assert _views.columns_view(views)[0] is pattern.csc.indptr
