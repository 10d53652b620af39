# SPDX-License-Identifier: Apache-2.0
"""Broken adapter files: a ValueError that names the key, a living process, an unchanged model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peft.hostile import FILES

ROOT = Path(__file__).parents[2]
WAYS = ("from_pretrained", "load_adapter, plain", "load_adapter, fast", "accelerate")
# what reaches accelerate: files that PEFT loads without a word
SILENT = {
    "row of n", "row past the end", "row of -1", "row of -5000", "row of 1e6", "column of 2^40", "smallest column",
    "duplicate", "huge size", "size of another category", "negative size",
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    process = subprocess.run(
        [sys.executable, "-m", "tests.peft.hostile"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]  # a crash would be a negative number
    return json.loads(process.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("name", FILES)
def test_refused_before_anything_changes(results, name, way, dtype):
    result = results[f"{way}: {name}, {dtype}"]
    assert result["error"] is not None and result["error"].startswith("ValueError"), result
    for part in FILES[name][1]:
        assert part in result["error"]
    assert result["intact"]
    assert result["injected"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(SILENT))
def test_refused_by_accelerate_after_plain_peft_took_it(results, name, dtype):
    result = results[f"accelerate: {name}, {dtype}"]
    assert result is not None and result["error"].startswith("ValueError: frod_s_"), result
    assert "layer 'base_model.model.blocks.0." in result["error"]
    assert result["intact"]


def test_nothing_slips_through_accelerate(results):
    """Whatever PEFT let in and accelerate accepted is harmless: PEFT had converted or dropped the broken tensor."""
    accepted = {case.split(": ")[1] for case, r in results.items() if r is not None and r["error"] is None}
    names = {case.rsplit(", ", 1)[0] for case in accepted}
    assert names <= {
        "fractional size", "float indices", "half indices", "integer lambda", "complex lambda", "integer V",
        "no V", "no indices",
    }, names  # fmt: skip
