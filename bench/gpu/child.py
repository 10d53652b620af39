# SPDX-License-Identifier: Apache-2.0
"""The child process: does the items of one stage in turn and writes what happens to a file, line by line.

    python -m bench.gpu.child JOB.json EVENTS.jsonl

Events: {"begin": item, "log": where its output begins}, {"mark": text}, {"end": item, "record": {...}}. An exception
in an item is its record; so is a device that no longer answers afterwards (a kernel's fault is sticky), and then the
process ends, for nothing that follows in it could be trusted.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any

from bench.gpu.stage import FAILED, UNAVAILABLE, Options, Record, Unavailable, record

POISONED = 86  # exit status: the device is lost to this process


def _tell(events: IO[str], **event: Any) -> None:
    events.write(json.dumps(event, default=str) + "\n")
    events.flush()


def device_fault() -> str | None:
    """What is wrong with the CUDA context of this process; None where it works or was never made."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError as fault:
        return str(fault).strip().splitlines()[0]
    return None


def do(module: Any, item: str, options: Options, events: IO[str]) -> Record:
    try:
        return module.run(item, options, lambda text: _tell(events, mark=text))
    except Unavailable as reason:
        return record(UNAVAILABLE, str(reason))
    except Exception as fault:
        traceback.print_exc()
        sys.stderr.flush()
        lines = str(fault).strip().splitlines() or [""]
        return record(FAILED, f"{type(fault).__name__}: {lines[0]}"[:300])


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    options = Options.of(job["options"])
    with open(sys.argv[2], "a", encoding="utf-8") as events:
        module = importlib.import_module(job["module"])
        for item in job["items"]:
            sys.stdout.flush()
            _tell(events, begin=item, log=os.fstat(1).st_size)  # stdout and stderr go to one file
            done = do(module, item, options, events)
            fault = device_fault()
            if fault is not None:
                _tell(events, fault=fault, end=item, record=done)
                return POISONED
            _tell(events, end=item, record=done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
