"""Trainings on several ranks: all that has to be equal of them is, to the bit, and to that of a single process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from on_mpi import PREFIXES, Done, Mpi, errors
from train_on_ranks import config_of
from trainings import GRID, TRAININGS, last_checkpoint, outcome, train, write_data

pytestmark = pytest.mark.mpi
KILLS = int(os.environ.get("GPU_BP_KILLS", "4"))
WHOLE = [name for name in TRAININGS if "shards" not in TRAININGS[name].get("train", {})]  # that go on to their end
NAMES = [*WHOLE, "rewinds", *GRID]


@pytest.fixture(params=PREFIXES)
def mpi(request: pytest.FixtureRequest) -> Mpi:
    return Mpi(request.param)


@pytest.fixture
def mpich() -> Mpi:
    return Mpi("mpich")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainings of a single process, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("alone")
    write_data(folder)
    for name in NAMES:
        train(config_of(name, folder), run=folder / name, backend="numpy")
    return folder


def start(mpi: Mpi, n: int, folder: Path, *names: str, **environment: str) -> Done:
    write_data(folder)
    return mpi.start(n, [ROOT / "tests/train_on_ranks.py", folder, *names], **environment)


def told(run: Path, folder: Path) -> dict[str, Any]:
    """What came of a training, whose data lie in that folder."""
    text = json.dumps(outcome(run)).replace(folder.as_posix(), "FOLDER")
    return dict(json.loads(text))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_every_training(mpi: Mpi, n: int, alone: Path, tmp_path: Path) -> None:
    """Of every kind of data and of state, in a single job."""
    names = GRID if n == 8 and mpi.name != "mpich" else NAMES
    done = start(mpi, n, tmp_path, *names)
    assert (done.returncode, errors(done)) == (0, []), done.stderr
    for name in names:
        assert told(tmp_path / name, tmp_path) == told(alone / name, alone), name


def test_ranks_and_threads(mpich: Mpi, tmp_path: Path) -> None:
    """Of large batches, which as many workers of a rank share as it has threads."""
    found = []
    for n, threads in ((1, 1), (1, 2), (2, 2), (4, 2)):
        folder = tmp_path / f"{n}, {threads}"
        folder.mkdir()
        done = start(mpich, n, folder, "large", OPENBLAS_NUM_THREADS=str(threads))
        assert (done.returncode, errors(done)) == (0, []), done.stderr
        assert [(folder / f"workers of {rank}").read_text() for rank in range(n)] == [str(threads)] * n
        found.append(told(folder / "large", folder))
    assert found[1:] == found[:1] * 3


def test_who_watches_has_enough(mpich: Mpi, tmp_path: Path) -> None:
    """All ranks pause after the same step, and the training goes on from there."""
    done = start(mpich, 2, tmp_path, "noise", WATCHED="3")
    assert (done.returncode, errors(done)) == (0, []), done.stderr
    assert json.loads((tmp_path / "noise/summary.json").read_text())["stopped"] == "interrupted"
    assert 3 <= last_checkpoint(tmp_path / "noise").facts.training.step <= 5


def test_on_another_number_of_ranks(mpich: Mpi, alone: Path, tmp_path: Path) -> None:
    """What some ranks began, others go on with, and one alone ends."""
    for n, part in ((2, ":5"), (4, ":6"), (2, ":4")):
        done = start(mpich, n, tmp_path, *(f"{name}{part}" for name in WHOLE))
        assert done.returncode == 0, done.stderr
    for name in WHOLE:
        train(config_of(name, tmp_path), run=tmp_path / name, backend="numpy", resume=True)
        one, other = told(tmp_path / name, tmp_path), told(alone / name, alone)
        assert {k: v for k, v in one.items() if k != "files"} == {k: v for k, v in other.items() if k != "files"}


def test_killed_ranks(mpich: Mpi, alone: Path, tmp_path: Path) -> None:
    """SIGKILL of any rank at any instant ends the job; started again, on as many ranks or others, it goes on."""
    train(config_of("long", alone), run=alone / "long", backend="numpy")
    rng = np.random.default_rng(int(os.environ.get("GPU_BP_KILLS", "0")))
    killed = 0
    for _ in range(KILLS):
        n = int(rng.choice([2, 4]))
        kill = f"{rng.integers(n)} {rng.uniform(0, 1):.3f}"
        killed += start(mpich, n, tmp_path, "long", KILL=kill).returncode != 0  # that it hangs is a failure
    assert killed, "none of them was killed"
    assert start(mpich, 2, tmp_path, "long").returncode == 0
    one, other = told(tmp_path / "long", tmp_path), told(alone / "long", alone)
    assert {k: v for k, v in one.items() if k != "files"} == {k: v for k, v in other.items() if k != "files"}


def refused(words: list[Any], mpich: Mpi, do: str = "pass") -> str:
    """The line in which a training of XOR on two ranks is refused; `do` is done on each before, `rank` being its."""
    code = f"import os, sys; rank = os.environ['PMI_RANK']; {do}; from gpu_bp.cli import main; main()"
    done = mpich.start(2, ["-c", code, "train", ROOT / "configs/xor.toml", "--backend", "numpy", *words])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = errors(done)
    return line


def test_more_ranks_than_shards(mpich: Mpi, tmp_path: Path) -> None:
    assert refused(["--run", tmp_path / "run"], mpich) == (
        "error: rank 0: there are 2 ranks, and train.shards is 1; set train.shards = 2 or a larger power of two, or "
        "start fewer ranks"
    )


def test_a_rank_that_does_not_see_the_config(mpich: Mpi, tmp_path: Path) -> None:
    words = ["train.shards=2", "--run", tmp_path / "run"]
    assert refused(words, mpich, "rank == '1' and sys.argv.__setitem__(2, 'no.toml')").startswith(
        "error: rank 1: config no.toml: "
    )


def test_ranks_with_different_configs(mpich: Mpi, tmp_path: Path) -> None:
    words = ["train.shards=2", "--run", tmp_path / "run"]
    assert refused(words, mpich, "sys.argv.append('seed=' + rank)") == (
        "error: rank 0: rank 1 has another config: seed is 1 there, and 0 on rank 0; give all ranks the same one"
    )
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_data(mpich: Mpi, tmp_path: Path) -> None:
    words = ["train.shards=2", "--run", tmp_path / "run"]
    other = (
        "import gpu_bp.runs as runs; found = runs.identity; runs.identity = lambda *of: {**found(*of), 'file': rank}"
    )
    assert refused(words, mpich, other) == (
        "error: rank 0: rank 1 does not train on the same: file is 1 there, and 0 on rank 0"
    )


def test_a_run_folder_that_is_used(mpich: Mpi, tmp_path: Path) -> None:
    """Which rank 0 alone looks at."""
    (tmp_path / "file").touch()
    assert refused(["train.shards=2", "--run", tmp_path], mpich).startswith(f"error: rank 0: run folder {tmp_path}")


def test_a_full_disk_on_rank_0(mpich: Mpi, tmp_path: Path) -> None:
    limited = "rank == '0' and resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    words = ["train.shards=2", "--run", tmp_path / "run", "--quiet"]
    line = refused(words, mpich, f"from mpi4py import MPI; import resource; {limited}")  # MPI has files of its own
    assert line.startswith("error: rank 0: ")
    assert "No space left on device" in line


def test_parameters_diverge_at_the_end(mpich: Mpi, tmp_path: Path) -> None:
    """Which rank 0 alone sees, when it saves them: nothing is there to go back to for the others."""
    changes = ["train.batch_size=4", "train.epochs=1", "optimizer.learning_rate=1e39", "train.on_divergence=rewind"]
    line = refused(["train.shards=2", *changes, "--run", tmp_path / "run"], mpich)
    assert line.startswith("error: rank 0: the training diverged at step 1: parameters.layers.0.weights is not finite")
