# SPDX-License-Identifier: Apache-2.0
"""PEP 517 backend: setuptools, plus the one thing static metadata cannot say about torch.

The native library needs torch's headers and import libraries at build time. It uses the stable ABI only, so the
torch it is compiled against does not matter to the torch it will run with (any >= 2.10). A plain `torch` build
requirement would make an isolated build download the newest torch with gigabytes of CUDA packages, although the
environment it installs into has a torch already. So torch is asked for only where none can be found:

1. `FRODKERNELS_TORCH_DIR`: the folder of a torch package (the one holding include/ and lib/);
2. a torch on the interpreter's path (builds without isolation);
3. a torch in the site-packages of the interpreter that runs the isolated build (pip keeps the target's interpreter);
4. otherwise the requirement in `FRODKERNELS_BUILD_TORCH` (default: the release that the project is tested with).
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the hooks that need nothing of ours)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

TESTED_TORCH = "torch==2.13.0"
OLDEST_TORCH = (2, 10)


class BuildError(Exception):
    """What the user has to change; shown without a traceback."""


def flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in {"1", "on", "true", "yes"}


def pure_python() -> bool:
    return flag("FRODKERNELS_NO_NATIVE")


def torch_version(folder: Path) -> str | None:
    """The version of a torch package, read from its source: importing torch would take seconds and may touch CUDA."""
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"""__version__\s*=\s*['"]([^'"]+)""", text)
    return found.group(1) if found else None


def usable_torch(folder: Path) -> bool:
    version = torch_version(folder)
    if version is None or not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        return False
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= OLDEST_TORCH


def find_torch() -> Path | None:
    """The folder of a torch package with headers, or None. Nothing is imported."""
    if explicit := os.environ.get("FRODKERNELS_TORCH_DIR"):
        folder = Path(explicit).resolve()
        if not usable_torch(folder):
            raise BuildError(f"FRODKERNELS_TORCH_DIR={explicit} is not a torch >= 2.10 package with headers")
        return folder
    # sys.path first: that is the environment the build asked for. sysconfig names the site-packages of this
    # interpreter even where pip's isolation has taken them off sys.path.
    for place in [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]:
        spec = importlib.machinery.PathFinder.find_spec("torch", [place or os.getcwd()])
        for found in (spec.submodule_search_locations or []) if spec else []:
            if usable_torch(Path(found)):
                return Path(found).resolve()
    return None


def _torch_requirement() -> list[str]:
    if pure_python() or find_torch() is not None:
        return []
    wanted = os.environ.get("FRODKERNELS_BUILD_TORCH", TESTED_TORCH)
    print(f"frodkernels: no torch >= 2.10 with headers found; the build asks for {wanted} (FRODKERNELS_BUILD_TORCH)")
    return [wanted]


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_requirement()]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools copies into build/lib* and never removes: a module deleted since the last build would ship again.
    # CMake's own folder under build/ stays, so a second build is incremental.
    for stale in [*Path("build").glob("lib*"), *Path("build").glob("bdist.*")]:
        shutil.rmtree(stale, ignore_errors=True)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
