# SPDX-License-Identifier: Apache-2.0
"""Stage "training": steps of PEFT's own method-comparison recipes with LoRA, PEFT's FRoD and HRA, and ours."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from bench.gpu.stage import FAILED, OK, Item, Mark, Options, Record, Unavailable, record, table
from bench.gpu.tasks import TASKS, settings, training_of

NAME, TITLE = "training", "PEFT's method comparison"

OURS, PEFT = "frodkernels", "PEFT"
WARMUP = 5  # steps that are not timed
EXPERIMENTS = ("lora", "frod", "hra", "frod-2-percent")


def items(options: Options) -> list[Item]:
    """Every experiment of every task; FRoD and HRA with PEFT's layers and with ours, each in a process of its own."""
    found = []
    for task, given in settings().items():
        for experiment in EXPERIMENTS:
            if experiment not in given["experiments"]:
                continue
            if experiment == "frod-2-percent" and (options.quick or options.dry_run):
                continue
            for layers in (PEFT,) if experiment == "lora" else (PEFT, OURS):
                found.append(
                    Item(f"{task}/{experiment}/{layers}", 120 if options.dry_run else 2700, alone=not options.dry_run)
                )
    return found


def budget(options: Options) -> float:
    return 1.5 * 3600.0 if options.quick else 5 * 3600.0


def _steps(options: Options) -> int:
    return options.steps or (2 if options.dry_run else 10 if options.quick else 30)


def _optimizer(model: torch.nn.Module, training: dict[str, Any], steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """PEFT's; its schedule, a tenth of it warm-up, is drawn together to ``steps``: a few steps of the whole schedule
    would train with a rate near zero, and equal losses would say nothing."""
    from transformers import get_cosine_schedule_with_warmup

    parameters = [p for p in model.parameters() if p.requires_grad]
    made = getattr(torch.optim, training["optimizer_type"])(parameters, **training["optimizer_kwargs"])
    if training["lr_scheduler"] != "cosine":
        return made, None
    warmup = max(1, steps // 10)
    return made, get_cosine_schedule_with_warmup(made, num_warmup_steps=warmup, num_training_steps=steps)


def _adapted(model: torch.nn.Module, adapter: dict[str, Any], training: dict[str, Any], seed: int) -> torch.nn.Module:
    from peft import get_peft_config, get_peft_model

    torch.manual_seed(seed)
    made = get_peft_model(
        model, get_peft_config(dict(adapter)), autocast_adapter_dtype=training["autocast_adapter_dtype"]
    )
    return made.train()


def _accelerate(model: torch.nn.Module, experiment: str) -> dict[str, Any]:
    import frodkernels as fk

    report = fk.peft.accelerate(model)
    if not report.swapped:
        why = next(iter(report.skipped.values()), "the model has no layer of a kind that accelerate() knows")
        raise Unavailable(f"nothing was accelerated: {why}")
    return {"swapped": len(report.swapped), "skipped": dict(list(report.skipped.items())[:10])}


def _memory() -> dict[str, int]:
    if not torch.cuda.is_initialized():
        return {}
    return {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}


def run(item: str, options: Options, mark: Mark) -> Record:
    task_name, experiment, layers = item.split("/")
    training = training_of(task_name, experiment)
    adapter = settings()[task_name]["experiments"][experiment]["adapter"]
    steps = _steps(options)
    warmup = min(WARMUP, steps - 1)
    mark("making the model")
    task = TASKS[task_name](options, training, steps + warmup)
    mark("making the adapter")
    began = time.perf_counter()
    model = _adapted(task.model, adapter, training, training["seed"])
    data: dict[str, Any] = {"model": task.model_is, "data": task.data_is, "training": training, "adapter": adapter}
    data["start_seconds"] = round(time.perf_counter() - began, 2)
    task.finish(model)
    if layers == OURS:
        data |= _accelerate(model, experiment)
    data["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer, schedule = _optimizer(model, training, steps + warmup)
    mark("training")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    losses, seconds, tokens = [], [], []
    for _, batch in zip(range(steps + warmup), task.batches, strict=False):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = batch.loss(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training["grad_norm_clip"])
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())  # waits for the device, as PEFT's loop does
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        tokens.append(batch.tokens)
    timed, counted = seconds[warmup:], tokens[warmup:]
    data |= {"losses": losses, "seconds": seconds, "tokens": tokens, **_memory()}
    data["ms_per_step"] = 1e3 * statistics.median(timed)
    data["tokens_per_second"] = sum(counted) / sum(timed)
    if not all(torch.isfinite(torch.tensor(losses))):
        return record(FAILED, "a loss is not finite", **data)
    peak = f", {data['peak_allocated'] / 2**30:.2f} GiB at its peak" if "peak_allocated" in data else ""
    return record(OK, f"{data['ms_per_step']:.1f} ms a step, {data['tokens_per_second']:.0f} tokens/s{peak}", **data)


def _ratio(records: dict[str, Record], task: str, experiment: str) -> float | None:
    """How many times faster ours is; None where one is missing."""
    both = [records.get(f"{task}/{experiment}/{layers}", {}).get("data", {}) for layers in (PEFT, OURS)]
    if not all("ms_per_step" in one for one in both):
        return None
    return both[0]["ms_per_step"] / both[1]["ms_per_step"]


def verdict(records: dict[str, Record]) -> str:
    found = []
    for task, given in settings().items():
        for experiment in given["experiments"]:
            ratio = _ratio(records, task, experiment)
            if ratio is not None:
                found.append(f"{task} {experiment}: {ratio:.2f} x PEFT's speed")
    return "; ".join(found) or "no comparison: see below"


def _gap(records: dict[str, Record], name: str) -> str:
    """The largest difference of the losses from PEFT's own layers."""
    task, experiment, layers = name.split("/")
    other = records.get(f"{task}/{experiment}/{PEFT}", {}).get("data", {}).get("losses")
    mine = records[name].get("data", {}).get("losses")
    if layers == PEFT or not other or not mine:
        return ""
    return f"{max(abs(a - b) for a, b in zip(mine, other, strict=False)):.2e}"


def render(records: dict[str, Record]) -> str:
    parts = []
    for task, given in settings().items():
        names = [name for name in records if name.startswith(f"{task}/")]
        lines, notes = [], []
        for name in names:
            _, experiment, layers = name.split("/")
            one, data = records[name], records[name].get("data", {})
            if "ms_per_step" not in data:
                lines.append([f"{experiment}, {layers}", f"{one['status']}: {one['summary']}", "", "", "", "", ""])
                continue
            memory = f"{data['peak_allocated'] / 2**30:.2f}" if "peak_allocated" in data else ""
            loss = f"{data['losses'][0]:.4f} → {data['losses'][-1]:.4f}"
            lines.append([
                f"{experiment}, {layers}", f"{data['ms_per_step']:.1f}", f"{data['tokens_per_second']:.0f}", memory,
                f"{data['trainable']:,}", loss, _gap(records, name),
            ])  # fmt: skip
            notes.append(f"{data['model']}; {data['data']}")
        for experiment, found in given["experiments"].items():
            if "published" in found:
                it = found["published"]
                lines.append([
                    f"{experiment}, published by PEFT on {it['gpu']}, full model and data",
                    f"{1e3 * it['train_seconds_per_step']:.1f}", str(it.get("tokens_per_second", "")), "",
                    f"{it['trainable']:,}", "", "",
                ])  # fmt: skip
        head = ["", "ms a step", "tokens/s", "peak, GiB", "trainable", "loss", "largest gap to PEFT's loss"]
        what = "\n".join(f"* Measured with: {note}." for note in sorted(set(notes)))
        source = f"Settings: `{given['folder']}` of huggingface/peft."
        parts.append(f"### {given['title']}\n\n{source}\n\n{table(head, lines)}\n{what}\n")
    return "\n".join(parts)


def expected(records: dict[str, Record]) -> list[str]:
    """Everything must have run, and accelerated layers must learn what PEFT's do."""
    found = []
    for name, one in records.items():
        if one["status"] != OK:
            found.append(f"{name}: {one['status']}: {one['summary']}")
        gap = _gap(records, name)
        if gap and float(gap) > 1e-3:
            found.append(f"{name}: its losses differ from PEFT's by {gap}")
    return found
