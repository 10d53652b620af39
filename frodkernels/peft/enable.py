# SPDX-License-Identifier: Apache-2.0
"""enable / disable / enabled: make every model that PEFT builds or loads fast, and its loading safe.

The only code that touches anything global: while enabled, PEFT's table of tuners names our FRoD, HRA and SHiRA
tuners, and three methods of PeftModel (from_pretrained, load_adapter, add_adapter) check such a file before they inject
it, undo a failed load, and swap what was loaded (FRoD's U is corrected then). ``disable()`` puts the originals back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from frodkernels.peft._require import require_peft

_lock = threading.RLock()
_switched_on = False  # by enable()
_blocks = 0  # open enabled() blocks
_undo: list[tuple[Any, str, Any, Any]] | None = None  # (owner, name, original, ours) while in force


def enable() -> None:
    """From now on every FRoD, HRA or SHiRA model that PEFT makes or loads in this process is fast.

    Undone by :func:`disable`.

    Raises:
        ImportError: PEFT is not installed.
    """
    global _switched_on
    require_peft()
    with _lock:
        _switched_on = True
        _update()


def disable() -> None:
    """Undo :func:`enable`. Models made meanwhile stay fast; ``restore(model)`` changes those."""
    global _switched_on
    require_peft()
    with _lock:
        _switched_on = False
        _update()


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """:func:`enable` for a block. Models made inside stay fast after it.

    Raises:
        ImportError: PEFT is not installed.
    """
    global _blocks
    require_peft()
    with _lock:
        _blocks += 1
        _update()
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            _update()


def _update() -> None:
    """Bring PEFT's state in line with what was asked for."""
    global _undo
    wanted = _switched_on or _blocks > 0
    if wanted == (_undo is not None):
        return
    if wanted:
        from frodkernels.peft.hooks import install

        _undo = install()
    else:
        from frodkernels.peft.hooks import uninstall

        assert _undo is not None
        uninstall(_undo)
        _undo = None
