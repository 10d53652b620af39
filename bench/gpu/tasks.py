# SPDX-License-Identifier: Apache-2.0
"""The models and batches of PEFT's method comparison: local ones where they are, else random ones of the same form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.stage import Options

SETTINGS = Path(__file__).with_name("peft_settings.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Random models have fewer layers: every layer of a kind costs the same, and the adapters' start grows with them.
FEWER_LAYERS = {"metamath": {"num_hidden_layers": 4}, "flux": {"num_layers": 1, "num_single_layers": 2}}
TINY = {
    "metamath": {
        "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16,
        "num_hidden_layers": 2, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2,
    },
    "flux": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8, "joint_attention_dim": 24,
        "axes_dims_rope": [4, 4, 4, 4], "num_layers": 1, "num_single_layers": 1,
    },
}  # fmt: skip


def settings() -> dict[str, Any]:
    """peft_settings.json: the tasks, by name."""
    return json.loads(SETTINGS.read_text(encoding="utf-8"))["tasks"]


def training_of(task: str, experiment: str) -> dict[str, Any]:
    """The task's training parameters with the experiment's own over them."""
    found = settings()[task]
    return {**found["training"], **found["experiments"][experiment].get("training", {})}


@dataclass
class Batch:
    """``loss(model)`` runs the forward; ``tokens``: how many the step has, padding not counted."""

    loss: Callable[[nn.Module], Tensor]
    tokens: int


@dataclass
class Task:
    """A model without an adapter, and its batches; what they are is said in ``model_is`` and ``data_is``."""

    model: nn.Module
    batches: Iterator[Batch]
    model_is: str
    data_is: str
    finish: Callable[[nn.Module], None]  # to be called once the adapter is in


def locate(repository: str, models: str, needs: str, kind: str = "model") -> Path | None:
    """A local copy of a Hub repository that has the file ``needs``: under ``models``, else in the Hub's cache."""
    owner, _, name = repository.partition("/")
    found: list[Path] = []
    if models:
        root = Path(models)
        found += [root / owner / name, root / name]
        found += sorted(root.glob(f"{kind}s--{owner}--{name}/snapshots/*"))
    try:
        from huggingface_hub import snapshot_download

        found.append(Path(snapshot_download(repository, repo_type=kind, local_files_only=True)))
    except Exception:  # not cached, or no huggingface_hub: there is no copy
        pass
    return next((path for path in found if (path / needs).is_file()), None)


def _random(build: Callable[[], nn.Module], dtype: torch.dtype, device: str, seed: int) -> nn.Module:
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build()
    finally:
        torch.set_default_dtype(before)


# ---- MetaMathQA, Llama-3.2-3B ----------------------------------------------------------------------------------------


def _texts(task: dict[str, Any], training: dict[str, Any], folder: Path, dataset: Path, count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = json.loads(dataset.read_text(encoding="utf-8"))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(training["seed"])).tolist()
    found: list[list[int]] = []
    for k in order:
        query, response = rows[k]["query"], rows[k]["response"]
        if len(f"{query} {response}") > task["char_limit"]:
            continue
        text = training["query_template"].format(query=query) + response
        found.append(tokenizer(text)["input_ids"][: training["max_seq_length"]])
        if len(found) == count:
            break
    return found


def _synthetic(task: dict[str, Any], training: dict[str, Any], vocabulary: int, count: int) -> list[list[int]]:
    """Random tokens; lengths spread about the mean of the published run."""
    generator = torch.Generator().manual_seed(training["seed"])
    mean = task["mean_tokens_per_step"] / training["batch_size"]
    lengths = (mean + 0.4 * mean * torch.randn(count, generator=generator)).clamp(16, training["max_seq_length"])
    return [torch.randint(3, vocabulary, (int(n),), generator=generator).tolist() for n in lengths]


def _language_batches(
    texts: list[list[int]], training: dict[str, Any], pad: int, device: str, eos: int
) -> Iterator[Batch]:
    """As PEFT's run: batches of texts of similar length, padded; the first padding token is learnt, the others not."""
    size = training["batch_size"]
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    chunks = [order[k : k + size] for k in range(0, len(order) - size + 1, size)]
    shuffled = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(training["seed"])).tolist()
    for k in shuffled:
        rows = [texts[i] for i in chunks[k]]
        width = max(map(len, rows))
        ids = torch.full((size, width), pad)
        mask, labels = torch.zeros(size, width, dtype=torch.long), torch.full((size, width), -100)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
            labels[i, : len(row)] = torch.tensor(row)
            if len(row) < width:
                labels[i, len(row)] = eos
        items = int(mask.sum())
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}

        def loss(model: nn.Module, inputs: dict[str, Tensor] = inputs, items: int = items) -> Tensor:
            return model(**inputs, num_items_in_batch=items).loss

        yield Batch(loss, items + size)


def metamath(options: Options, training: dict[str, Any], steps: int) -> Task:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    task = settings()["metamath"]
    dtype = torch.float32 if options.dry_run else DTYPES[training["dtype"]]
    count = (steps + 1) * training["batch_size"]
    folder = None if options.dry_run else locate(task["model_id"], options.models, "config.json")
    dataset = None
    if folder is not None:
        model_is = f"{task['model_id']}, local weights"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(options.device)
        found = locate(task["dataset_id"], options.models, "MetaMathQA-395K.json", "dataset")
        dataset = None if found is None else found / "MetaMathQA-395K.json"
    else:
        config = {**task["architecture"], **FEWER_LAYERS["metamath"], **(TINY["metamath"] if options.dry_run else {})}
        name = "a tiny Llama" if options.dry_run else "the architecture of Llama-3.2-3B"
        model_is = f"{name}, random weights, {config['num_hidden_layers']} layers"
        model = _random(lambda: LlamaForCausalLM(LlamaConfig(**config)), dtype, options.device, training["seed"])
    if dataset is not None and folder is not None:
        texts, data_is = _texts(task, training, folder, dataset, count), "MetaMathQA, local copy"
    else:
        shape = {**training, "max_seq_length": 32} if options.dry_run else training
        sizes = {**task, "mean_tokens_per_step": 64} if options.dry_run else task
        texts = _synthetic(sizes, shape, model.config.vocab_size, count)
        data_is = "synthetic tokens, lengths about those of MetaMathQA"
    eos = model.config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    batches = _language_batches(texts, training, eos, options.device, eos)

    def finish(adapted: nn.Module) -> None:
        if training["use_gc"]:
            adapted.gradient_checkpointing_enable()

    return Task(model, batches, model_is, data_is, finish)


# ---- FLUX.2-klein ----------------------------------------------------------------------------------------------------


def _positions(batch: int, height: int, width: int, words: int, device: str) -> tuple[Tensor, Tensor]:
    """(img_ids [batch, height width, 4], txt_ids [batch, words, 4]): axes time, height, width, word."""
    one = torch.tensor([0])
    image = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one)
    text = torch.cartesian_prod(one, one, one, torch.arange(words))
    return image.expand(batch, -1, -1).to(device), text.expand(batch, -1, -1).to(device)


def _image_batches(
    config: dict[str, Any], training: dict[str, Any], dtype: torch.dtype, device: str
) -> Iterator[Batch]:
    """Random latents and prompt embeddings. PEFT computes both before its loop: a step never sees an encoder."""
    size, words = training["batch_size"], training["max_sequence_length"]
    side = training["resolution"] // 16  # the autoencoder's 8 times the packing's 2
    generator = torch.Generator().manual_seed(training["seed"])
    image_ids, text_ids = _positions(size, side, side, words, device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    while True:
        latents, noise = (draw(size, side * side, config["in_channels"]) for _ in range(2))
        prompt = draw(size, words, config["joint_attention_dim"])
        sigma = torch.rand(size, generator=generator).to(device, dtype)
        noisy = torch.lerp(latents, noise, sigma[:, None, None])
        inputs = dict(
            hidden_states=noisy, encoder_hidden_states=prompt, timestep=sigma, img_ids=image_ids, txt_ids=text_ids
        )

        def loss(model: nn.Module, inputs: dict[str, Tensor] = inputs, target: Tensor = noise - latents) -> Tensor:
            predicted = model(**inputs, guidance=None, return_dict=False)[0][:, : target.shape[1]]
            return (predicted.float() - target.float()).square().mean()

        yield Batch(loss, size * (side * side + words))


def flux(options: Options, training: dict[str, Any], steps: int) -> Task:
    task = settings()["flux"]
    config = {**task["architecture"], **FEWER_LAYERS["flux"], **(TINY["flux"] if options.dry_run else {})}
    dtype = torch.float32 if options.dry_run else DTYPES[training["dtype"]]
    if options.dry_run:
        training = {**training, "resolution": 64, "max_sequence_length": 8}
    depth = f"random weights, {config['num_layers']} double and {config['num_single_layers']} single blocks"
    folder = None if options.dry_run else locate(task["model_id"], options.models, "transformer/config.json")
    try:
        from diffusers import Flux2Transformer2DModel
    except ImportError:
        from bench.gpu.flux import StandIn

        model_is = f"a stand-in with FLUX.2-klein's linear layers (no diffusers here), {depth}"
        model = _random(lambda: StandIn(**config), dtype, options.device, training["seed"])
    else:
        if folder is not None:
            model_is = f"{task['model_id']}, local weights"
            model = Flux2Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
            config = dict(model.config)
        else:
            model_is = f"the architecture of FLUX.2-klein, {depth}"
            model = _random(lambda: Flux2Transformer2DModel(**config), dtype, options.device, training["seed"])
    model.to(options.device)

    def finish(adapted: nn.Module) -> None:
        adapted.to(options.device)
        if training["use_gc"]:
            adapted.base_model.model.enable_gradient_checkpointing()

    batches = _image_batches(config, training, dtype, options.device)
    return Task(model, batches, model_is, "random latents and prompt embeddings", finish)


TASKS: dict[str, Callable[[Options, dict[str, Any], int], Task]] = {"metamath": metamath, "flux": flux}
