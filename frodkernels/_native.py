# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the native library, once. Nothing here raises: what went wrong is kept and said when an op is called.

The library registers its ops with torch through the stable ABI. It is no Python module, so one file serves every
Python >= 3.10 and every torch >= 2.10; loading it touches neither CUDA nor Triton.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor

DISABLE = "FRODKERNELS_DISABLE_NATIVE"
OLDEST_TORCH = (2, 10)
_OFF = ("", "0", "false", "no", "off")


def library_path() -> Path | None:
    """The native library beside the package, or None where the package was installed without one."""
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    return found[0] if found else None


def _try_to_load() -> str | None:
    """Load the library; None on success, else a sentence that says why not and what to do."""
    if os.environ.get(DISABLE, "").strip().lower() not in _OFF:
        return f"{DISABLE}={os.environ[DISABLE]} switches the native library off; unset it and start again"
    path = library_path()
    if path is None:
        return (
            f"there is no native library (_C*.so) in {Path(__file__).parent}: the package was installed without "
            "compiled code; run `make setup` in a source tree, or install again with a C++ compiler present"
        )
    release = torch.__version__.split("+")[0]
    if tuple(int(part) for part in release.split(".")[:2]) < OLDEST_TORCH:
        return f"{path.name} needs torch >= 2.10 and this is torch {torch.__version__}; upgrade torch"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # OSError from the loader, RuntimeError from registration: both mean "does not fit"
        return (
            f"{path} does not load into torch {torch.__version__}: {error}; it was built for another platform or torch "
            "build, install frodkernels again for this one"
        )
    return None


@functools.cache
def why_not() -> str | None:
    """Why the native library is not loaded and what to do about it, in a sentence; None when it is loaded."""
    return _try_to_load()


def load() -> bool:
    """Load the native library if it is there and fits. Idempotent; never raises; :func:`why_not` has the reason."""
    return why_not() is None


_cuda_reasons: dict[int, str] = {}


def cuda_why_not() -> str | None:
    """Why the current CUDA device cannot run the library's kernels; None when it can, or when there is none to ask."""
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    if index not in _cuda_reasons:
        like = torch.empty(0, device="cuda")
        if isinstance(like, FakeTensor):  # no device to ask, and not an answer to remember
            return None
        reason = torch.ops.frodkernels.native_why_not(like)
        _cuda_reasons[index] = reason and f"the native kernels do not run on {torch.cuda.get_device_name()}: {reason}"
    return _cuda_reasons[index] or None
