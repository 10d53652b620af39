# SPDX-License-Identifier: Apache-2.0
"""HRA's benchmarks: the truth they judge by, their contestants, and what the page makes of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import frodkernels as fk
from bench import _hra_torch as plain
from bench import householder, hra, hra_conv, memory, report, results
from bench._hra_case import compact, dense, make_case, truth
from bench._interleave import Contestant, Entry, Group, Settings, measure
from bench._timing import make_clock
from bench._truth import Judge
from bench.shapes import ConvShape, RankShape
from bench.suites import specs

TINY = RankShape("Tiny", "layer", 48, 160, 96, True, 5)
CONV = ConvShape("Tiny", "conv", 6, 36, 25, True, 3, kernel=3, size=5)
SQUARE = RankShape("Tiny", "chain", 64, 64, 40, False, 4)
CPU = torch.device("cpu")
BRIEF = Settings(seconds=0.0, min_rounds=4, max_rounds=4, warmup=1)
FAMILIES = [hra.OP, hra_conv.OP, householder.OP]
DTYPES = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]


def judged(case, mode, layer) -> str | None:
    contestant = hra.with_u(layer, case, mode)
    return Judge(truth(case, mode), case.dtype).error(contestant.answers())[1]


def test_the_compact_form_is_the_chain_of_reflections():
    case = make_case(TINY, torch.float64, CPU)
    chain = torch.eye(TINY.n, dtype=torch.float64)
    for column in case.u.t():
        chain = chain @ (torch.eye(TINY.n, dtype=torch.float64) - 2 * torch.outer(column, column) / column.dot(column))
    assert torch.allclose(dense(case.u), chain, atol=1e-13)
    assert torch.allclose(compact(case.weight, case.u), case.weight @ chain, atol=1e-13)
    assert torch.allclose(truth(case, "forward")(torch.float64)["y"], F.linear(case.x, case.weight @ chain, case.bias))


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_judge_refuses_plausible_mistakes(mode, dtypes):
    case = make_case(TINY, dtypes[0], CPU, dtypes[1])

    def layer(x, u, bias=case.bias, **options):
        return fk.hra_linear(x, case.weight, u, bias, **options)

    assert judged(case, mode, layer) is None
    mistakes = {
        "the other order": lambda x, u: F.linear(fk.householder(x, u), case.weight, case.bias),
        "Gram-Schmidt": lambda x, u: layer(x, u, orthogonalize=True),
        "no bias": lambda x, u: layer(x, u, bias=None),
        "a reflection lost": lambda x, u: layer(x, u[:, 1:]),
        "stale directions": lambda x, u: layer(x, u.roll(1, 0)),
        "a token lost": lambda x, u: layer(torch.cat([x[:-1], x[:1]]), u),
    }
    for name, mistake in mistakes.items():
        assert judged(case, mode, mistake) is not None, name


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_plain_forms_are_right(dtypes):
    for shape, make, forms in ((TINY, plain.linear, ("tokens", "factor")), (CONV, plain.conv2d, hra_conv.FORMS)):
        case = make_case(shape, dtypes[0], CPU, dtypes[1])
        for form in forms:
            for mode in ("forward", "step"):
                assert judged(case, mode, make(form, case)) is None, form


@pytest.mark.parametrize("family, shape", [(hra, TINY), (hra_conv, CONV), (householder, SQUARE)], ids=FAMILIES)
@pytest.mark.parametrize("dtypes", DTYPES[::2], ids=str)
def test_every_contestant_is_right(family, shape, dtypes):
    pytest.importorskip("peft")
    for mode in family.MODES:
        made = family.group(shape, mode, dtypes[0], make_clock(CPU), CPU, False, dtypes[1])
        measured = measure(made, make_clock(CPU), BRIEF)
        assert {r.impl: r.status for r in measured} == dict.fromkeys(family.implementations(mode, False), "ok")


def test_a_slow_contestant_takes_some_turns_only():
    costs = iter(range(1, 1000))

    def clock(run, state) -> float:
        return run(state)

    clock.cache = "warm"
    floor = Contestant(lambda _: float(next(costs)))
    slow = Contestant(lambda _: 1000.0, every=3)
    entries = (Entry("floor", lambda: floor), Entry("slow", lambda: slow))
    group = Group("op", "step", TINY, torch.float32, lambda dtype: {}, entries)
    first, second = measure(group, clock, Settings(0.0, 7, 7, warmup=1))
    assert first.seconds == [2, 3, 4, 5, 6, 7, 8] and first.ratios == [1.0] * 7
    assert second.seconds == [1000.0] * 3 and second.ratios == [1000 / 2, 1000 / 5, 1000 / 8]


def test_groups_say_the_dtype_of_u():
    every = specs("default", ["float32", "bfloat16"])
    assert len({spec.id for spec in every}) == len(every)
    kinds = {op: {spec.dtype for spec in every if spec.op == op} for op in ("frod_linear", "hra_linear", "householder")}
    assert kinds["frod_linear"] == {"float32", "bfloat16"}
    assert kinds["hra_linear"] == kinds["householder"] == {"float32", "bfloat16", "bfloat16+float32"}
    for spec in specs("quick", ["bfloat16"], "hra_linear/forward/OPT"):
        group = spec.build(make_clock(CPU), CPU, compile=False)
        assert group.id == spec.id
        assert group.truth(torch.float64)["y"].shape == (spec.shape.T, spec.shape.m)


def _row(impl: str, ratio: float, **changes: object) -> results.Row:
    blank: dict[str, object] = {field.name: "" for field in dataclasses.fields(results.Row)}
    blank |= dict(m=4, n=8, T=2, nnz=0, rank=3, rounds=5, threads=1, op="hra_linear", mode="step", dtype="float32")
    blank |= dict(model="Tiny", layer="wide", status="ok", impl=impl, cache="warm", device="cpu", machine="Some CPU")
    times = {name: f"{ratio}" for name in ("ratio", "ratio_p20", "ratio_p80")} if ratio else {}
    times |= {name: f"{10 * ratio}" for name in ("ms", "ms_p20", "ms_p80")} if ratio else {}
    return results.Row(**{**blank, **times, **changes})  # type: ignore[arg-type]


def test_the_page_tells_the_overhead(tmp_path):
    rows = [
        _row("floor", 1.0),
        _row("peft", 6.0),
        _row("torch", 1.5),
        _row("auto", 1.2, error="1e-07"),
        _row("lora", 1.6),
    ]
    memories = [("peft", "318000000"), ("auto", "34500000")]
    rows += [_row(impl, 0, op=report.MEMORY, peak_bytes=size) for impl, size in memories]
    results.write(tmp_path / "cpu.csv", rows)
    page = report.generate(tmp_path, tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| Tiny wide, 8→4, T=2, r=3 | 5.00 | 0.75 | 0.80 |" in page  # PEFT / ours, ours / LoRA, ours / torch
    assert "| 50.00 (10.00) | 5.00 (1.00) | 2.00 (0.40) | 6.00 (1.20) |" in page
    assert "| wide, T=2, r=3 | 318 | 34 |" in page


def test_memory_is_what_a_process_of_its_own_held():
    floor, torch_ = (memory.run(impl, 8, "float32") for impl in ("floor", "torch"))
    assert (floor.status, torch_.status) == ("ok", "ok")
    kept = memory.LAYERS * 4 * memory.OPT_SHORT.T * memory.OPT_SHORT.n  # every layer keeps its input
    assert kept / 2 < torch_.peak - floor.peak < 2 * kept
