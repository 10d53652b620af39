# SPDX-License-Identifier: Apache-2.0
"""A stage for bench.gpu whose items end in every way there is. ``options.models`` names a file that counts the runs."""

import os
import signal
import subprocess
import sys
import time

from bench.gpu.stage import FAILED, OK, Item, Unavailable, counts, not_ok, record, table

NAME, TITLE = "fake", "Fake"
LIMITS = {"hangs": 1.5, "hangs in a child": 1.5}
ITEMS = (
    "fine", "raises", "missing", "finds a fault", "exits", "killed", "hangs", "hangs in a child", "is guilty", "last",
)  # fmt: skip


def items(options):
    return [Item(name, LIMITS.get(name, 60.0), retry=name == "is guilty") for name in ITEMS]


def budget(options):
    return 600.0


def run(item, options, mark):
    print(f"this is {item}", flush=True)
    if options.models:
        with open(options.models, "a") as file:
            file.write(f"{item}\n")
    if item == "raises":
        raise ValueError("no such luck\nand more")
    if item == "missing":
        raise Unavailable("there is no spoon")
    if item == "finds a fault":
        return record(FAILED, "1 is not 2", data=[1, 2])
    if item == "exits":
        mark("the step before the end")
        os._exit(3)
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "hangs":
        mark("waiting")
        time.sleep(600)
    if item == "hangs in a child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"child {child.pid}", flush=True)
        child.wait()
    if item == "is guilty":
        for name in ("good", "bad", "worse", "fair"):
            if name not in options.excluded.get(item, {}):
                mark(name)
                if name in ("bad", "worse"):
                    os._exit(9)
        return record(OK, "went on without", left_out=options.excluded[item])
    return record(OK, "as it should")


def verdict(records):
    return counts(records)


def render(records):
    return table(["", ""], [[name, one["status"]] for name, one in records.items()], text=True)


def expected(records):
    return not_ok(records)
