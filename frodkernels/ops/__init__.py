# SPDX-License-Identifier: Apache-2.0
"""Registered operators (``torch.ops.frodkernels``): one module per family, imported here so that they exist."""

from frodkernels.ops import householder, reflections, sampled, sparse_core

__all__ = ["householder", "reflections", "sampled", "sparse_core"]
