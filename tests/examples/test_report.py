# SPDX-License-Identifier: Apache-2.0
"""The demo's sums: whose times are compared, what is agreement, and what reaches the reader."""

from __future__ import annotations

import io
import json
import types
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples.finetuning import report
from examples.finetuning.settings import FRODKERNELS, FRODKERNELS_HRA, LORA, PEFT_FROD, PEFT_HRA, Settings
from examples.finetuning.train import Trainer, in_turn, median_ratio


def result(losses: list[float], **changes: Any) -> dict[str, Any]:
    row = {
        "losses": losses,
        "step_ms": [900.0, 100.0, 100.0],
        "eval_batch_ms": [50.0, 50.0],
        "init_s": 0.5,
        "trainable_parameters": 12345,
        "accuracy": 0.75,
        "majority_share": 0.5,
        "peak_memory_mb": 500.0,
        "peak_above_base_mb": 100.0,
    }
    return {**row, **changes}


RESULTS = {LORA: result([2.0, 1.0]), PEFT_FROD: result([2.0, 1.5]), FRODKERNELS: result([2.0, 1.25])}
TIMING = {
    "ratios_to": LORA,
    "step_ms": {LORA: [10.0, 12.0, 50.0], PEFT_FROD: [30.0, 36.0, 40.0], FRODKERNELS: [11.0, 13.0, 60.0]},
    "eval_batch_ms": {LORA: [10.0], PEFT_FROD: [80.0], FRODKERNELS: [9.0]},
    "step_ratio": {LORA: 1.0, PEFT_FROD: 3.0, FRODKERNELS: 1.1},
    "eval_ratio": {LORA: 1.0, PEFT_FROD: 8.0, FRODKERNELS: 0.9},
}
SETTINGS = Settings(model="some/model", train_file="train.tab", test_file="test.tab")


def test_times_come_from_the_turns_where_there_were_any() -> None:
    timed, untimed = (report.summarise(SETTINGS, RESULTS, timing)["rows"][PEFT_FROD] for timing in (TIMING, None))
    assert (timed["step_ms"], timed["eval_s"], timed["step_ratio"]) == (36.0, 0.08, 3.0)
    assert (untimed["step_ms"], untimed["eval_s"], untimed["step_ratio"]) == (100.0, 0.1, None)


def test_agreement_needs_both_of_a_pair() -> None:
    agreement = report.summarise(SETTINGS, RESULTS, TIMING)["agreement"]
    assert set(agreement) == {"FRoD"} and agreement["FRoD"]["loss_difference"] == [0.0, 0.25]
    hra = {PEFT_HRA: result([1.0, 0.5]), FRODKERNELS_HRA: result([1.0, 0.75], accuracy=0.5)}
    both = report.summarise(SETTINGS, {**RESULTS, **hra}, None)["agreement"]
    assert (both["HRA"]["max_loss_difference"], both["HRA"]["accuracy_difference"]) == (0.25, 0.25)
    assert both["FRoD"] == agreement["FRoD"]
    alone = {method: RESULTS[method] for method in (LORA, FRODKERNELS)}
    assert report.summarise(SETTINGS, alone, None)["agreement"] == {}


def test_table_json_and_plot(tmp_path: Path) -> None:
    for timing in (TIMING, None):
        summary = report.summarise(SETTINGS, RESULTS, timing)
        assert json.loads(json.dumps(summary)) == summary
        out = io.StringIO()
        report.print_table(summary, Console(file=out))
        text = out.getvalue()
        assert "FRoD, frodkernels" in text and "75.0 %" in text and "12,345" in text
        assert "2.50e-01" in text and "50.0 %" in text
        assert ("× LoRA" in text) == (timing is not None)
        report.plot(summary, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_every_method_goes_first_in_some_round() -> None:
    turns = list(in_turn(3, ("a", "b", "c")))
    assert [method for _, method in turns] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert median_ratio([2.0, 3.0, 100.0], [1.0, 1.0, 10.0]) == 3.0


def test_the_penalty_is_weighted_and_summed_over_the_layers() -> None:
    apart, twice = torch.eye(3)[:, :2], torch.ones(3, 2)  # orthogonal; one direction twice: the norm is sqrt(2)
    trainer = types.SimpleNamespace(directions=[apart, twice, twice], settings=types.SimpleNamespace(hra_penalty=0.5))
    penalised = Trainer.penalised(trainer, torch.tensor(1.0))  # type: ignore[arg-type]
    assert torch.isclose(penalised, torch.tensor(1 + 2**0.5))
