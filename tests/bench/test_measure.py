# SPDX-License-Identifier: Apache-2.0
"""The measure itself: order of turns, ratios, judgement of answers, bytes kept. No time of any machine matters here."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch

import frodkernels as fk
from bench import _plain_torch as plain
from bench import _truth, frod, sparse_core
from bench._case import make_case
from bench._interleave import Contestant, Entry, Group, Settings, Unavailable, fastest, measure, percentiles
from bench._saved import saved_bytes
from bench._timing import CpuClock, make_clock, orders
from bench.shapes import SIZES, Shape
from bench.suites import specs

TINY = Shape("Tiny", "layer", 48, 160, 96, True)
CPU = torch.device("cpu")
BRIEF = Settings(seconds=0.0, min_rounds=2, max_rounds=2, warmup=1)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("k", range(1, 12))
def test_each_contestant_follows_every_other_equally_often(k):
    plan = orders(k)
    assert all(sorted(order) == list(range(k)) for order in plan)
    pairs = collections.Counter(pair for order in plan for pair in itertools.pairwise(order))
    assert len(pairs) == k * (k - 1) and len(set(pairs.values())) <= 1


class Drifting:
    """A clock on a machine that gets slower all the time; ``run`` returns its true cost."""

    cache = "warm"

    def __init__(self) -> None:
        self.slowness = 1.0

    def __call__(self, run, state) -> float:
        self.slowness *= 1.001
        return run(state) * self.slowness


def group(*entries: Entry, truth=None, dtype=torch.float32) -> Group:
    return Group("op", "forward", TINY, dtype, truth or (lambda dtype: {}), entries)


def test_ratios_are_to_the_floor_of_the_same_round():
    makers = {"floor": 1.0, "twice": 2.0, "thrice": 3.0}
    entries = [Entry(name, lambda cost=cost: Contestant(lambda _: cost)) for name, cost in makers.items()]
    results = {r.impl: r for r in measure(group(*entries), Drifting(), Settings(0.0, 40, 40))}
    assert all(len(r.seconds) == len(r.ratios) == 40 for r in results.values())
    assert percentiles(results["twice"].ratios)[0] == pytest.approx(2, rel=2e-3)
    assert percentiles(results["thrice"].ratios)[0] == pytest.approx(3, rel=3e-3)
    assert max(results["twice"].seconds) > 1.1 * min(results["twice"].seconds)


def test_percentiles():
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert percentiles(list(range(101))) == pytest.approx((50, 20, 80))


def test_preparation_is_not_timed_and_precedes_every_call():
    calls = []
    contestant = Contestant(lambda state: calls.append(state), prepare=lambda: "fresh")
    assert fastest([contestant], CpuClock()) is contestant
    measure(group(Entry("floor", lambda: contestant)), CpuClock(cold=True), BRIEF)
    assert calls == ["fresh"] * (BRIEF.warmup + 2)


def test_what_is_wrong_broken_or_absent_gets_no_time():
    def broken() -> Contestant:
        raise RuntimeError("out of luck\nand more")

    def absent() -> Contestant:
        raise Unavailable("no such package")

    right = torch.ones(4)
    entries = [
        Entry("floor", lambda: Contestant(lambda _: None)),
        Entry("right", lambda: Contestant(lambda _: None, answers=lambda: {"y": right})),
        Entry("wrong", lambda: Contestant(lambda _: None, answers=lambda: {"y": right + 1e-3})),
        Entry("silent", lambda: Contestant(lambda _: None, answers=dict)),
        Entry("nan", lambda: Contestant(lambda _: None, answers=lambda: {"y": right * float("nan")})),
        Entry("shape", lambda: Contestant(lambda _: None, answers=lambda: {"y": right[:2]})),
        Entry("broken", broken),
        Entry("absent", absent),
    ]
    results = measure(group(*entries, truth=lambda dtype: {"y": right.to(dtype)}), CpuClock(), BRIEF)
    status = {r.impl: r.status.split(":")[0] for r in results}
    assert status == {
        "floor": "ok", "right": "ok", "wrong": "wrong answer", "silent": "wrong answer", "nan": "wrong answer",
        "shape": "wrong answer", "broken": "failed", "absent": "unavailable",
    }  # fmt: skip
    assert all(bool(r.seconds) == bool(r.ratios) == (r.status == "ok") for r in results)


def judged(case, mode, forward) -> str | None:
    lam, values = (t.clone().requires_grad_(mode == "step") for t in (case.lam, case.values))
    contestant = frod.contestant(lambda x: forward(x, lam, values), case, mode, {"dlam": lam, "dvalues": values})
    return _truth.Judge(_truth.layer(case, mode), case.dtype).error(contestant.answers())[1]


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_judge_refuses_plausible_mistakes(mode, dtype):
    case = make_case(TINY, dtype, CPU)
    swapped = fk.SparsePattern(case.cols, case.rows, case.pattern.shape)

    def linear(x, lam, values, pattern=case.pattern, bias=case.bias):
        return fk.frod_linear(x, case.U, case.V, lam, values, pattern, bias)

    assert judged(case, mode, linear) is None
    mistakes = {
        "transposed S": lambda x, lam, values: linear(x, lam, values, swapped),
        "no diagonal": lambda x, lam, values: linear(x, 0 * lam, values),
        "no bias": lambda x, lam, values: linear(x, lam, values, bias=None),
        "stale values": lambda x, lam, values: linear(x, lam, 0.9 * values),
        "rolled values": lambda x, lam, values: linear(x, lam, values.roll(1)),
        "a token lost": lambda x, lam, values: linear(torch.cat([x[:-1], x[:1]]), lam, values),
    }
    for name, mistake in mistakes.items():
        assert judged(case, mode, mistake) is not None, name


def test_the_judge_refuses_a_wrong_gradient_under_a_right_result():
    case = make_case(TINY, torch.float32, CPU)
    linear = lambda x, lam, values: fk.frod_linear(x, case.U, case.V, lam, values, case.pattern, case.bias)  # noqa: E731
    complaint = judged(case, "step", lambda x, lam, values: linear(x, lam.detach() + 0 * lam, values))
    assert complaint is not None and complaint.startswith("dlam")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", plain.FORMS)
def test_plain_forms_are_right(form, dtype):
    case = make_case(TINY, dtype, CPU)
    plan = plain.Plan(case)
    for mode in ("forward", "step"):
        assert judged(case, mode, plain.layer(form, case, plan)) is None
        if form != "csr":
            assert judged(case, mode, plain.compilable(form, case, plan)) is None


@pytest.mark.parametrize("family", [frod, sparse_core], ids=lambda f: f.OP)
def test_every_contestant_is_right(family):
    pytest.importorskip("peft")
    for mode in family.MODES:
        made = family.group(TINY, mode, torch.float32, make_clock(CPU), CPU, False)
        assert tuple(entry.impl for entry in made.entries) == family.implementations(mode, False)
        results = measure(made, make_clock(CPU), BRIEF)
        assert {r.impl: r.status for r in results} == dict.fromkeys(family.implementations(mode, False), "ok")


def test_bytes_kept_for_the_backward():
    weight = torch.randn(8, 16, requires_grad=True)
    x = torch.randn(4, 16, requires_grad=True)
    assert saved_bytes(lambda: x @ weight.t(), [x]) == x.nbytes  # not the weight
    assert saved_bytes(lambda: (x @ weight.t()).exp(), [x]) == x.nbytes + 4 * 8 * 4  # exp keeps its result
    assert saved_bytes(lambda: (x @ weight.t(), x[:2] @ weight.t()), [x]) == x.nbytes  # views share
    S = torch.eye(16).to_sparse_csr()
    assert saved_bytes(lambda: torch.sparse.mm(S, x.t()), [x]) < x.nbytes + 1


def test_paths_keep_what_they_say():
    case = make_case(TINY, torch.float32, CPU)
    kept = {path: frod.ours(case, "step", path).saved() for path in ("activation", "fold", "materialize")}
    z, weight = 4 * TINY.n * TINY.T, 4 * TINY.m * TINY.n
    assert kept == {"activation": z, "fold": z + weight, "materialize": z + weight}


def test_shapes_and_filter():
    assert {shape.name for shape in SIZES["quick"]} < {shape.name for shape in SIZES["full"]}
    every = specs("full")
    assert len({spec.id for spec in every}) == len(every)
    chosen = specs("default", ["bfloat16"], "frod_linear/step/minilm")
    assert len(chosen) == 3 and all(spec.dtype == "bfloat16" and spec.mode == "step" for spec in chosen)


def test_cases_repeat_and_have_what_peft_samples():
    one, two = (make_case(TINY, torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(one.x, two.x) and torch.equal(one.rows, two.rows)
    assert one.pattern.nnz == TINY.nnz and bool((one.rows != one.cols).all()) and bool((one.values != 0).all())
