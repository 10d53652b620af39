# SPDX-License-Identifier: Apache-2.0
"""The native kernels read and write nothing beyond their operands: a page that may not be touched lies beside each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("guarded.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory as Linux does")
def test_kernels_stay_within_their_operands(isa):
    """In a process of its own: a touch ends it."""
    done = subprocess.run([sys.executable, str(SCRIPT)], env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0 and "within bounds" in done.stdout, done.stderr[-2000:]
