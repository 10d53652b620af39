# SPDX-License-Identifier: Apache-2.0
"""Differentiable functions: one module per op family."""
