"""A run that is killed at any instant and gone on with is the run that nobody killed, in every bit.

How many kills: GPU_BP_KILLS (40 by default; `make kill-test` has 500). A failure says the seed and what was done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("GPU_BP_KILLS", "40"))
SEED = int(os.environ.get("GPU_BP_KILL_SEED", "1"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork"),
]


def killing(*arguments: str) -> dict[str, Any]:
    """What the program of that name says of its runs."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/killing.py", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = dict(json.loads(done.stdout.splitlines()[-1]))
    print(*arguments, {key: value for key, value in result.items() if key != "failures"})
    return result


def test_killed_at_every_line() -> None:
    """Of all that writes files, in whichever thread; then at another line; then not."""
    result = killing("lines", "plateau", *(["1"] if KILLS < 500 else ["1", "2", "9"]))
    assert result["failures"] == []
    assert result["points"] > 200
    assert result["kills"]["killed"] > result["points"]


def test_killed_in_the_middle_of_every_write() -> None:
    result = killing("writes", "plateau")
    assert result["failures"] == []
    assert result["kills"]["killed"] > 40


def test_killed_at_random() -> None:
    """By SIGKILL, and by Ctrl-C and SIGTERM once and twice; from the start of Python to the last picture."""
    result = killing("signals", str(KILLS), str(SEED))
    assert result["failures"] == [], f"GPU_BP_KILL_SEED={SEED}"
    assert sum(result["kills"].values()) >= KILLS
    assert result["kills"]["SIGKILL"] > KILLS / 3
