# SPDX-License-Identifier: Apache-2.0
"""What launches cost, counted: sectors and wavefronts close to the least, the gather's conflicts within their bound.

Bounds are of the standard pattern, 1 % at n = 4096, unless they say otherwise.
"""

import json

import pytest

from bench.kernels import __main__ as command
from bench.kernels import counts, records, static
from bench.kernels.architectures import occupancy
from bench.kernels.counts import Case
from bench.roofline.devices import BY_NAME

A100, H100, ADA = (BY_NAME[name].target for name in ("A100", "H100", "L40S"))
STANDARD = dict(n=4096, nnz=167772, T=128)
SECTORS = 1.1  # of the least
WAVEFRONTS = 1.15  # of the least, outside the gather

# Lines that may touch more sectors, and why; the bound is over the kernel's whole traffic, which they dominate.
EXCEPTIONS = {
    "pack_kernel": (4.0, "gathers 4-byte values in the order of the plan"),
    "pack_entries_kernel": (4.0, "gathers 4-byte values in the order of the view"),
    "reduce_sources_kernel": (4.0, "scatters 4-byte gradients to their places in COO order"),
    "gradient_tiles_kernel": (1.25, "lists of a row's entries, and their sums, start anywhere in a sector"),
    "householder_pack_kernel": (2.0, "reads factors as tensor cores want them: 8 ranks of a feature are a sector"),
    "householder_pad_kernel": (4.0, "turns the right factor round: 4-byte loads down its columns"),
    "sampled_fma_kernel": (1.2, "searches, and lists of a row's entries and their sums, start anywhere in a sector"),
    "scatter_values_kernel": (6.0, "an entry is a sector of the matrix of its own, and of the values in COO order"),
    "product_rows_kernel": (1.25, "gathers values in COO order once a row; few tokens amortise it little"),
}


def ratio(got, least):
    return got / least if least else 1.0


def of(found, function):
    (one,) = [c for name, c in found.items() if name.split("<")[0] == function]
    return one


@pytest.fixture(scope="module", params=["forward", "gradient"])
def standard(toolkit, request):
    case = Case(request.param, **STANDARD)
    return case, counts.run(case, A100)


def test_every_kernel_has_figures_and_counts(figures):
    cuda = [r for r in figures if r["language"] == "CUDA"]
    assert {r["kernel"] for r in cuda} == static.declared()
    counted = {r["kernel"] for r in cuda if r["launches"]}
    assert counted == static.declared(), "launched by no standard call"
    assert {r["instance"] for r in cuda} == {k.name for k in static.library() if k.arch == 80}


def test_every_triton_kernel_has_figures(figures):
    from bench.kernels import triton_aot

    triton = [r for r in figures if r["language"] == "Triton"]
    assert {r["kernel"] for r in triton} == set(triton_aot.declared())
    assert all(r["launches"] is None and r["note"] for r in triton)


def test_records_have_the_fields_they_promise(figures):
    promised = {
        "kernel", "launches", "sectors", "sectors_least", "wavefronts", "wavefronts_least", "registers", "spills",
        "smem", "occupancy", "l2_bytes", "modelled_us",
    }  # fmt: skip
    for r in figures:
        assert promised <= set(r) and set(r) == set(figures[0])
        assert r["spills"] == r["stack"] == r["local"] == r["atomics"] == 0
        resident = occupancy(int(r["arch"].removeprefix("sm_")), r["registers"], r["smem"], r["threads"])
        assert (r["blocks_per_sm"], r["limiter"]) == (resident.blocks, resident.limiter) and resident.blocks > 0
        assert r["occupancy"] == pytest.approx(resident.share, abs=1e-4)
        if r["launches"]:
            assert r["modelled_us"] > 0 and r["l2_bytes"] > 0 and r["note"] is None


def test_sectors_and_wavefronts_of_every_launch(figures):
    for r in figures:
        if not r["launches"]:
            continue
        bound, _ = EXCEPTIONS.get(r["kernel"], (SECTORS, ""))
        assert ratio(r["sectors"], r["sectors_least"]) <= bound, r
        assert ratio(r["wavefronts"], r["wavefronts_least"]) <= WAVEFRONTS, r


def test_main_paths(standard):
    """Features, words and outputs of the tensor-core kernels, line by line."""
    case, found = standard
    kernel = of(found, "product_mma_kernel" if case.op == "forward" else "gradient_mma_kernel")
    large = [s for s in kernel.sites if s.space == "global" and s.sectors > 0.01 * (kernel.loads + kernel.stores)]
    assert large
    for site in large:
        assert site.sectors <= SECTORS * site.sectors_least, site
    features = case.n * case.T * 2
    copied = kernel.total("sectors", lambda s: s.copies and not s.write) * 32
    assert copied >= features and kernel.gather_wavefronts > 0 and kernel.mma > 0
    if case.op == "forward":
        assert kernel.stores * 32 == features
    assert kernel.other_wavefronts <= WAVEFRONTS * kernel.other_least


def test_packing_is_wide_but_for_its_gather(toolkit):
    pack = of(counts.run(Case("forward", 2048, 41943, 32), A100), "pack_kernel")
    rest = [s for s in pack.sites if "scalars" not in s.file]
    assert sum(s.sectors for s in rest) <= SECTORS * sum(s.sectors_least for s in rest)
    assert sum(s.requests for s in pack.sites if s not in rest) > 0


@pytest.mark.parametrize("target, bound", [(A100, 1.25), (H100, 1.2), (ADA, 1.45)], ids=["A100", "H100", "Ada"])
@pytest.mark.parametrize("op", ["forward", "gradient"])
def test_gather(toolkit, op, target, bound):
    """Wavefronts of the gather, conflicts and empty slots included, over 2 bytes an entry and token.

    Without conflicts they may be fewer: a gathered feature can serve several rows.
    """
    case = Case(op, 4096, 167772, 64)
    (kernel,) = [c for c in counts.run(case, target).values() if c.mma]
    assert kernel.gather_wavefronts <= bound * case.nnz * case.T * 2 / 128
    assert kernel.gather_wavefronts >= kernel.gather_least > 0


@pytest.mark.parametrize("op", ["forward", "gradient"])
def test_plain_kernels_gather_without_conflicts(toolkit, op):
    found = counts.run(Case(op, 512, 26000, 256, "float32"), A100)
    function = "product_tiles_kernel" if op == "forward" else "gradient_tiles_kernel"
    kernel = of(found, function)
    assert kernel.gather_wavefronts == kernel.gather_least > 0


@pytest.mark.parametrize("op", ["forward", "gradient"])
def test_counts_are_linear_in_tokens(toolkit, op):
    few, many = (next(c for c in counts.run(Case(op, 2048, 41943, T), A100).values() if c.mma) for T in (64, 128))
    assert many.gather_wavefronts == 2 * few.gather_wavefronts
    assert many.gather_least == 2 * few.gather_least and many.mma == 2 * few.mma
    if op == "forward":
        assert many.stores == 2 * few.stores


def test_standard_calls_are_distinct():
    assert len(set(records.STANDARD)) == len(records.STANDARD)


def test_one_shape(toolkit, capsys):
    assert command.main(["--device", "L40S", "--shape", "512:2621:64", "--dtype", "float16"]) == 0
    found = json.loads(capsys.readouterr().out)
    counted = [r for r in found if r["launches"]]
    assert {r["op"] for r in counted} == {"forward", "transpose", "gradient"}
    assert {(r["n"], r["nnz"], r["T"], r["dtype"], r["arch"], r["device"]) for r in counted} == {
        (512, 2621, 64, "float16", "sm_89", "L40S")
    }
    assert all(r["smem"] <= 101376 for r in counted) and any(r["tensor_ops"] for r in counted)
    for bad in (["--arch", "75"], ["--shape", "5:5"], ["--device", "H1"]):
        with pytest.raises(SystemExit):
            command.main(bad)
    capsys.readouterr()
