# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of sampled products, sparse changes, columns and switching: their truths, contestants and page."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import frodkernels as fk
from bench import _sparse_torch as plain
from bench import crossover, names, paca, report, results, sampled, sparse_delta, switching
from bench._delta_case import changed, make_case, truth
from bench._interleave import Contestant, Settings, measure
from bench._timing import make_clock
from bench._truth import Judge
from bench.shapes import DELTAS, MERGED, SAMPLED, DeltaShape, RankShape, SampledShape
from bench.suites import specs

DELTA = DeltaShape("Tiny", "layer", 48, 160, 96, True, 5)
COLUMNS = RankShape("Tiny", "layer", 48, 160, 96, True, 5)
WEIGHT = DeltaShape("Tiny", "weight", 96, 160, 0, False, 5)
PRODUCT = SampledShape("Tiny", "product", 48, 160, 96, False, 3.0)
CPU = torch.device("cpu")
BRIEF = Settings(seconds=0.0, min_rounds=2, max_rounds=2, warmup=1)
DTYPES = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]


def complaint(contestant: Contestant, of, dtype: torch.dtype) -> str | None:
    assert contestant.answers is not None
    return Judge(of, dtype).error(contestant.answers())[1]


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_judge_of_sparse_changes_refuses_plausible_mistakes(mode, dtypes):
    case = make_case(DELTA, dtypes[0], CPU, dtypes[1])

    def judged(layer) -> str | None:
        return complaint(sparse_delta.with_values(layer, case, mode), truth(case, mode), case.dtype)

    def layer(x, values, pattern=case.pattern, bias=case.bias, **options):
        return fk.sparse_delta_linear(x, case.weight, values, pattern, bias, **options)

    shifted = fk.SparsePattern(case.rows, (case.cols + 1) % DELTA.n, (DELTA.m, DELTA.n))
    assert judged(layer) is None
    mistakes = {
        "no bias": lambda x, values: layer(x, values, bias=None),
        "no change": lambda x, values: layer(x, 0 * values),
        "another scale": lambda x, values: layer(x, values, scale=0.9),
        "values in another order": lambda x, values: layer(x, values.roll(1)),
        "columns off by one": lambda x, values: layer(x, values, shifted),
        "a token lost": lambda x, values: layer(torch.cat([x[:-1], x[:1]]), values),
    }
    for name, mistake in mistakes.items():
        assert judged(mistake) is not None, name


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("form", plain.FORMS)
def test_plain_sparse_changes_are_right(form, dtypes):
    case = make_case(DELTA, dtypes[0], CPU, dtypes[1])
    for mode in ("forward", "step"):
        made = sparse_delta.with_values(plain.linear(form, case), case, mode)
        assert complaint(made, truth(case, mode), case.dtype) is None


def test_the_truth_of_a_sparse_change_is_the_definition():
    case = make_case(DELTA, torch.float64, CPU)
    index = torch.stack([case.rows, case.cols])
    S = torch.sparse_coo_tensor(index, case.values, (DELTA.m, DELTA.n), check_invariants=True).to_dense()
    assert DELTA.nnz == case.values.numel() == 5 * (48 + 160) and bool((case.values != 0).all())
    assert torch.allclose(truth(case, "forward")(torch.float64)["y"], F.linear(case.x, case.weight + S, case.bias))
    assert torch.equal(changed(case, torch.float64), case.weight + S)


@pytest.mark.parametrize("mode", paca.MODES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_judge_of_columns_refuses_plausible_mistakes(mode, dtypes):
    case = paca.make_case(COLUMNS, dtypes[0], CPU, dtypes[1])

    def judged(layer) -> str | None:
        return complaint(paca.with_columns(layer, case, mode), paca.truth(case, mode), case.dtype)

    def layer(x, C, columns=case.columns, bias=case.bias):
        return fk.paca_linear(x, case.weight, columns, C, bias)

    assert judged(layer) is None and all(judged(paca.plain(form, case)) is None for form in ("clone", "partial"))
    mistakes = {
        "no bias": lambda x, C: layer(x, C, bias=None),
        "the frozen columns": lambda x, C: layer(x, case.weight[:, case.columns].to(C) + 0 * C),
        "added instead of put": lambda x, C: layer(x, C + case.weight[:, case.columns].to(C)),
        "columns in another order": lambda x, C: layer(x, C, case.columns.roll(1)),
        "other columns": lambda x, C: layer(x, C, (case.columns + 1) % COLUMNS.n),
    }
    for name, mistake in mistakes.items():
        assert judged(mistake) is not None, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_judge_of_sampled_products_refuses_plausible_mistakes(dtype):
    case = sampled.make_case(PRODUCT, dtype, CPU)
    shape = (PRODUCT.m, PRODUCT.n)
    pattern = fk.SparsePattern(case.rows, case.cols, shape)
    shifted = fk.SparsePattern(case.rows, (case.cols + 1) % PRODUCT.n, shape)

    def judged(run) -> str | None:
        return complaint(sampled.contestant(run), sampled.truth(case), dtype)

    assert judged(lambda: fk.sampled_product(case.a, case.b, pattern)) is None
    assert judged(lambda: fk.sampled_product(case.a, case.b, shifted)) is not None
    assert judged(lambda: fk.sampled_product(case.a[1:], case.b[1:], pattern)) is not None
    assert judged(lambda: fk.sampled_product(case.a, case.b, pattern).flip(0)) is not None


def test_the_two_ways_are_asked_for_by_name(monkeypatch):
    asked = []
    real = sampled.ops.sampled_product
    monkeypatch.setattr(sampled.ops, "sampled_product", lambda *a: (asked.append(a[-1]), real(*a))[1])
    case = sampled.make_case(PRODUCT, torch.float32, CPU)
    for tiled in sampled.WAYS.values():
        sampled.way(case, tiled)()
    assert asked == [False, True]


@pytest.mark.parametrize(
    "family, shape, dtypes",
    [
        *((sparse_delta, DELTA, dtypes) for dtypes in DTYPES[::2]),
        *((paca, COLUMNS, dtypes) for dtypes in DTYPES),
        *((switching, WEIGHT, dtypes[:1]) for dtypes in DTYPES[:2]),
        *((sampled, PRODUCT, dtypes[:1]) for dtypes in DTYPES[:2]),
    ],
    ids=lambda value: getattr(value, "OP", str(value)),
)
def test_every_contestant_is_right(family, shape, dtypes):
    pytest.importorskip("peft")
    for mode in family.MODES:
        made = family.group(shape, mode, dtypes[0], make_clock(CPU), CPU, False, *dtypes[1:])
        measured = {r.impl: r.status for r in measure(made, make_clock(CPU), BRIEF)}
        assert tuple(measured) == family.implementations(mode, False)
        if family is sampled and measured["onednn"].startswith("unavailable"):
            del measured["onednn"]
        assert set(measured.values()) == {"ok"}, measured


def _switch(weight: torch.Tensor, change: torch.Tensor, back: torch.Tensor) -> switching.Switch:
    clean = weight.clone()
    return switching.Switch(
        weight, lambda: weight.add_(change), lambda: weight.sub_(back), lambda dtype: clean.to(dtype) + change.to(dtype)
    )


@pytest.mark.parametrize("mode", switching.MODES)
def test_a_weight_that_does_not_come_back_gets_no_time(mode):
    weight, change = torch.randn(8, 8), torch.randn(8, 8)
    drifting = _switch(weight, change, change)
    share = switching.round_trip(drifting)
    assert 0 < share < 1
    with pytest.raises(RuntimeError, match="other bits"):
        switching.contestant(mode, drifting, drifting, exact=True)
    made = switching.contestant(mode, drifting, drifting, exact=False)
    assert made.detail == f"{100 * share:.3g} % of the weights differ"
    assert made.truth is not None and complaint(made, made.truth, torch.float32) is None
    wrong = switching.contestant(mode, *(_switch(weight, change, 0.99 * change) for _ in "12"), exact=False)
    assert wrong.truth is not None
    assert (complaint(wrong, wrong.truth, torch.float32) is None) == (mode == "merge")


def test_switching_times_what_its_mode_says():
    calls: list[str] = []

    def named(name: str) -> switching.Switch:
        return switching.Switch(
            weight, lambda: calls.append(f"{name} in"), lambda: calls.append(f"{name} out"), lambda dtype: weight
        )

    weight = torch.zeros(2, 2)
    for mode, expected in (("merge", ["1 in"]), ("unmerge", ["1 out"]), ("switch", ["1 out", "2 in"])):
        made = switching.contestant(mode, named("1"), named("2"), exact=True)
        for _ in range(3):
            made.prepare()
            calls.clear()
            made.run(None)
            assert calls == expected
            calls.clear()


def test_sizes_are_told_apart():
    every = specs("full")
    assert len({spec.id for spec in every}) == len(every)
    percents = {shape.percent for shape in SAMPLED["default"]}
    assert percents == {0.1, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0}
    assert SampledShape("", "", 2048, 2048, 1024, False, 0.1).nnz == 4194
    assert all(shape.T == 0 and shape.nnz == shape.rank * 8192 for shape in MERGED["default"])
    assert any((s.m, s.n, s.T, s.rank) == (2048, 2048, 1024, 20) for s in DELTAS["default"])


def _row(op: str, impl: str, ratio: float, **changes: object) -> results.Row:
    blank: dict[str, object] = {field.name: "" for field in dataclasses.fields(results.Row)}
    blank |= dict(m=100, n=200, T=2, nnz=0, rank=0, rounds=5, threads=1, op=op, mode="forward", dtype="float32")
    blank |= dict(model="Tiny", layer="wide", status="ok", impl=impl, cache="warm", device="cpu", machine="Some CPU")
    times = {name: f"{ratio}" for name in ("ratio", "ratio_p20", "ratio_p80")}
    times |= {name: f"{10 * ratio}" for name in ("ms", "ms_p20", "ms_p80")}
    return results.Row(**{**blank, **times, **changes})  # type: ignore[arg-type]


def test_densities_are_groups_of_their_own_and_cross_where_measured(tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for nnz, entries, blocks in ((200, 0.1, 0.4), (2000, 0.2, 0.4), (8000, 0.8, 0.4)):
        for impl, ratio in (("floor", 1.0), ("frodkernels", 1.2), ("entries", entries), ("blocks", blocks)):
            rows.append(_row(names.SAMPLED, impl, ratio, nnz=nnz))
    assert len(results.latest(rows)) == 3
    results.write(tmp_path / "cpu.csv", rows)
    page = report.generate(tmp_path, tmp_path / "page.md").read_text(encoding="utf-8")
    assert "100×200, T=2: by blocks is faster from 20 % on" in page  # half-way between 10 % and 40 %, in logarithms
    assert "| 100×200, T=2, 40 % | 10.00 | 1.20 (1.20–1.20) | 0.80 | 0.40 |" in page
    assert "(aᵀb)[pattern], ms" in page and "(aᵀb)[pattern] takes 0.83 of the time" in page
    (figure,) = (tmp_path / "figures").glob("sampled_product-*.png")
    assert figure.read_bytes().startswith(b"\x89PNG") and f"(figures/{figure.name})" in page


def test_curves_that_do_not_cross_are_not_said_to():
    low, high = [(1.0, 1.0), (10.0, 2.0)], [(1.0, 3.0), (10.0, 4.0)]
    assert crossover.crossing(low, high) is None and crossover.crossing(high, low) is None
    for entries, faster in ((0.1, "entries"), (0.9, "blocks")):
        rows = [_row(names.SAMPLED, impl, r, nnz=200) for impl, r in (("entries", entries), ("blocks", 0.5))]
        assert f"by {faster} is faster at every density measured" in crossover.break_evens([rows])[0]


def test_the_page_tells_what_comes_back(tmp_path):
    common = dict(op=names.SWITCHING, mode="unmerge", rank=8, T=0)
    rows = [_row(impl=impl, ratio=r, detail=d, error=e, **common) for impl, r, d, e in (
        ("floor", 1.0, "", ""), ("frodkernels", 0.1, "all are back", "0"), ("lora", 3.0, "35 % differ", "4e-08")
    )]  # fmt: skip
    results.write(tmp_path / "cpu.csv", rows)
    page = report.generate(tmp_path, tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| 100×200, r=8 | 10.00 | 0.10 (0.10–0.10) | 3.00 (3.00–3.00) |" in page
    assert "| 100×200, r=8 | all are back | 35 % differ |" in page and "Where frodkernels loses" not in page


def test_small_savings_are_not_rounded_to_nothing(tmp_path):
    rows = [_row("paca_linear", impl, 1.0, mode="step", rank=8, saved_bytes=str(size)) for impl, size in (
        ("frodkernels", 32768), ("lora8", 8 * 2**20)
    )]  # fmt: skip
    results.write(tmp_path / "cpu.csv", rows)
    page = report.generate(tmp_path, tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| Tiny wide, 200→100, T=2, k=8 | 0.031 | 8.0 |" in page
