# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: against PEFT, the best plain torch, torch.compile of it, LoRA and the GEMM floor.

``python -m bench`` measures and writes ``bench/results/*.csv``, the plots beside them and ``docs/benchmarks.md``;
``pytest bench --benchmark-only`` measures the same groups and reports through pytest-benchmark;
``python -m bench.memory`` measures the peak of memory of a model with HRA;
``python -m bench.calibrate`` measures the constants of the cost model that chooses between FRoD's three paths.
"""
