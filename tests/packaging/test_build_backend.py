# SPDX-License-Identifier: Apache-2.0
"""What a build asks for and what it says when it cannot: torch, a compiler, neither."""

import os
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture
def backend(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "build_backend"))
    monkeypatch.delenv("FRODKERNELS_TORCH_DIR", raising=False)
    monkeypatch.delenv("FRODKERNELS_BUILD_TORCH", raising=False)
    import frodkernels_build

    return frodkernels_build


@pytest.fixture
def no_torch(backend, monkeypatch, tmp_path):
    """An interpreter whose environment has no torch."""
    monkeypatch.setattr(backend.sys, "path", [str(tmp_path)])
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def fake_torch(folder, version):
    header = folder / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder / "torch"


def test_an_installed_torch_is_used(backend):
    torch = sys.modules.get("torch") or __import__("torch")
    assert backend.find_torch() == Path(torch.__file__).parent.resolve()
    assert backend._torch_requirement() == []


def test_torch_behind_isolation_is_found(backend, no_torch, monkeypatch):
    """pip's isolated build runs the environment's interpreter with its site-packages taken off sys.path."""
    monkeypatch.setattr(backend.sys, "path", [])
    assert backend.find_torch() is None
    folder = fake_torch(no_torch, "2.10.0")
    assert backend.find_torch() == folder
    assert backend._torch_requirement() == []


def test_without_torch_a_pinned_one_is_asked_for(backend, no_torch, monkeypatch):
    assert backend._torch_requirement() == [backend.TESTED_TORCH]
    monkeypatch.setenv("FRODKERNELS_BUILD_TORCH", "torch==2.12.1")
    assert backend._torch_requirement() == ["torch==2.12.1"]


def test_a_torch_that_is_too_old_does_not_count(backend, no_torch):
    fake_torch(no_torch, "2.9.1+cu128")
    assert backend.find_torch() is None


def test_torch_by_hand(backend, no_torch, monkeypatch):
    folder = fake_torch(no_torch / "other", "2.11.0")
    monkeypatch.setenv("FRODKERNELS_TORCH_DIR", str(folder))
    assert backend.find_torch() == folder
    monkeypatch.setenv("FRODKERNELS_TORCH_DIR", str(no_torch))
    with pytest.raises(backend.BuildError, match="FRODKERNELS_TORCH_DIR"):
        backend.find_torch()


def setup_py(root, command, *arguments, check=False, **variables):
    return command([sys.executable, "setup.py", *arguments], cwd=root, check=check, env={**os.environ, **variables})


def test_no_compiler_says_what_to_do(root, command):
    done = setup_py(root, command, "--quiet", "build_ext", PATH="/nowhere", CXX="")
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stdout and "FRODKERNELS_NO_NATIVE=1" in done.stdout
    assert "Traceback" not in done.stdout


def test_bad_max_jobs_is_named(root, command):
    assert (
        "MAX_JOBS must be a positive integer, got 'many'"
        in setup_py(root, command, "build_ext", MAX_JOBS="many").stdout
    )


def test_without_native_code_the_wheel_is_pure(root, command, tmp_path):
    build = tmp_path / "build"
    setup_py(root, command, "--quiet", "build", "--build-base", build, "bdist_wheel", "--bdist-dir", tmp_path / "bdist",
             "--dist-dir", tmp_path, check=True, PATH="/nowhere", FRODKERNELS_NO_NATIVE="1")  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_the_editable_install_maps_triton_kernels(root, command, tmp_path):
    code = "import frodkernels.triton_kernels as t; print(t.__path__[0])"
    assert command([sys.executable, "-c", code], cwd=tmp_path).stdout.strip() == str(root / "triton_kernels")


COPY = """
import runpy, sys
from setuptools import Distribution
sys.argv = ["setup.py", "--version"]
command = runpy.run_path("setup.py", run_name="not run")["CMakeBuild"](Distribution())
command.force = False
command.copy_file({!r}, {!r})
"""


def test_a_library_built_in_place_is_replaced_not_written_over(root, command, tmp_path):
    """A process that has it mapped keeps it; what a killed build left does not pass for the new one."""
    built, library = tmp_path / "built.so", tmp_path / "library.so"
    built.write_text("good")
    os.utime(built, (1, 1))
    library.write_text("old")
    (tmp_path / "library.so.new").write_text("half")
    with library.open() as mapped:
        # setuptools sets up logging for all of its process
        command([sys.executable, "-c", COPY.format(str(built), str(library))], cwd=root)
        assert mapped.read() == "old"
    assert library.read_text() == "good"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["built.so", "library.so"]
