# SPDX-License-Identifier: Apache-2.0
"""The runner of bench.gpu: whatever happens to an item is recorded and the others run; an interrupted run goes on."""

from __future__ import annotations

import os
import re
import types

import pytest

from bench.gpu import __main__ as command
from bench.gpu import report as reports
from bench.gpu.runner import run_stage
from bench.gpu.stage import Item, Options
from tests.bench import fake_stage


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Drive the fake stage into a report; returns the report as read back from its file, and what ran."""
    path, log = tmp_path / "report.md", tmp_path / "log"
    monkeypatch.setattr(command, "header", lambda options: {**HEADER, "quick": options.quick})

    def run(*names: str, fresh: bool = False, **options) -> tuple[dict, list[str]]:
        log.write_text("")
        if names:
            monkeypatch.setattr(fake_stage, "ITEMS", names)
        command.drive([fake_stage], ["fake"], Options(device="cpu", models=str(log), **options), path, fresh)
        return reports.load(path)["stages"]["fake"], log.read_text().split("\n")[:-1]

    run.path = path
    return run


HEADER = {"machine": "Some GPU", "commit": "abc", "torch": "2", "dry_run": False, "started": "now"}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # a zombie whose parent is gone is dead
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_every_end_is_recorded_and_the_others_run(run):
    found, _ = run()
    assert {name: one["status"] for name, one in found.items()} == {
        "fine": "ok", "raises": "failed", "missing": "unavailable", "finds a fault": "failed", "exits": "crashed",
        "killed": "crashed", "hangs": "timeout", "hangs in a child": "timeout", "is guilty": "ok", "last": "ok",
    }  # fmt: skip
    assert found["raises"]["summary"] == "ValueError: no such luck"
    assert found["missing"]["summary"] == "there is no spoon"
    assert found["finds a fault"]["data"] == {"data": [1, 2]}
    assert "status 3" in found["exits"]["summary"] and "the step before the end" in found["exits"]["summary"]
    assert "SIGKILL" in found["killed"]["summary"]
    assert "stopped after 2 s" in found["hangs"]["summary"] and "at waiting" in found["hangs"]["summary"]
    assert "time.sleep" in found["hangs"]["tail"] or "in run" in found["hangs"]["tail"]  # where it hung
    for name in ("raises", "exits", "killed", "hangs"):
        assert f"this is {name}" in found[name]["tail"] and "this is fine" not in found[name]["tail"]
    assert set(found["is guilty"]["data"]["left_out"]) == {"bad", "worse"}
    assert not _alive(int(re.search(r"child (\d+)", found["hangs in a child"]["tail"])[1]))
    text = run.path.read_text()
    assert "What went wrong" in text and "this is killed" in text and "5 ok" not in text.split("## Fake")[0]


def test_an_interrupted_run_goes_on(run):
    run("fine", "raises", "missing", "exits")
    found, ran = run("fine", "raises", "missing", "exits", "last")
    assert ran == ["missing", "exits", "last"]  # results are kept, what gave none is tried again
    assert list(found) == ["fine", "raises", "missing", "exits", "last"]
    assert run(fresh=True)[1] == ["fine", "raises", "missing", "exits", "last"]
    assert run.path.with_name("report.md.previous").exists()
    assert len(run(quick=True)[1]) == 5  # another kind of run starts afresh


def test_ctrl_c_leaves_a_report(run, monkeypatch):
    def interrupted(module, items, options, on_record):
        on_record("fine", {"status": "ok", "summary": "", "data": {}})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "run_stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("fine", "last")
    found = reports.load(run.path)["stages"]["fake"]
    assert [one["status"] for one in found.values()] == ["ok", "not run"]
    assert run("fine", "last")[1] == ["last"]


def test_a_stage_that_does_not_start_is_recorded():
    found = {}
    broken = types.SimpleNamespace(__name__="tests.bench.no_such_stage", budget=lambda options: 60.0)
    run_stage(broken, [Item("a", 5), Item("b", 5)], Options(device="cpu"), found.__setitem__)
    assert {one["status"] for one in found.values()} == {"crashed"} and set(found) == {"a", "b"}
    assert "no_such_stage" in found["a"]["tail"]


def test_a_spent_budget_is_said():
    found = {}
    stage = types.SimpleNamespace(__name__="tests.bench.fake_stage", budget=lambda options: -1.0)
    run_stage(stage, [Item("fine", 5)], Options(device="cpu"), found.__setitem__)
    assert found["fine"]["status"] == "not run" and "time was spent" in found["fine"]["summary"]


def test_a_stage_that_cannot_be_planned_is_recorded(run, monkeypatch):
    monkeypatch.setattr(fake_stage, "items", lambda options: 1 / 0)
    assert run()[0]["plan"]["status"] == "crashed"


def test_the_report_survives_what_it_holds(tmp_path):
    report = reports.empty(dict(HEADER))
    nasty = "```json\n<!-- data -->\n| a | b |\n<!-- end of data -->\n```"
    report["stages"]["fake"] = {"x": {"status": "failed", "summary": nasty, "data": {"y": [1.5, None]}, "tail": nasty}}
    broken = types.SimpleNamespace(NAME="fake", TITLE="Fake", verdict=lambda r: 1 / 0, render=lambda r: {}["x"])
    path = tmp_path / "report.md"
    reports.write(path, report, [broken])
    assert reports.load(path) == report
    assert "could not be written" in path.read_text() and "no verdict" in path.read_text()
    for text in ("nothing", '<!-- data -->\n```json\n{"format":99}\n```\n<!-- end of data -->\n'):
        path.write_text(text)
        with pytest.raises(ValueError):
            reports.load(path)


def test_without_a_device_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--output", str(tmp_path / "report.md")]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not (tmp_path / "report.md").exists()
