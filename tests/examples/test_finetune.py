# SPDX-License-Identifier: Apache-2.0
"""The demo from its command line: a tiny run on the real model and texts, and what it says about bad flags."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from examples.finetuning import data
from examples.finetuning.settings import PAIRS, DemoError

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"


def finetune(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=300)


def missing_packages() -> str | None:
    try:
        data.find_model(None)
        data.find_texts(None, None)
    except DemoError as error:
        return str(error)
    return None


@pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))
def test_a_tiny_run_end_to_end(tmp_path: Path) -> None:
    small = (
        "--steps 2 --eval-texts 8 --batch-size 4 --sequence-length 16 --timing-rounds 1 --threads 1 --hra-penalty 0.01"
    )
    methods = "lora,frodkernels,peft-frod,peft-hra,frodkernels-hra,peft-shira,frodkernels-shira"
    # query and value are 384 wide; the 1536-wide layers would spend the test's time on the joint decomposition.
    run = finetune(*small.split(), "--methods", methods, "--targets", "query,value", "--output", str(tmp_path))
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "finetune.json").read_text(encoding="utf-8"))
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert list(summary["rows"]) == methods.split(",")
    for method, row in summary["rows"].items():
        losses = summary["runs"][method]["losses"]
        assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
        assert row["peak_memory_mb"] > row["peak_above_base_mb"] > 0
        assert row["step_ratio"] > 0 and row["eval_ratio"] > 0
        assert 0 <= row["accuracy"] <= 1
        assert f"{row['trainable_parameters']:,}" in run.stdout
    # The same classifier and the same adapted weights at the start; only rounding afterwards.
    firsts = [summary["runs"][method]["losses"][0] for method in summary["rows"]]
    assert max(firsts) - min(firsts) < 1e-4
    assert set(summary["agreement"]) == set(PAIRS)
    assert all(pair["max_loss_difference"] < 1e-4 for pair in summary["agreement"].values())
    trainable = {method: row["trainable_parameters"] for method, row in summary["rows"].items()}
    assert all(trainable[plain] == trainable[ours] for plain, ours in PAIRS.values())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--methods", "lora,boft"], "unknown method 'boft'"),
        (["--steps", "0"], "argument --steps: must be at least 1"),
        (["--lambda-lr", "-1"], "argument --lambda-lr: must be a positive number"),
        (["--hra-penalty", "-1"], "argument --hra-penalty: must be a number of at least 0"),
        (["--sparse-rate", "2"], "argument --sparse-rate: must be between 0 and 1"),
        (["--dtype", "int8"], "argument --dtype"),
        (["--model", "/no/such/model"], "--model /no/such/model: no config.json there"),
    ],
    ids=["method", "steps", "rate", "penalty", "density", "dtype", "model"],
)
def test_a_bad_flag_is_named(flags: list[str], message: str, tmp_path: Path) -> None:
    data_file = tmp_path / "texts.tab"
    data_file.write_text("Category\tText\nd\tstring\nclass\t\na\tone\n", encoding="utf-8")
    run = finetune(*flags, "--train-file", str(data_file), "--test-file", str(data_file), "--output", str(tmp_path))
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "finetune.json").exists()
