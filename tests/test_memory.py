"""The memory of a training does not grow with its data: measured in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from gpu_bp import load_config
from gpu_bp.data.shards import write_shards
from gpu_bp.data.source import Rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc"),
]

# The peak of this process alone: getrusage's would begin with that of the process which started it.
PROGRAM = """
import json, re, sys
import gpu_bp
config, run = sys.argv[1:]
gpu_bp.train(json.loads(config), backend="numpy", run=run)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_of(config: dict[str, Any], run: Path) -> float:
    """The peak resident memory of a whole run, pictures and all, in MiB."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning", "-c", PROGRAM, json.dumps(config), str(run)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # threads that wait for each other take long on a busy machine
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


def test_generated_rows(tmp_path: Path) -> None:
    """2,000 steps of the teacher take the same memory, within 5 %, whether it has 10^5 rows or 10^12."""
    peaks = []
    for exponent in (5, 9, 12):
        overrides = ["train.steps=2000", f"data.rows={10**exponent}"]
        config = load_config(ROOT / "configs/teacher.toml", overrides).model_dump(exclude_none=True)
        peaks.append(peak_of(config, tmp_path / str(exponent)))
    print(f"MiB: {peaks}")
    assert max(peaks) < 1.05 * min(peaks)


class Cheap:
    """Rows that cost nothing to make: the same block of random numbers, again and again."""

    classes: tuple[str, ...] = ()
    binary = False
    weighted = False
    n_targets = 1
    where = "cheap rows"

    def __init__(self, n_inputs: int) -> None:
        self.n_rows = 10**9
        self.n_inputs = n_inputs
        self.block_rows = 1024
        self._inputs = np.random.default_rng(0).standard_normal((1024, n_inputs)).astype(np.float32)

    def read(self, first: int, n: int) -> Rows:
        return Rows(self._inputs[:n], targets=self._inputs[:n, :1])


@pytest.fixture(params=[32, 784])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Path]]:
    """A shard folder of 10 MiB and one of 1 GiB, float32, of rows so wide."""
    made = []
    for mebibytes in (10, 1024):
        made.append(tmp_path / f"{mebibytes}")
        write_shards(
            Cheap(request.param),
            made[-1],
            rows=mebibytes * 2**20 // (4 * (request.param + 1)),
            config={},
            dtype="float32",
        )
    yield made
    shutil.rmtree(tmp_path)


def test_shards(folders: list[Path], tmp_path: Path) -> None:
    """Once over 1 GiB takes less than 300 MiB more than once over 10 MiB."""
    peaks = []
    for folder in folders:
        config = {
            "data": {"kind": "shards", "path": str(folder), "validation_rows": 1000, "test_rows": 1000},
            "network": {"hidden": [8]},
            "loss": {"kind": "squared_error"},
            "optimizer": {"kind": "sgd", "learning_rate": 1e-4},
            "train": {"epochs": 1, "batch_size": 1024, "sampling": "shuffled"},
        }
        peaks.append(peak_of(config, tmp_path / f"run-{folder.name}"))
    print(f"MiB: {peaks}")
    assert peaks[1] < peaks[0] + 300
