# SPDX-License-Identifier: Apache-2.0
"""One wheel, built from this tree, and one fresh environment that holds it, for every test of the packaging."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(next(path for path in sys.path if (Path(path) / "torch").is_dir()))
ABSENT = ("triton", "peft", "transformers", "accelerate", "frodkernels", "__editable__")


def run(command, *, check=True, **options):
    """Run a command, its output merged; on failure the test shows that output."""
    done = subprocess.run(
        [str(part) for part in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    assert done.returncode == 0 or not check, done.stdout
    return done


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def command():
    return run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel as a user builds it, reusing the object files of the last build of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", folder], cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def library(unpacked):
    return unpacked / "frodkernels" / "_C.abi3.so"


@pytest.fixture(scope="session")
def cuda_targets(library):
    """The architectures the library says it was built for, in CMake's words; skips where there are none."""
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.frodkernels.native_build_info())"
    info = dict(item.split("=", 1) for item in run([sys.executable, "-c", code, library]).stdout.strip().split("; "))
    if info["cuda"] == "none":
        pytest.skip("built without a CUDA toolkit")
    return info["cuda_targets"].split()


@pytest.fixture(scope="session")
def objects(library):
    """Object files by ISA level, and those of everything else under "shared"."""
    folder = max((ROOT / "build").glob("cmake-*"), key=lambda path: (path / "_C.abi3.so").stat().st_mtime)
    groups = {"shared": []}
    for path in (folder / "CMakeFiles").rglob("*.o"):
        part = path.relative_to(folder / "CMakeFiles").parts[0]
        level = part.removeprefix("frodkernels_cpu_").removesuffix(".dir") if "_cpu_" in part else "shared"
        if part.startswith("frodkernels_"):
            groups.setdefault(level, []).append(path)
    return groups


class Environment:
    """A fresh virtual environment with the wheel and torch, without compiler, Triton or PEFT."""

    def __init__(self, folder, wheel):
        run([sys.executable, "-m", "venv", "--without-pip", folder])
        self.python = folder / "bin" / "python"
        # torch is several hundred megabytes: link it and what it imports instead of installing it once more.
        linked = folder / "linked"
        linked.mkdir()
        for entry in SITE.iterdir():
            if not entry.name.lower().startswith(ABSENT) and entry.suffix != ".pth":
                (linked / entry.name).symlink_to(entry)
        site = next((folder / "lib").glob("python3*")) / "site-packages"
        (site / "linked.pth").write_text(f"{linked}\n")
        # --ignore-installed: pip sees the linked packages, and must not take anything there for an older frodkernels.
        run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel],
            env=self.variables())  # fmt: skip
        self.package = site / "frodkernels"
        self.folder = folder

    def variables(self, **extra):
        kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
        return {**kept, "PATH": str(self.python.parent) if hasattr(self, "python") else "", **extra}

    def run(self, code, *, check=True, **extra):
        """Run Python code away from the source tree; `extra` are environment variables."""
        return run([self.python, "-c", code], check=check, cwd=self.folder, env=self.variables(**extra))


@pytest.fixture(scope="session")
def environment(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("fresh") / "venv", wheel)
