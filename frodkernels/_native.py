# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled library."""


def load() -> bool:
    return False


def why_not() -> str | None:
    return "not built"
