# SPDX-License-Identifier: Apache-2.0
"""What one worker process does: train and judge one method, or time all of them step by step.

Each method trains in a process of its own, so that peak memory is its own and no state leaks. Times that are compared
come from a further process that holds all methods and takes one step of each in turn: what else the machine does then
falls on all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from frodkernels import orthogonality_penalty

from . import memory, models
from .data import Corpus, batches, load_corpus
from .models import Adapted
from .settings import LORA, DemoError, Settings

Batch = dict[str, Tensor]


def prepare(settings: Settings) -> tuple[Corpus, list[Batch], list[Batch]]:
    """The corpus, and its training and evaluation batches as tensors."""
    models.quiet()
    check_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    corpus = load_corpus(settings)
    tokenizer = models.make_tokenizer(settings)
    train, evaluation = (
        [models.encode(tokenizer, batch, settings) for batch in batches(texts, settings.batch_size)]
        for texts in (corpus.train, corpus.evaluation)
    )
    return corpus, train, evaluation


def check_device(name: str) -> None:
    """Refuse a device that this torch does not have, by the flag's name."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise DemoError(f"--device {name}: {str(error).splitlines()[0]}") from error


def synchronised(settings: Settings) -> float:
    """The clock, once the device has finished what it was given."""
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


class Trainer:
    """One method's model and optimizer, advanced one step at a time."""

    def __init__(self, adapted: Adapted, method: str, settings: Settings) -> None:
        self.model, self.settings = adapted.model, settings
        self.optimizer, self.schedule = models.make_optimizer(adapted.model, method, settings)
        self.directions = models.directions(adapted.model) if settings.hra_penalty else []
        self.taken = 0

    def step(self, batch: Batch) -> tuple[float, float]:
        """One training step: (the task's loss, milliseconds)."""
        # The same masks in the base model's dropout for every method, whatever ran before.
        torch.manual_seed(self.settings.seed + 1 + self.taken)
        self.model.train()
        start = synchronised(self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**batch).loss
        self.penalised(loss).backward()
        self.optimizer.step()
        self.schedule.step()
        elapsed = synchronised(self.settings) - start
        self.taken += 1
        return loss.item(), 1e3 * elapsed

    def penalised(self, loss: Tensor) -> Tensor:
        """The loss with `--hra-penalty` times how far from orthogonal the reflections of every layer are."""
        for u in self.directions:
            loss = loss + self.settings.hra_penalty * orthogonality_penalty(u)
        return loss

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[int, float]:
        """The right answers in one batch, and the milliseconds it took."""
        self.model.eval()
        start = synchronised(self.settings)
        logits = self.model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        elapsed = synchronised(self.settings) - start
        return int((logits.argmax(-1) == batch["labels"]).sum()), 1e3 * elapsed


def train_method(method: str, settings: Settings) -> dict[str, Any]:
    """Train one method from the first step to the last, evaluate it, and account for its memory."""
    corpus, train, evaluation = prepare(settings)
    base = models.load_base(settings, corpus.classes)
    memory.reset_peak(settings.device)
    loaded = memory.current_mb(settings.device)
    adapted = models.adapt(base, method, settings)
    trainer = Trainer(adapted, method, settings)
    losses, step_ms = [], []
    bar = tqdm(train, desc=f"{method:>15}: train", unit="step", dynamic_ncols=True)
    for batch in bar:
        loss, elapsed = trainer.step(batch)
        losses.append(loss)
        step_ms.append(elapsed)
        bar.set_postfix(loss=f"{loss:.3f}")
    right, eval_ms = 0, []
    for batch in tqdm(evaluation, desc=f"{method:>15}: evaluate", unit="batch", dynamic_ncols=True):
        hits, elapsed = trainer.evaluate(batch)
        right += hits
        eval_ms.append(elapsed)
    peak = memory.peak_mb(settings.device)
    return {
        "method": method,
        "note": adapted.note,
        "init_s": adapted.init_s,
        "trainable_parameters": adapted.trainable,
        "losses": losses,
        "step_ms": step_ms,
        "eval_batch_ms": eval_ms,
        "accuracy": right / len(corpus.evaluation),
        "majority_share": corpus.majority_share,
        "peak_memory_mb": peak,
        "peak_above_base_mb": peak - loaded,
    }


def in_turn(count: int, methods: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(round, method) for every round; the order rotates, so that none always follows the same one."""
    for number in range(count):
        shift = number % len(methods)
        for method in methods[shift:] + methods[:shift]:
            yield number, method


def time_methods(settings: Settings) -> dict[str, Any]:
    """Training steps and evaluation batches of all methods, taken in turn on the same batches.

    One untimed step comes first: it makes S nonzero, so that no method is timed on a matrix of zeros, and fills
    allocator and kernel caches. The evaluation goes through every evaluation text once; its first batch includes what
    a method prepares after training (cached weights).
    """
    corpus, train, evaluation = prepare(settings)
    methods = settings.methods
    trainers: dict[str, Trainer] = {}
    for method in methods:
        adapted = models.adapt(models.load_base(settings, corpus.classes), method, settings)
        trainers[method] = Trainer(adapted, method, settings)
        trainers[method].step(train[0])

    def rounds(what: str, todo: list[Batch], call: Callable[[Trainer, Batch], float]) -> dict[str, list[float]]:
        taken: dict[str, list[float]] = {method: [] for method in methods}
        turns = tqdm(
            list(in_turn(len(todo), methods)), desc=f"        in turn: {what}", unit="call", dynamic_ncols=True
        )
        for number, method in turns:
            taken[method].append(call(trainers[method], todo[number]))
        return taken

    wanted = [train[(1 + number) % len(train)] for number in range(settings.timing_rounds)]
    step_ms = rounds("train", wanted, lambda trainer, batch: trainer.step(batch)[1])
    eval_ms = rounds("evaluate", evaluation, lambda trainer, batch: trainer.evaluate(batch)[1])
    reference = LORA if LORA in methods else methods[0]
    return {
        "ratios_to": reference,
        "step_ms": step_ms,
        "eval_batch_ms": eval_ms,
        "step_ratio": {method: median_ratio(step_ms[method], step_ms[reference]) for method in methods},
        "eval_ratio": {method: median_ratio(eval_ms[method], eval_ms[reference]) for method in methods},
    }


def median_ratio(times: list[float], reference: list[float]) -> float:
    """The median over the rounds of this round's time against the reference's in the same round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))
