# SPDX-License-Identifier: Apache-2.0
"""Figures of the GPU kernels that need no GPU: ``python -m bench.kernels`` (``make kernels``) prints them as JSON.

Static figures come from the compiled kernels (``static``), counts from the executor's checker, which runs the real
launches on the CPU (``counts``). ``docs/kernels.md`` tells how to read them.
"""
