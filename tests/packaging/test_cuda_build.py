# SPDX-License-Identifier: Apache-2.0
"""The CUDA half of the build: how the toolkit is found, what is compiled for which device, and what happens without."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest


def cuobjdump():
    """Triton brings the tool that lists the device code of a library; a toolkit may do without."""
    if path := shutil.which("cuobjdump"):
        return path
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.is_file() else pytest.skip("no cuobjdump")


def test_library_holds_what_was_asked_for(library, cuda_targets, command):
    real = {target.removesuffix("-real") for target in cuda_targets if target.endswith("-real")}
    virtual = {target.removesuffix("-virtual") for target in cuda_targets if target.endswith("-virtual")}
    assert real and virtual
    listing = command([cuobjdump(), "-lelf", "-lptx", library]).stdout
    assert set(re.findall(r"\.sm_(\w+)\.cubin", listing)) == real
    assert set(re.findall(r"\.sm_(\w+)\.ptx", listing)) == virtual


def test_default_architectures(cuda_targets):
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        pytest.skip("TORCH_CUDA_ARCH_LIST chose others")
    known = ["80", "86", "89", "90", "100", "120"]
    built = [target.removesuffix("-real") for target in cuda_targets if target.endswith("-real")]
    assert built == [arch for arch in known if arch in built]  # an older nvcc may lack the newest
    assert cuda_targets[-1] == f"{built[-1]}-virtual"


def test_native_ops_are_registered_for_cuda(library, cuda_targets, command):
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]);"
        "names = ['native_sparse_core', 'native_sparse_core_backward', 'native_tile_block'];"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print([has('frodkernels::' + name, 'CUDA') for name in names])"
    )
    assert cuda_targets
    assert "[True, True, True]" in command([sys.executable, "-c", code, library]).stdout


@pytest.fixture
def find_toolkit(root, command, tmp_path):
    """Run the search alone; returns what CMake said. `path` is the whole PATH."""
    script = tmp_path / "find.cmake"
    script.write_text(f"include({root / 'cmake' / 'FrodkernelsCuda.cmake'})\n")
    cmake = shutil.which("cmake") or Path(sys.executable).parent / "cmake"

    def find(path="/nowhere", **variables):
        return command([cmake, "-P", script], check=False, env={"PATH": str(path), **variables}).stdout

    return find


@pytest.fixture
def toolkit(tmp_path):
    """A toolkit of one shell script, and a wrapper of its nvcc in another folder, as some machines have on PATH."""
    home = tmp_path / "toolkit"
    for folder in ("bin", "include"):
        (home / folder).mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f"  *--dryrun*) echo '#$ TOP={home}/bin/..' >&2 ;;\n"
        "  *--list-gpu-code*) printf 'sm_80\\nsm_86\\nsm_89\\nsm_90\\n' ;;\nesac\n"
    )
    wrapper = tmp_path / "elsewhere" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    for script in (nvcc, wrapper):
        script.chmod(0o755)
    return home, wrapper


def test_no_toolkit_is_said_and_no_error(find_toolkit):
    said = find_toolkit()
    assert "building the CPU library without CUDA kernels" in said and "no nvcc on PATH" in said
    assert "Error" not in said


def test_a_required_toolkit_that_is_missing_is_an_error(find_toolkit):
    assert "FRODKERNELS_CUDA=1 but no CUDA toolkit was found" in find_toolkit(FRODKERNELS_CUDA="1")


def test_toolkit_from_cuda_home(find_toolkit, toolkit):
    assert f"CUDA toolkit {toolkit[0]}," in find_toolkit(CUDA_HOME=str(toolkit[0]))


def test_cuda_home_that_is_none_is_named(find_toolkit, tmp_path):
    assert f"CUDA_HOME={tmp_path} holds no bin/nvcc" in find_toolkit(CUDA_HOME=str(tmp_path))


@pytest.mark.parametrize("wrapped", [False, True])
def test_toolkit_behind_the_nvcc_on_path(find_toolkit, toolkit, wrapped):
    home, wrapper = toolkit
    assert f"CUDA toolkit {home}," in find_toolkit(wrapper.parent if wrapped else home / "bin")


def test_cuda_can_be_left_out(find_toolkit, toolkit):
    assert "without CUDA kernels: FRODKERNELS_CUDA=0" in find_toolkit(CUDA_HOME=str(toolkit[0]), FRODKERNELS_CUDA="0")


def test_an_older_nvcc_gets_what_it_knows_and_ptx_of_its_newest(find_toolkit, toolkit):
    said = find_toolkit(CUDA_HOME=str(toolkit[0]))
    assert "architectures 80-real;86-real;89-real;90-real;90-virtual" in said
    assert "cannot compile for sm_120" in said


@pytest.mark.parametrize(
    "asked, got",
    [
        ("8.0;9.0+PTX", "80-real;90-real;90-virtual"),
        ("8.6 9.0a", "86-real;90a-real"),
        ("12.0f+PTX", "120f-real;120f-virtual"),
    ],
)
def test_torch_cuda_arch_list(find_toolkit, toolkit, asked, got):
    said = find_toolkit(CUDA_HOME=str(toolkit[0]), TORCH_CUDA_ARCH_LIST=asked)
    assert f"architectures {got}\n" in said


def test_an_unreadable_arch_list_is_an_error(find_toolkit, toolkit):
    assert "cannot read 'Hopper'" in find_toolkit(CUDA_HOME=str(toolkit[0]), TORCH_CUDA_ARCH_LIST="Hopper")
