"""A long training gains nothing as it goes on. GPU_BP_SOAK_STEPS: how long (100,000; `make soak` has a million)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = int(os.environ.get("GPU_BP_SOAK_STEPS", "100000"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux, which says what a process holds")
def test_a_long_training_gains_nothing() -> None:
    """With a checkpoint every 250 steps; looked at after a hundredth of the steps and at the end."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", str(STEPS), "--backend", "numpy"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    held = json.loads(done.stdout)
    print(STEPS, held)
    begin, end = held["begin"], held["end"]
    assert end["memory"] < 1.02 * begin["memory"]
    assert end["files"] <= begin["files"]
    assert end["threads"] <= begin["threads"]
