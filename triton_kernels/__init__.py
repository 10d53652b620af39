# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file per op family; installed as ``frodkernels.triton_kernels``."""
