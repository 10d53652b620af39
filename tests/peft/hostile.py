# SPDX-License-Identifier: Apache-2.0
"""Run by test_hostile.py in a process of its own: load broken adapter files every way there is.

Prints one JSON object: case -> {"error": type and message, "injected": times, "intact": bool}. PEFT alone would end the
process, or compute nonsense without a word, on most of these files.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.frod import FrodModel
from safetensors.torch import load_file, save_file

import frodkernels as fk
from tests.peft.files import FILE, add, contents, put, remake, same, structure
from tests.peft.models import Tiny, frod, x

UP, DOWN = "base_model.frod_s_indices.up", "base_model.frod_s_indices.down"
LAMBDA = "base_model.model.blocks.1.up.frod_lambda_l"
VALUES = "base_model.model.blocks.0.down.frod_lambda_s_values"


def _duplicate(state):
    state[UP][:, 5] = state[UP][:, 2]


def _drop_projections(state):
    for key in [k for k in state if k.startswith("base_model.frod_")]:
        del state[key]


def _without_layers(change):
    """The file says nothing of the layers of "up"; what it says of their projections must hold all the same."""

    def both(state):
        for key in [key for key in state if ".up.frod_lambda" in key]:
            del state[key]
        change(state)

    return both


def _of_twenty(state):
    state["base_model.frod_V.up"] = torch.eye(20)
    state["base_model.frod_s_size.up"] = torch.tensor([20, 20])
    state[UP] = state[UP][:, (state[UP] < 20).all(0)].contiguous()


def _only_an_index(state):
    del state["base_model.frod_V.up"], state["base_model.frod_s_size.up"]
    state[UP][0, 3] = 10**6


BASE, HEAD = "base_model.model.blocks.0.up.base_layer.weight", "base_model.model.head.weight"

# name -> (what is done to a good file, what the message must name)
FILES = {
    "row of n": (put(UP, 0, 3, value=24), [UP, "rows[3] = 24"]),
    "row past the end": (put(UP, 0, 3, value=70), [UP, "rows[3] = 70"]),
    "row of -1": (put(UP, 0, 0, value=-1), [UP, "rows[0] = -1"]),
    "row of -5000": (put(DOWN, 0, 0, value=-5000), [DOWN, "rows[0] = -5000"]),
    "row of 1e6": (put(UP, 0, 7, value=10**6), [UP, "rows[7] = 1000000"]),
    "column of 2^40": (put(UP, 1, 7, value=2**40), [UP, "cols[7] = 1099511627776"]),
    "smallest column": (put(UP, 1, 7, value=-(2**63)), [UP, "cols[7]"]),
    "duplicate": (_duplicate, [UP, "duplicates"]),
    "huge size": (remake("base_model.frod_s_size.up", lambda t: torch.tensor([2**20, 2**20])), ["frod_s_size.up"]),
    "size of another category": (
        remake("base_model.frod_s_size.up", lambda t: torch.tensor([40, 40])),
        ["frod_s_size.up", "40 x 40", "24 x 24"],
    ),
    "negative size": (put("base_model.frod_s_size.down", 0, value=-40), ["frod_s_size.down"]),
    "size of three": (remake("base_model.frod_s_size.up", lambda t: torch.tensor([24, 24, 1])), ["frod_s_size.up"]),
    "fractional size": (remake("base_model.frod_s_size.up", lambda t: t.float()), ["frod_s_size.up", "integers"]),
    "short values": (remake(VALUES, lambda t: t[:-1]), [VALUES, "159"]),
    "long values": (remake(VALUES, lambda t: torch.cat([t, t])), [VALUES, "320"]),
    "short indices": (remake(UP, lambda t: t[:, :-2]), [UP, "55", "57"]),
    "three rows of indices": (remake(UP, lambda t: torch.cat([t, t[:1]])), [UP, "[2, nnz]"]),
    "flat indices": (remake(UP, lambda t: t.flatten()), [UP, "[2, nnz]"]),
    "float indices": (remake(UP, lambda t: t.float()), [UP, "integer"]),
    "half indices": (remake(UP, lambda t: t.half()), [UP, "integer"]),
    "boolean indices": (remake(UP, lambda t: t > 3), [UP, "integer"]),
    "complex lambda": (remake(LAMBDA, lambda t: t.to(torch.complex64)), [LAMBDA, "complex64"]),
    "integer lambda": (remake(LAMBDA, lambda t: t.long()), [LAMBDA, "int64"]),
    "short lambda": (remake(LAMBDA, lambda t: t[:-1]), [LAMBDA, "[24]"]),
    "flat V": (remake("base_model.frod_V.up", lambda t: t[:, :-1]), ["frod_V.up", "square"]),
    "V of another size": (remake("base_model.frod_V.up", lambda t: t[:20, :20]), ["frod_V.up", "20 x 20", "24"]),
    "integer V": (remake("base_model.frod_V.up", lambda t: t.long()), ["frod_V.up", "int64"]),
    "NaN in V": (put("base_model.frod_V.up", 2, 3, value=float("nan")), ["frod_V.up", "finite"]),
    "no projections": (_drop_projections, ["projection"]),
    "no V": (lambda state: state.pop("base_model.frod_V.down"), ["frod_V.down", "missing"]),
    "no indices": (lambda state: state.pop(UP), [UP, "missing"]),
    "no lambda": (lambda state: state.pop(LAMBDA), [LAMBDA, "missing"]),
    "no values": (lambda state: state.pop(VALUES), [VALUES, "missing"]),
    "no layers": (_without_layers(lambda state: None), [".up.frod_lambda", "missing"]),
    "no layers, another size": (_without_layers(_of_twenty), ["frod_V.up", "20 x 20", "24"]),
    "no layers, short indices": (_without_layers(remake(UP, lambda t: t[:, :3])), [UP, "3 entries", "57"]),
    "no layers, only an index": (_without_layers(_only_an_index), ["frod_V.up", "missing"]),
    "lambda of a named adapter": (add(LAMBDA + ".default", torch.ones(3)), [LAMBDA + ".default", "no such FRoD"]),
    "U": (add(LAMBDA.replace("lambda_l", "U"), torch.ones(3)), ["blocks.1.up.frod_U"]),
    "layer out of nowhere": (add(LAMBDA.replace("1", "7"), torch.ones(24)), ["blocks.7.up.frod_lambda_l"]),
    "category out of nowhere": (add("base_model.frod_V.side", torch.eye(3)), ["frod_V.side"]),
    "base weight": (add(BASE, torch.zeros(40, 24)), [BASE, "overwrite the base model"]),
    "base weight of another shape": (add(BASE, torch.zeros(40, 3)), [BASE, "overwrite the base model"]),
    "base bias": (add(BASE.replace("weight", "bias"), torch.zeros(40)), ["up.base_layer.bias"]),
    "head": (add(HEAD, torch.zeros(3, 24)), [HEAD, "overwrite the base model"]),
    "another adapter's lambda": (add(LAMBDA + ".other", torch.ones(24)), [LAMBDA + ".other"]),
    "unknown": (add("surprise", torch.ones(1)), ["surprise"]),
}


def outcome(run, is_intact):
    """What ``run`` raises, how often it got as far as injecting an adapter, and whether it left no trace."""
    original, injected = FrodModel.inject_adapter, []

    def inject_adapter(self, *args, **kwargs):
        injected.append(1)
        return original(self, *args, **kwargs)

    message = None
    FrodModel.inject_adapter = inject_adapter
    try:
        run()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    finally:
        FrodModel.inject_adapter = original
    return {"error": message, "intact": bool(is_intact()), "injected": len(injected)}


def from_pretrained(path, dtype):
    base = Tiny().to(dtype)
    before, state, want = structure(base), contents(base), base(x(dtype=dtype))
    flags = [p.requires_grad for p in base.parameters()]

    def run():
        with fk.peft.enabled():
            PeftModel.from_pretrained(base, path)

    def is_intact():
        return (
            structure(base) == before
            and same(contents(base), state)
            and flags == [p.requires_grad for p in base.parameters()]
            and torch.equal(base(x(dtype=dtype)), want)
        )

    return outcome(run, is_intact)


def into_live(path, dtype, accelerated):
    model = frod(Tiny().to(dtype))
    if accelerated:
        fk.peft.accelerate(model)
    model.train()
    before, state, want = structure(model), contents(model), model(x(dtype=dtype))
    with torch.no_grad():
        evaluated = model.eval()(x(dtype=dtype))
    model.train()
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]

    def run():
        with fk.peft.enabled():
            model.load_adapter(path, "bad")

    def is_intact():
        ok = structure(model) == before and same(contents(model), state) and list(model.peft_config) == ["default"]
        ok = ok and model.active_adapters == ["default"] and torch.equal(model(x(dtype=dtype)), want)
        ok = ok and flags == [(n, p.requires_grad) for n, p in model.named_parameters()]
        with torch.no_grad():
            ok = ok and torch.equal(model.eval()(x(dtype=dtype)), evaluated)
        model.train().add_adapter("bad", model.peft_config["default"])  # the name is free
        return ok

    return outcome(run, is_intact)


def accelerate_after_plain_peft(path, dtype):
    """None where PEFT itself refuses the file."""
    try:
        model = PeftModel.from_pretrained(Tiny().to(dtype), path)
    except (RuntimeError, ValueError):
        return None
    before, state = structure(model), contents(model)
    return outcome(
        lambda: fk.peft.accelerate(model), lambda: structure(model) == before and same(contents(model), state)
    )


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.float32, torch.bfloat16):
            good = Path(folder) / str(dtype)
            frod(Tiny().to(dtype)).save_pretrained(good)
            tensors = load_file(good / FILE)
            for name, (change, _) in FILES.items():
                state = {key: tensor.clone() for key, tensor in tensors.items()}
                change(state)
                save_file(state, good / FILE, metadata={"format": "pt"})
                case = f"{name}, {str(dtype).removeprefix('torch.')}"
                results[f"from_pretrained: {case}"] = from_pretrained(good, dtype)
                results[f"load_adapter, plain: {case}"] = into_live(good, dtype, False)
                results[f"load_adapter, fast: {case}"] = into_live(good, dtype, True)
                results[f"accelerate: {case}"] = accelerate_after_plain_peft(good, dtype)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
