# SPDX-License-Identifier: Apache-2.0
"""The executor's modules beside one another and beside the library, in one process."""

import re
import subprocess

import pytest
import torch

import frodkernels as fk
from frodkernels import _native as native
from frodkernels.reference import sparse_core as reference
from tests.simt import executor


def case():
    n, T = 6, 40
    pattern = fk.SparsePattern(torch.tensor([0, 1, 1, 5]), torch.tensor([2, 0, 5, 5]), (n, n))
    return torch.randn(n, T), torch.randn(n), torch.randn(4), *pattern.csr


def test_each_module_has_its_own_ops(plain, checker):
    arguments = case()
    expected = reference.sparse_core(*arguments)
    for namespace in (torch.ops.simt, torch.ops.simt_check):
        torch.testing.assert_close(namespace.native_sparse_core(*arguments), expected)
    assert plain.launches() == checker.launches() != {}


def test_the_library_keeps_its_own(plain, checker):
    assert native.load(), native.why_not()
    z, *rest = case()
    expected = reference.sparse_core(z, *rest)
    plain.reset()
    torch.testing.assert_close(torch.ops.frodkernels.native_sparse_core(z, *rest), expected)
    assert plain.launches() == {} and checker.launches() == {}  # the CPU kernels ran, not the executor
    torch.ops.simt.native_sparse_core(z, *rest)
    assert plain.launches() and checker.launches() == {}


def test_only_the_init_functions_are_exported(plain, checker):
    for name in ("_simt", "_simt_check"):
        command = ["nm", "-D", "--defined-only", str(executor.module_path(name))]
        symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert {s for s in symbols[2::3]} == {"PyInit__simt", "PyInit__simt_check", "PyInit__simt_asan"}


def test_kinds(plain, checker):
    assert not plain.checked and checker.checked
    assert plain.sites() == []


def test_without_a_toolkit(monkeypatch, tmp_path):
    monkeypatch.setattr(executor, "FOLDER", tmp_path)
    monkeypatch.setenv("FRODKERNELS_CUDA", "0")
    with pytest.raises(executor.NoToolkit, match="needs the CUDA toolkit's headers: FRODKERNELS_CUDA=0$"):
        executor.build.__wrapped__("_simt")


def test_the_documents_name_tests_that_exist():
    text = (executor.ROOT / "docs" / "executor.md").read_text()
    folder = executor.ROOT / "tests" / "simt"
    defined = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in folder.glob("*.py")), re.MULTILINE))
    for name, ending in re.findall(r"(test_\w+)(\.py|\*)?", text):
        found = (
            (folder / f"{name}.py").exists()
            if ending == ".py"
            else any(test == name or (ending and test.startswith(name)) for test in defined)
        )
        assert found, name
