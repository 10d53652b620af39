# SPDX-License-Identifier: Apache-2.0
"""From a tiny run to CSV, page and figures."""

from __future__ import annotations

import csv
import dataclasses

import pytest

from bench import __main__ as command
from bench import calibrate, frod, report, results
from bench.conftest import Replay
from bench.shapes import SIZES, Shape

SHAPES = (Shape("Tiny", "wide", 32, 96, 24, True), Shape("Tiny", "tall", 96, 32, 16, False))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """``python -m bench --quick`` on tiny layers, two rounds."""
    monkeypatch.setitem(SIZES, "quick", SHAPES)

    def run(*arguments: str) -> tuple[int, list[results.Row], str]:
        folder, page = tmp_path / "results", tmp_path / "docs" / "benchmarks.md"
        places = ["--results", str(folder), "--page", str(page)]
        status = command.main(["--quick", "--rounds", "2", "--device", "cpu", *places, *arguments])
        (path,) = folder.glob("*.csv")
        return status, results.read(path), page.read_text(encoding="utf-8") if page.exists() else ""

    return run


def test_a_run_writes_rows_page_and_figures(run, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    status, rows, page = run("--dtype", "float32", "--filter", "tiny wide")
    assert status == 0
    assert {row.status for row in rows} == {"ok"}
    assert {(row.op, row.mode) for row in rows} == {
        ("frod_linear", "forward"), ("frod_linear", "step"), ("frod_linear", "eval"),
        ("sparse_core", "forward"), ("sparse_core", "backward"),
    }  # fmt: skip
    for row in rows:
        assert float(row.ms_p20) <= float(row.ms) <= float(row.ms_p80) and row.rounds == 2
        assert row.machine and row.torch and row.commit and row.threads and row.time
        assert bool(row.saved_bytes) == (row.mode == "step" and row.impl != "floor")
        assert row.impl != "floor" or float(row.ratio) == 1
    assert "measured" in page and rows[0].machine in page and "PEFT, accelerated" in page and "LoRA r=8" in page
    figures = sorted((tmp_path / "results").glob("*.png"))
    assert len(figures) == 5 and all(f"(../results/{figure.name})" in page for figure in figures)
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


def test_a_wrong_answer_gets_no_time(run, monkeypatch):
    right = frod.ours

    def sabotaged(case, mode, path):
        contestant = right(case, mode, path)
        answers = contestant.answers
        contestant.answers = lambda: {name: 1.01 * t.detach() for name, t in answers().items()}
        return contestant

    monkeypatch.setattr(frod, "ours", sabotaged)
    status, rows, page = run("--dtype", "bfloat16", "--filter", "frod_linear/step/tiny wide")
    assert status == 1
    by = {row.impl: row for row in rows}
    assert by["auto"].status.startswith("wrong answer: ") and by["auto"].ms == by["auto"].ratio == ""
    assert by["torch"].status == "ok" and float(by["torch"].ms) > 0
    assert "No time:" in page and "wrong answer" in page


def test_a_second_run_replaces_its_rows_and_keeps_the_others(run):
    _, first, _ = run("--dtype", "float32", "--filter", "sparse_core/forward", "--no-page")
    _, second, _ = run("--dtype", "float32", "--filter", "sparse_core/forward/tiny wide", "--no-page")
    assert [row.key for row in first] == [row.key for row in second]


def test_the_page_shows_the_newest_measurement_and_the_losses(tmp_path):
    def row(impl: str, ms: float, time: str, commit: str) -> results.Row:
        blank = {field.name: "" for field in dataclasses.fields(results.Row)}
        numbers = dict(m=4, n=8, T=2, nnz=3, rounds=5, threads=1)
        text = dict(op="frod_linear", mode="step", dtype="float32", model="Tiny", layer="wide", status="ok")
        times = dict(ms=f"{ms}", ms_p20=f"{ms}", ms_p80=f"{ms}", ratio=f"{ms}", ratio_p20=f"{ms}", ratio_p80=f"{ms}")
        where = dict(cache="warm", device="cpu", machine="Some CPU", torch="2", commit=commit, time=time)
        return results.Row(**{**blank, **numbers, **text, **times, **where, "impl": impl})

    old = [row("floor", 1, "2026-01-01", "old"), row("auto", 7, "2026-01-01", "old")]
    new = [
        row("floor", 1, "2026-02-01", "new"),
        row("auto", 3, "2026-02-01", "new"),
        row("peft", 2, "2026-02-01", "new"),
    ]
    path = tmp_path / "cpu.csv"
    results.write(path, old)
    results.write(path, new)
    assert len(results.read(path)) == 5
    page = report.generate(tmp_path, tmp_path / "page.md").read_text(encoding="utf-8")
    assert "3.00" in page and "7.00" not in page
    assert "Where frodkernels loses" in page and "PEFT takes 0.67 of the time" in page


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(SystemExit, match="nothing measured"):
        report.generate(tmp_path, tmp_path / "page.md")


def test_the_columns_are_in_the_file(run, tmp_path):
    run("--dtype", "float32", "--filter", "sparse_core/forward/tiny wide", "--no-page")
    (path,) = (tmp_path / "results").glob("*.csv")
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file))
    assert header == [field.name for field in dataclasses.fields(results.Row)]


def test_unknown_choices_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        command.main(["--dtype", "int8"])
    assert "unknown dtype 'int8'" in capsys.readouterr().err
    assert command.main(["--filter", "no such group"]) == 2


def test_calibration_prints_costs_and_choices(monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "COST_SHAPES", SHAPES)
    monkeypatch.setattr(calibrate, "CHOICE_SHAPES", SHAPES)
    calibrate.main(["--seconds", "0", "--tokens", "8", "--dtype", "float32", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "SPARSE_COST = {" in text and "torch.float32: (" in text
    assert sum(line.startswith("| 96→32") for line in text.splitlines()) == 2  # forward and step


def test_pytest_benchmark_is_handed_the_samples():
    replay = Replay()
    replay.load([0.5, 0.25])
    readings = [replay() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [0.5, 0.25]
