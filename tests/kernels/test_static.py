# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels are: no spills, no stack, no atomics on any architecture; and the reader sees such things.

The library is the one that ``make setup`` built: where that found no CUDA toolkit, there is nothing to read.
"""

import shutil
import subprocess

import pytest

from bench.kernels import static, triton_aot
from bench.kernels.architectures import LIMITS, occupancy

BAD = r"""
#include <cuda_pipeline_primitives.h>
template <typename T>
__global__ void __launch_bounds__(96) bad(T* x, int n) {
  T kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = x[i * n];
  for (int i = 0; i < n; ++i) kept[(i * 7 + n) & 63] += kept[i * n & 63];
  atomicAdd(x, kept[n & 63]);
}
template __global__ void bad<float>(float*, int);
__global__ void good(const float4* x, float4* y, int n) {
  __shared__ float4 tile[32];
  __pipeline_memcpy_async(&tile[threadIdx.x], x + n + threadIdx.x, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  for (int i = 0; i < n; ++i) y[i] = tile[(threadIdx.x + i) & 31];
  y[n + threadIdx.x] = x[threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two small kernels: one with all that the library must not have."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    folder = tmp_path_factory.mktemp("planted")
    (folder / "k.cu").write_text(BAD)
    subprocess.run(["nvcc", "-arch=sm_80", "-cubin", "-o", "k.cubin", "k.cu"], cwd=folder, check=True)
    return {k.function: k for k in static.read(folder / "k.cubin")}


def test_the_reader_sees_spills_stack_and_atomics(planted):
    bad = planted["bad"]
    assert bad.name == "bad<float>" and bad.scalar == "float32" and bad.threads == 96 and bad.arch == 80
    assert bad.spills > 0 and bad.stack > 0 and bad.counts["atomics"] > 0
    assert any("F32" in kind for kind in bad.atomic_kinds)


def test_the_reader_sees_wide_and_asynchronous_accesses(planted):
    good = planted["good"]
    assert good.threads is None and good.shared == 512 and good.spills == good.stack == good.counts["atomics"] == 0
    c = good.counts
    assert c["async_copies"] == 1 and c["shared_loads"] >= 1 and c["barriers"] >= 1
    assert c["global_loads"] == c["global_loads_128"] == 1 and c["global_stores"] == c["global_stores_128"] >= 2
    assert not good.tensor_ops and 1 < good.per_event["all"] < 20


def test_every_kernel_is_compiled_for_every_architecture(library):
    for arch in LIMITS:
        assert {k.function for k in library if k.arch == arch} == static.declared()


def test_no_spills_no_stack_no_atomics(library):
    wrong = [k for k in library if k.spills or k.stack or k.local or k.counts["atomics"]]
    assert not wrong, "\n".join(f"sm_{k.arch} {k.name}" for k in wrong)


def test_tensor_core_kernels_use_them_and_others_do_not(library):
    for k in library:
        if "_mma_" in k.function:
            kinds = {op.replace(".BF16", "") for op in k.tensor_ops}
            assert kinds == {"HMMA.16816.F32"}, (k.arch, k.name, k.tensor_ops)
            assert k.counts["matrix_loads"] > 0 and k.counts["async_copies"] > 0
        else:
            assert not k.tensor_ops, (k.arch, k.name)


def test_features_leave_the_tensor_cores_16_bytes_at_a_time(library):
    """The compiler splits an assignment of 16 bytes where it pleases: only the code says what it did."""
    products = [k for k in library if k.function == "product_mma_kernel"]
    assert products
    for k in products:
        narrow = k.counts["global_stores"] - k.counts["global_stores_128"]
        assert k.counts["global_stores_128"] >= 8, (k.arch, k.name)  # one for each group of a warp
        assert narrow < 8, (k.arch, k.name)  # sums that are made again, token by token, in a copy or two


def test_every_block_can_be_resident(library):
    for k in library:
        resident = occupancy(k.arch, k.registers, k.shared, k.threads)
        assert resident.blocks >= 1, (k.arch, k.name)
        assert k.threads % 32 == 0 and k.registers * k.threads * resident.blocks <= 65536


@pytest.mark.parametrize("arch", [80, 90])
def test_triton_kernels(arch):
    names = triton_aot.declared()
    assert {"sparse_core_fwd_kernel", "sparse_core_bwd_kernel"} <= set(names)
    for name in names:
        made = triton_aot.compile_kernel(name, arch)
        k = made.kernel
        assert k.function == name and k.arch == arch and made.threads == k.threads
        assert not (k.spills or k.stack or k.local or k.counts["atomics"])
        assert k.counts["global_loads_128"] > 0 or not name.startswith("sparse_core")
        assert occupancy(arch, k.registers, k.shared + made.shared, made.threads).blocks >= 1
