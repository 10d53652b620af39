# SPDX-License-Identifier: Apache-2.0
"""What one run of the demo is asked to do; it travels as JSON from the command line to the workers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LORA = "lora"
PEFT_FROD = "peft-frod"
FRODKERNELS = "frodkernels"
PEFT_HRA = "peft-hra"
FRODKERNELS_HRA = "frodkernels-hra"
PEFT_SHIRA = "peft-shira"
FRODKERNELS_SHIRA = "frodkernels-shira"
METHODS = (LORA, PEFT_FROD, FRODKERNELS, PEFT_HRA, FRODKERNELS_HRA, PEFT_SHIRA, FRODKERNELS_SHIRA)
# adapter -> (as PEFT runs it, on frodkernels): the same function, so that the two can be held against each other
PAIRS = {
    "FRoD": (PEFT_FROD, FRODKERNELS),
    "HRA": (PEFT_HRA, FRODKERNELS_HRA),
    "SHiRA": (PEFT_SHIRA, FRODKERNELS_SHIRA),
}


class DemoError(Exception):
    """Something the user can put right; its message says how."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run; equal settings mean the same data in the same order."""

    model: str
    train_file: str
    test_file: str
    methods: tuple[str, ...] = METHODS
    device: str = "cpu"
    dtype: str = "float32"
    steps: int = 24
    eval_texts: int = 112
    held_out: bool = False
    batch_size: int = 16
    sequence_length: int = 96
    targets: str = "all-linear"
    sparse_rate: float = 0.01
    lora_rank: int = 8
    hra_rank: int = 8
    hra_penalty: float = 0.0
    shira_rank: int = 8
    head_lr: float = 2e-2
    lora_lr: float = 3e-3
    lambda_lr: float = 1e-2
    values_lr: float = 3e-3
    hra_lr: float = 3e-2
    shira_lr: float = 1e-2
    warmup_steps: int = 3
    timing_rounds: int = 3
    threads: int = 0
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {**dataclasses.asdict(self), "methods": list(self.methods)}

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read what `to_json` gave."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**raw, "methods": tuple(raw["methods"])})
