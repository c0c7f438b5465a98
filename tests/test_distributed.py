"""Trainings on several ranks: all that has to be equal of them is, to the bit, and to that of a single process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from on_mpi import Done, Mpi, errors
from train_on_ranks import config_of
from trainings import GRID, TRAININGS, last_checkpoint, outcome, train, write_data

from gpu_bp import NumpyBackend

pytestmark = pytest.mark.mpi
WHOLE = [name for name in TRAININGS if "shards" not in TRAININGS[name].get("train", {})]  # that go on to their end
NAMES = [*WHOLE, "rewinds", *GRID]


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


@pytest.mark.parametrize("what", ["memory", "full", "weights"])
def test_a_rank_unlike_the_others(what: str, mpich: Mpi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows lie, and so their order, is the same on all, if one has less memory; and all have rank 0's weights."""
    done = start(mpich, 2, tmp_path, "noise", UNLIKE=what)
    assert (done.returncode, errors(done)) == (0, []), done.stderr
    folder = tmp_path / "alone"
    folder.mkdir()
    write_data(folder)
    if what != "weights":
        monkeypatch.setattr(NumpyBackend, "resident_bytes", 0)
    train(config_of("noise", folder), run=folder / "noise", backend="numpy")
    one, other = told(tmp_path / "noise", tmp_path), told(folder / "noise", folder)
    assert one["summary"].pop("data").startswith(other["summary"].pop("data").split("(")[0])
    assert one == other


def test_another_backend(mpich: Mpi, tmp_path: Path) -> None:
    """Is refused before the ranks say anything that only one of them understands."""
    done = start(mpich, 2, tmp_path, "noise", UNLIKE="backend")
    assert done.returncode == 2
    assert errors(done) == [
        "error: rank 0: rank 1 does not train on the same: backend is another there, and numpy on rank 0"
    ]


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
