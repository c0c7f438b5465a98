"""Ranks that are killed at random instants, and a loop that tries again: it ends in the bits of a training undisturbed.

Every kill must end all processes of the job, and nothing that its ranks share may be left in memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from on_mpi import ALLOWED, PREFIXES, Mpi
from train_on_ranks import config_of
from trainings import outcome, write_data

from gpu_bp import dump_config, parse_config

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks for processes in Linux's /proc"),
]
KILLS = int(os.environ.get("GPU_BP_KILLS", "4"))  # of each MPI
HANGS = 60.0  # seconds after which what has not ended hangs; usual is a tenth of a second, with Open MPI 1.5

# the number of ranks may be another one each time
LOOP = """
cd "$1"
until "$2/bin/mpiexec" -n "$(cat ranks)" "$2/bin/python" -m gpu_bp train long.toml --run "$3" --resume --backend numpy
do :; done
"""


def processes() -> Iterator[tuple[int, int]]:
    """Those of this machine that have not ended, each with its parent."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        if state not in "ZX":
            yield int(path.parent.name), int(parent)


def below(pid: int) -> set[int]:
    """The processes that this one has started, and they."""
    pairs, found, fresh = list(processes()), set[int](), {pid}
    while fresh:
        fresh = {child for child, parent in pairs if parent in fresh}
        found |= fresh
    return found


def is_rank(pid: int) -> bool:
    try:
        environment, words = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline"))
    except OSError:
        return False
    return b"gpu_bp" in words and (b"\0PMI_RANK=" in environment or b"\0OMPI_COMM_WORLD_RANK=" in environment)


def segments(pid: int) -> set[Path]:
    """The files in shared memory that a process has and others can see."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    mapped = {line.split(maxsplit=5)[5] for line in lines if " /dev/shm/" in line}
    return {Path(name) for name in mapped if not name.endswith(" (deleted)")}


def kill_one(loop: subprocess.Popen[bytes], instant: float, rng: np.random.Generator, log: Path) -> float | None:
    """Kills a rank at that instant; how long the others then took to end. None where the loop ends before."""
    victims: list[int] = []
    while not victims:
        if loop.poll() is not None:
            return None
        time.sleep(0.01)  # and leaves the processor to them
        if time.monotonic() >= instant:
            job = below(loop.pid)
            victims = sorted(filter(is_rank, job))
    victim = int(rng.choice(victims))
    try:
        os.kill(victim, signal.SIGSTOP)  # or it might map something more
        joined, shared = f"(pid {victim})" in log.read_text(errors="replace"), segments(victim)
        os.kill(victim, signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):  # it has just ended
        return 0.0
    begin = time.monotonic()
    while left := job & {pid for pid, _ in processes()}:
        assert time.monotonic() - begin < HANGS, f"a rank was killed, and these go on: {left}"
        time.sleep(0.01)
    # before all ranks have joined, the names of what they share belong to MPI
    assert not joined or not [path for path in shared if path.exists()]
    return time.monotonic() - begin


def start(mpi: Mpi, folder: Path, run: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["sh", "-c", LOOP, "sh", folder, PREFIXES[mpi.name], run],
        env={**os.environ, **ALLOWED, "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )


def told(run: Path) -> dict[str, Any]:
    return {name: value for name, value in outcome(run).items() if name != "files"}  # locks and parts may be there


@pytest.mark.parametrize("name", PREFIXES)
def test_kills_at_random(name: str, tmp_path: Path) -> None:
    mpi, rng = Mpi(name), np.random.default_rng(KILLS)
    write_data(tmp_path)
    (tmp_path / "long.toml").write_text(dump_config(parse_config(config_of("long", tmp_path))))
    (tmp_path / "ranks").write_text("2")
    log = tmp_path / "log.txt"
    with log.open("ab") as output:
        begin = time.monotonic()
        assert start(mpi, tmp_path, tmp_path / "whole", output).wait(300) == 0, log.read_text()
        whole, life = told(tmp_path / "whole"), time.monotonic() - begin
        kills: list[float] = []
        trainings = 0
        while len(kills) < KILLS:
            trainings += 1
            run = tmp_path / f"run{trainings}"
            loop = start(mpi, tmp_path, run, output)
            try:
                while len(kills) < KILLS:
                    took = kill_one(loop, time.monotonic() + rng.uniform(0, life), rng, log)
                    if took is None:
                        break
                    kills.append(took)
                    (tmp_path / "ranks").write_text(str(rng.choice([2, 4])))
                assert loop.wait(300) == 0
            finally:
                loop.kill()
            assert told(run) == whole
    # Open MPI asks those that are left to end before it kills them
    said = [line for line in log.read_text(errors="replace").splitlines() if "error: " in line]
    assert not [line for line in said if not line.endswith(": interrupted")]
    print(
        f"{name}: {KILLS} kills of {trainings} trainings; the others had ended after {max(kills):.2f} s at the latest"
    )
