# SPDX-License-Identifier: Apache-2.0
"""By disassembly: code that runs before, or without, the check for an instruction set does not use it.

One source compiled once per level is a trap: where two object files define the same inline function or template, the
linker keeps one, and the portable entry may end in AVX-512 code. Everything of a level lives in a namespace of its own.
"""

import platform
import re

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="one ISA level on this architecture")

LEVELS = ("portable", "avx2", "avx512", "avx512bf16")
# "DW.ref.": a pointer to the exception personality routine, data that is the same everywhere.
HARMLESS = re.compile(r"^DW\.ref\.")


@pytest.fixture(scope="module")
def functions(library, command):
    """{function: the vector registers it names, as a set of "x", "y", "z"}"""
    text = command(["objdump", "-d", "-C", "--no-show-raw-insn", library]).stdout
    found = {}
    for block in re.split(r"\n\n", text):
        head = re.match(r"[0-9a-f]+ <(.+)>:\n", block.lstrip())
        if head:
            found.setdefault(head.group(1), set()).update(re.findall(r"%([xyz])mm\d", block))
    return found


def of_level(functions, level):
    return {name: registers for name, registers in functions.items() if f"frodkernels::cpu::{level}::" in name}


@pytest.mark.parametrize("level", LEVELS)
def test_level_is_there(functions, level):
    assert len(of_level(functions, level)) > 3


@pytest.mark.parametrize("level, foreign", [("portable", "yz"), ("avx2", "z")])
def test_level_stays_within_its_registers(functions, level, foreign):
    wrong = {name for name, registers in of_level(functions, level).items() if registers & set(foreign)}
    assert wrong == set()


@pytest.mark.parametrize("level, own", [("avx2", "y"), ("avx512", "z"), ("avx512bf16", "z")])
def test_level_uses_its_registers(functions, level, own):
    assert any(own in registers for registers in of_level(functions, level).values())


def test_no_code_outside_the_levels_uses_them(functions):
    """Bindings, dispatch, templates of the standard library, the CUDA runtime: all run on any x86-64."""
    guarded = {name for level in LEVELS[1:] for name in of_level(functions, level)}
    wrong = {name for name, registers in functions.items() if name not in guarded and registers & set("yz")}
    assert wrong == set()


def test_levels_share_no_symbol_with_anything(objects, command):
    """No function or object that two of them define: the linker would keep one for both."""
    assert set(LEVELS) <= set(objects)
    defined = {}
    for level, files in objects.items():
        lines = command(["nm", "--defined-only", *files]).stdout.splitlines()
        fields = [line.split() for line in lines if len(line.split()) == 3]
        defined[level] = {name for _, kind, name in fields if kind in "TWVuDBR" and not HARMLESS.match(name)}
    for level in LEVELS:
        others = set().union(*(names for other, names in defined.items() if other != level))
        assert defined[level] & others == set()
