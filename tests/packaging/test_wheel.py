# SPDX-License-Identifier: Apache-2.0
"""One wheel per platform for every Python: its tag, what is in it, and what the library asks of the system."""

import re
import zipfile


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_tag(wheel):
    assert re.fullmatch(r"frodkernels-[^-]+-cp310-abi3-(linux|manylinux).*\.whl", wheel.name), wheel.name


def test_version_has_one_home(wheel, root):
    (version,) = re.findall(r'^__version__ = "(.+)"$', (root / "frodkernels" / "__init__.py").read_text(), re.M)
    assert wheel.name.split("-")[1] == version


def test_holds_every_module_of_the_tree(wheel, root):
    folders = {root / "frodkernels": "frodkernels", root / "triton_kernels": "frodkernels/triton_kernels"}
    expected = {
        f"{inside}/{path.relative_to(folder)}" for folder, inside in folders.items() for path in folder.rglob("*.py")
    }
    found = {name for name in names(wheel) if name.endswith(".py")}
    assert found == expected
    assert "frodkernels/triton_kernels/sparse_core.py" in found


def test_holds_nothing_else(wheel):
    allowed = re.compile(
        r"frodkernels/.*\.py|frodkernels/py\.typed|frodkernels/_C\.abi3\.so|frodkernels-.*\.dist-info/.*"
    )
    assert [name for name in names(wheel) if not allowed.fullmatch(name)] == []


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(path).decode()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.10"]
    assert "Requires-Python: >=3.10" in text
    assert "License-Expression: Apache-2.0" in text


def test_library_needs_no_python_and_no_cuda(library, command):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", command(["readelf", "-d", library]).stdout)
    assert "libtorch_cpu.so" in needed
    unwanted = [name for name in needed if re.match(r"libpython|libtorch_python|libcuda|libcudart|libtorch_cuda", name)]
    assert unwanted == []


def test_library_uses_the_stable_abi_only(library, command):
    lines = command(["nm", "-D", "--undefined-only", library]).stdout.splitlines()
    symbols = [line.split() for line in lines]
    assert [name for _, name in symbols if re.match(r"_?Py[A-Z_]", name)] == []
    # C++ symbols of torch (at::, c10::, torch::) have no stable ABI; every call goes through the C functions.
    assert [name for _, name in symbols if re.match(r"_ZNK?(2at|3c10|5torch)", name)] == []
    assert all(kind == "w" for kind, name in symbols if name.startswith("aoti_torch_get_current_cuda_stream"))


def test_library_names_no_folder_of_the_machine_that_built_it(library, root):
    assert str(root).encode() not in library.read_bytes()


def test_source_distribution_is_complete(root, command, tmp_path):
    import sys
    import tarfile

    code = "import frodkernels_build as b, sys; print(b.build_sdist(sys.argv[1]))"
    command([sys.executable, "-c", code, tmp_path], cwd=root, env=_with_backend(root))
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {
        str(file.relative_to(root))
        for folder in ("csrc", "cmake", "build_backend", "triton_kernels", "frodkernels")
        for file in (root / folder).rglob("*")
        if file.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".typed"}
    }
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= held
    assert not any(name.endswith(".so") for name in held)


def _with_backend(root):
    import os

    return {**os.environ, "PYTHONPATH": str(root / "build_backend")}
