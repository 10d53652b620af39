# SPDX-License-Identifier: Apache-2.0
"""Building the model of each method: transformers loads it, PEFT adapts it, frodkernels accelerates it."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import FrodConfig, HRAConfig, LoraConfig, PeftConfig, PeftModel, ShiraConfig, TaskType, get_peft_model
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from frodkernels.peft import accelerate, param_groups

from .data import Texts
from .settings import LORA, PAIRS, DemoError, Settings


@dataclass
class Adapted:
    """A model with its adapter, and how long the adapter took to make."""

    model: PeftModel
    init_s: float
    trainable: int
    note: str


def quiet() -> None:
    """Keep transformers' loading bars and its note about the new classifier out of the demo's output.

    So too its own deprecation warning, and torch's notes on the sparse tensors that plain PEFT makes.
    """
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*Sparse invariant checks.*|.*[Ss]parse.*beta.*", category=UserWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_base(settings: Settings, classes: list[str]) -> PreTrainedModel:
    """The pretrained model with a fresh classifier. The seed makes that classifier the same for every method."""
    torch.manual_seed(settings.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=len(classes), dtype=getattr(torch, settings.dtype), local_files_only=True
    )
    return model.to(settings.device)


def target_modules(settings: Settings) -> str | list[str] | None:
    """`--targets` as PEFT takes it: None is PEFT's own default for the model's architecture."""
    if settings.targets == "default":
        return None
    if settings.targets == "all-linear":
        return "all-linear"
    return [name.strip() for name in settings.targets.split(",")]


def adapter_config(method: str, settings: Settings) -> PeftConfig:
    """What PEFT is asked for."""
    common: dict[str, Any] = {"task_type": TaskType.SEQ_CLS, "target_modules": target_modules(settings)}
    if method == LORA:
        return LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, **common)
    if method in PAIRS["HRA"]:
        return HRAConfig(r=settings.hra_rank, **common)
    if method in PAIRS["SHiRA"]:  # the seed makes the positions the same for both
        return ShiraConfig(r=settings.shira_rank, random_seed=settings.seed, **common)
    return FrodConfig(sparse_rate=settings.sparse_rate, progressbar=False, **common)


def adapt(base: PreTrainedModel, method: str, settings: Settings) -> Adapted:
    """Put the method's adapter on a base model. PEFT trains the new classifier with it, for every method."""
    start = time.perf_counter()
    try:
        model = get_peft_model(base, adapter_config(method, settings))
    except ValueError as error:
        raise DemoError(f"--targets {settings.targets}: {error}") from error
    note = "plain PEFT"
    if any(method == ours for _, ours in PAIRS.values()):
        report = accelerate(model)
        # Comparing PEFT with itself would look like perfect agreement: refuse.
        if report.skipped or not report.swapped:
            raise DemoError(f"frodkernels did not take every layer: {report.summary()}")
        note = report.summary()
    seconds = time.perf_counter() - start
    return Adapted(model, seconds, sum(p.numel() for p in model.parameters() if p.requires_grad), note)


def make_optimizer(model: PeftModel, method: str, settings: Settings) -> tuple[Optimizer, LambdaLR]:
    """AdamW with the method's own rates, and a linear warm-up and decay."""
    if method in PAIRS["FRoD"]:
        groups = param_groups(model, settings.head_lr, lambda_lr=settings.lambda_lr, values_lr=settings.values_lr)
    else:
        part, rate = {
            LORA: ("lora_", settings.lora_lr),
            **dict.fromkeys(PAIRS["HRA"], ("hra_u", settings.hra_lr)),
            **dict.fromkeys(PAIRS["SHiRA"], ("shira_weight", settings.shira_lr)),
        }[method]
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if part in name], "lr": rate},
            {"params": [p for name, p in named if part not in name], "lr": settings.head_lr},
        ]
    optimizer = AdamW(groups, weight_decay=0.0)
    warmup, steps = settings.warmup_steps, settings.steps

    def scale(step: int) -> float:
        return min((step + 1) / (warmup + 1), max(steps - step, 1) / max(steps - warmup, 1), 1.0)

    return optimizer, LambdaLR(optimizer, scale)


def directions(model: PeftModel) -> list[Tensor]:
    """HRA's trained u of every layer; nothing for another method."""
    return [p for name, p in model.named_parameters() if "hra_u" in name and p.requires_grad]


def make_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The model's tokenizer, from the same local folder."""
    return AutoTokenizer.from_pretrained(settings.model, local_files_only=True)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Texts, settings: Settings) -> dict[str, Tensor]:
    """A batch as tensors on the device, padded to its longest text and cut at `--sequence-length` tokens."""
    encoded = tokenizer(
        texts.texts, padding=True, truncation=True, max_length=settings.sequence_length, return_tensors="pt"
    )
    batch = {**encoded, "labels": torch.tensor(texts.labels)}
    return {name: tensor.to(settings.device) for name, tensor in batch.items()}
