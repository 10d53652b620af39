# SPDX-License-Identifier: Apache-2.0
"""The definitions: plain, differentiable PyTorch that says what each op means, on any device."""
