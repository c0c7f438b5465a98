"""Files that are generated, family by family: see `hostile.py`. Each is read or refused, soon and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import hostile
import pytest
from conftest import ROOT

# How many inputs a family is given by `make test-all`. Those of the command line take the longest.
INPUTS = {
    "config": 4500,
    "model": 4500,
    "checkpoint": 2000,
    "npy": 3000,
    "npz": 2000,
    "table": 2500,
    "parquet": 1500,
    "shards": 2000,
    "commands": 1500,
}


def fed(family: str, inputs: int) -> dict[str, Any]:
    """What a process of its own says of so many inputs of a family."""
    command = [sys.executable, "-W", "error", str(ROOT / "tests/hostile.py"), family, str(inputs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert 0 < result["refused"] < result["inputs"]  # so some come through, to what lies behind the reading
    assert result["slowest"] < hostile.SECONDS
    assert result["megabytes"] < 500
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of addresses is Linux's")
@pytest.mark.parametrize("family", hostile.FAMILIES)
def test_some_generated_files(family: str) -> None:
    assert fed(family, 100)["inputs"] >= 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of addresses is Linux's")
def test_twenty_thousand_generated_files() -> None:
    assert INPUTS.keys() == hostile.FAMILIES.keys()
    results = {family: fed(family, inputs) for family, inputs in INPUTS.items()}
    print(results)
    assert sum(result["inputs"] for result in results.values()) >= 20_000
