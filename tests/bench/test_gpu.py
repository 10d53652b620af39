# SPDX-License-Identifier: Apache-2.0
"""bench.gpu: the dry run as a whole, and what its stages do on a GPU as far as that can be acted out without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench._interleave import Contestant
from bench.gpu import clock, groups, launches, machine, micro, sanitizer, shapes, tasks, tests, training
from bench.gpu import report as reports
from bench.gpu.__main__ import STAGES
from bench.gpu.stage import Options, Unavailable

ROOT = Path(__file__).resolve().parents[2]
DRY = Options(dry_run=True, device="cpu")


def silent(text: str) -> None:
    pass


def tool(folder: Path, name: str, text: str) -> None:
    """An executable that is found first on PATH."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def path_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_dry_run(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    path = tmp_path / "report.md"
    line = [sys.executable, "-m", "bench.gpu", "--dry-run", "--output", str(path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    report = reports.load(path)
    assert tuple(report["stages"]) == STAGES
    text = path.read_text(encoding="utf-8")
    assert "Dry run on a CPU: no number in this file is a result" in text
    assert "Dry run, CPU, not a result" in text and "could not be written" not in text and "no verdict" not in text
    rows = [row for one in report["stages"]["micro"].values() for row in one["data"]["rows"]]
    assert {row["impl"] for row in rows} >= {"auto", "native", "triton", "peft", "dense:once", "torch:csr", "floor"}
    assert all(row["status"] == "ok" and row["device"] == "cpu" for row in rows)
    runs = report["stages"]["training"]
    assert {name for name in runs if runs[name]["status"] == "ok"} >= {
        f"{task}/{what}" for task in ("metamath", "flux") for what in ("lora/PEFT", "frod/PEFT", "frod/frodkernels")
    }
    for task in ("metamath", "flux"):
        slow, fast = (runs[f"{task}/frod/{layers}"]["data"] for layers in ("PEFT", "frodkernels"))
        assert fast["swapped"] > 0 and fast["trainable"] == slow["trainable"]
        assert slow["losses"] == pytest.approx(fast["losses"], abs=1e-4)
        # it trained: another adapter on the same model and data has another loss by now
        assert slow["losses"][0] == pytest.approx(runs[f"{task}/lora/PEFT"]["data"]["losses"][0], abs=1e-4)
        assert abs(slow["losses"][-1] - runs[f"{task}/lora/PEFT"]["data"]["losses"][-1]) > 1e-6


# ---- PEFT's settings -------------------------------------------------------------------------------------------------


def adapters() -> list:
    return list(_adapters())


def _adapters():
    for name, task in tasks.settings().items():
        for experiment, given in task["experiments"].items():
            yield pytest.param(name, given["adapter"], given.get("published"), id=f"{name}-{experiment}")


@pytest.mark.parametrize("task, adapter, published", adapters())
def test_peft_accepts_the_settings(task, adapter, published):
    peft = pytest.importorskip("peft")
    config = peft.get_peft_config(dict(adapter))
    kinds = {"LORA": peft.LoraConfig, "FROD": peft.FrodConfig, "HRA": peft.HRAConfig}
    assert type(config) is kinds[adapter["peft_type"]]
    for name, value in adapter.items():
        kept = getattr(config, name)
        kept = sorted(kept) if isinstance(kept, set) else kept
        assert kept == (sorted(value) if isinstance(value, list) else value), name


def _meta(task: str) -> torch.nn.Module:
    config = tasks.settings()[task]["architecture"]
    with torch.device("meta"):
        if task == "flux":
            from bench.gpu.flux import StandIn

            return StandIn(**config)
        transformers = pytest.importorskip("transformers")
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


@pytest.mark.parametrize("task, adapter, published", [p for p in adapters() if p.values[2]])
def test_architecture_and_settings_give_the_published_number_of_parameters(task, adapter, published):
    targets = adapter["target_modules"] or ["q_proj", "v_proj"]  # PEFT's own choice for Llama
    found = 0
    for name, module in _meta(task).named_modules():
        if isinstance(module, torch.nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets):
            n = module.in_features
            found += n + int(n * n * adapter["sparse_rate"]) if adapter["peft_type"] == "FROD" else n * adapter["r"]
    assert found == published["trainable"]


def test_the_llama_is_the_published_one():
    assert sum(p.numel() for p in _meta("metamath").parameters()) == tasks.settings()["metamath"]["parameters"]


@pytest.mark.parametrize("folder", ["org/name", "name", "models--org--name/snapshots/abc"])
def test_local_models_are_found(tmp_path, folder):
    assert tasks.locate("org/name", str(tmp_path), "config.json") is None
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text("{}")
    assert tasks.locate("org/name", str(tmp_path), "config.json") == tmp_path / folder


def test_language_batches_are_padded_and_masked():
    texts = [[5] * length for length in (3, 9, 4, 8)]
    batches = list(tasks._language_batches(texts, {"batch_size": 2, "seed": 0}, pad=2, device="cpu", eos=2))
    assert sorted(batch.tokens for batch in batches) == [9, 19]  # two texts of like length, and an end for each

    def loss(**inputs):
        seen.append(inputs)
        return types.SimpleNamespace(loss=torch.zeros(()))

    seen: list[dict] = []
    for batch in batches:
        batch.loss(loss)
    short = min(seen, key=lambda inputs: inputs["input_ids"].shape[1])
    assert short["input_ids"].tolist() == [[5, 5, 5, 2], [5, 5, 5, 5]]
    assert short["labels"].tolist() == [[5, 5, 5, 2], [5, 5, 5, 5]]
    assert short["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


# ---- microbenchmarks -------------------------------------------------------------------------------------------------


def test_the_jobs_cover_what_is_promised():
    jobs = shapes.jobs()
    assert len({job.id for job in jobs}) == len(jobs)
    sizes = {(job.shape.T, job.shape.n, job.shape.nnz) for job in jobs if job.op == "sparse_core"}
    assert {(8192, 4096, 167_772), (4608, 9216, 849_346)} <= sizes
    assert {job.dtype for job in jobs} == {"bfloat16", "float16", "float32"}
    assert {job.mode for job in jobs} == {"forward", "backward", "transpose", "parameters", "step"}
    assert {0.005, 0.01, 0.1} <= {job.shape.rate for job in jobs if job.op == "sparse_core"}
    reflections = {(job.shape.T, job.shape.n, job.shape.rank) for job in jobs if job.op == "householder"}
    assert {(8192, 4096, 8), (8192, 4096, 32)} <= reflections
    assert 0 < len(shapes.jobs(quick=True)) < len(jobs) / 3
    assert {job.id for job in shapes.jobs(quick=True)} <= {job.id for job in jobs}


@pytest.mark.parametrize("op", ["householder", "hra_linear"])
def test_reflections_are_measured_with_each_backend(op):
    (job,) = [job for job in shapes.jobs(dry_run=True) if job.op == op]
    found = micro.run(job.id, DRY, silent)
    rows = {row["impl"]: row for row in found["data"]["rows"]}
    assert found["status"] == "ok", found
    assert {"auto", "native", "triton", "torch", "floor"} <= set(rows)
    assert all(float(rows[name]["ms"]) > 0 for name in ("auto", "native", "torch", "floor"))
    assert "r=3" in micro.render({job.id: found})


@pytest.mark.parametrize("mode", ["forward", "transpose", "parameters", "backward"])
def test_a_wrong_answer_gets_no_time(mode, monkeypatch):
    right = groups._ours
    monkeypatch.setattr(groups, "_ours", lambda case, mode: _scaled(right(case, mode)))
    job = next(job for job in shapes.jobs(dry_run=True) if job.mode == mode)
    found = micro.run(job.id, DRY, silent)
    rows = {row["impl"]: row for row in found["data"]["rows"]}
    assert found["status"] == "failed" and rows["auto"]["status"].startswith("wrong answer") and not rows["auto"]["ms"]
    assert rows["torch:dense"]["status"] == "ok" and float(rows["torch:dense"]["ms"]) > 0


def _scaled(made: Contestant) -> Contestant:
    answers = made.answers
    assert answers is not None
    made.answers = lambda: {name: 1.01 * t for name, t in answers().items()}
    return made


def test_who_killed_a_process_is_left_out_and_named():
    job = shapes.jobs(dry_run=True)[0]
    marks: list[str] = []
    found = micro.run(
        job.id, Options(dry_run=True, device="cpu", excluded={job.id: {"native": "killed it"}}), marks.append
    )
    rows = {row["impl"]: row for row in found["data"]["rows"]}
    assert "killed it" in rows["native"]["status"] and not rows["native"]["ms"]
    assert found["status"] == "failed"
    assert "native" not in marks and {"auto", "floor", "dense:once"} <= set(marks)
    assert "killed it" in micro.render({job.id: found})


def test_the_contestant_that_breaks_the_device_is_the_one_marked(monkeypatch):
    broken: list[str] = []

    def synchronize() -> None:
        if broken:
            raise RuntimeError("an illegal memory access was encountered")

    right = groups._kernel

    def faulty(case, mode, tiled):
        made = right(case, mode, tiled)
        answers = made.answers
        made.answers = lambda: (broken.append("now"), answers())[1]
        return made

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", synchronize)
    monkeypatch.setattr("bench._interleave._peak", lambda contestant: None)
    monkeypatch.setattr(groups, "_kernel", faulty)
    marks: list[str] = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        micro.run(shapes.jobs(dry_run=True)[0].id, DRY, marks.append)
    assert marks == ["floor", "auto", "native"]
    broken.clear()
    monkeypatch.setattr(groups, "_kernel", right)
    micro.run(shapes.jobs(dry_run=True)[0].id, DRY, marks.append)
    assert marks[-1] == "the timed rounds"


def test_the_device_clock(monkeypatch):
    """Spin, flush, event, call, event: in this order; the spin follows what queueing took."""
    log: list[object] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 2.5

    properties = types.SimpleNamespace(L2_cache_size=50 << 20, clock_rate=1_000_000)
    for name, fake in {
        "Event": Event,
        "synchronize": lambda: None,
        "_sleep": log.append,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(clock, "GPU_FLUSH", 1 << 20)
    made = clock.DeviceClock("cpu")
    assert made._flush.nbytes >= 3 * properties.L2_cache_size

    def run(state):
        log.append(state)

    assert made(run, "first") == 2.5e-3 and made(run, "second") == 2.5e-3
    spins = [entry for entry in log if isinstance(entry, int)]
    assert [entry if isinstance(entry, str) else "spin" for entry in log] == [
        "spin", "event", "first", "event", "wait", "spin", "event", "second", "event", "wait",
    ]  # fmt: skip
    assert spins[0] > spins[1] > 0  # the host was quicker than feared


# ---- tools that only a GPU machine has -------------------------------------------------------------------------------


def test_nvidia_smi_is_asked_again_without_unknown_fields(path_folder):
    answer = """
query = next((a for a in sys.argv if a.startswith("--query-gpu=")), None)
if query is None:
    print("1234, 500 MiB")
elif "mig.mode" in query:
    print('Field "mig.mode.current" is not a valid field to query.')
    sys.exit(2)
else:
    print("name, driver_version"); print("Some GPU, 999.1")"""
    tool(path_folder, "nvidia-smi", answer)
    found = machine.run("nvidia-smi", Options(), silent)
    assert found["data"]["gpus"] == [{"name": "Some GPU", "driver_version": "999.1"}]
    assert "999.1" in found["summary"] and "times are noisy" in found["summary"]


def test_the_gpu_is_described(monkeypatch):
    names = dict(
        name="Some GPU", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, L2_cache_size=50 << 20
    )
    for name, fake in {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: types.SimpleNamespace(**names),
        "mem_get_info": lambda index: (70 << 30, 80 << 30),
        "is_bf16_supported": lambda: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    found = machine.run("gpu", Options(), silent)
    assert found["summary"] == "Some GPU, sm_90, 132 SMs, 80.0 GiB (70.0 free), L2 50 MiB"
    json.dumps(found)


SAYS = {
    "memcheck": ("========= ERROR SUMMARY: 0 errors", 0, "ok"),
    "racecheck": ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 77, "failed"),
    "initcheck": ("========= Invalid read\n========= ERROR SUMMARY: 1 error", 77, "failed"),
    "synccheck": ("========= Error: Device not supported.", 1, "unavailable"),
}


@pytest.mark.parametrize("name", sanitizer.TOOLS)
def test_the_sanitizers_verdict_is_read(path_folder, name):
    text, status, verdict = SAYS[name]
    tool(path_folder, "compute-sanitizer", f"assert {name!r} in sys.argv\nprint({text!r})\nsys.exit({status})")
    found = sanitizer.run(name, Options(), silent)
    assert found["status"] == verdict
    assert found["data"]["lines"] == text.splitlines()


def test_without_a_sanitizer_it_is_unavailable(monkeypatch):
    monkeypatch.setattr(sanitizer, "find_tool", lambda: None)
    with pytest.raises(Unavailable, match="CUDA toolkit"):
        sanitizer.run("memcheck", Options(), silent)


@pytest.mark.parametrize("forgotten", [False, True])
def test_kernels_that_were_not_launched_are_found(monkeypatch, forgotten):
    declared = sorted(launches.declared_kernels())
    assert declared, "no __global__ function found in csrc/cuda"
    ran = "\n".join(f"kernel void frodkernels::cuda::{name}<float>(int)" for name in declared[forgotten:])
    code = f"print('''{ran}\ncalls 7\nuncovered ''')"
    monkeypatch.setattr(sanitizer, "script", lambda device, *more: [sys.executable, "-c", code])
    found = sanitizer.run("launches", Options(), silent)
    assert found["status"] == ("failed" if forgotten else "ok")
    assert found["data"]["missed"] == declared[:forgotten]


def test_every_global_function_is_declared_once_to_the_stage():
    sources = (ROOT / "csrc" / "cuda").glob("*.cu*")
    code = "\n".join(line.split("//")[0] for path in sources for line in path.read_text().splitlines())
    assert code.count("__global__") == len(launches.declared_kernels())


def test_every_native_operator_is_launched():
    assert launches.native_ops("cpu") and not launches.uncovered("cpu") and not launches.uncovered("cuda")


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_pytests_results_are_read(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip('no such thing')\ndef test_c(): pass\n@pytest.fixture\ndef f(): 1/0\ndef test_d(f): pass\n"
    )
    junit = tmp_path / "junit.xml"
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={junit}", "test_it.py"]
    subprocess.run(line, cwd=tmp_path, capture_output=True, timeout=120)
    found = tests.read_junit(junit)
    assert (found["tests"], found["failures"], found["errors"], found["skipped"]) == (4, 1, 1, 1)
    assert [name.split("::")[1] for name, _ in found["failed"]] == ["test_b", "test_d"]
    assert found["skips"] == {"no such thing": 1}


def test_the_files_of_the_test_stage_exist():
    for arguments, _, _ in (*tests.RUNS.values(), *tests.DRY_RUNS.values()):
        assert (ROOT / arguments[0]).exists(), arguments[0]


def test_training_items_are_processes_of_their_own():
    items = training.items(Options())
    assert {item.id for item in items} >= {"metamath/frod/PEFT", "metamath/frod/frodkernels", "flux/hra/PEFT"}
    assert all(item.alone for item in items)
