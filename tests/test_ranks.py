"""Ranks: sums to the bit, who is told what, and that a fault on one of them ends them all, on MPICH and on Open MPI."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from on_mpi import Mpi, errors, on_ranks

from benchmarks import distributed, ranks
from benchmarks.peers.cells import Cell
from gpu_bp import NumpyBackend, Trainer, UserError, parse_config
from gpu_bp.ranks import Alone, join, launched
from gpu_bp.tree_sum import halving

# what the ranks tell each other ---------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.integers(0, 6))
def test_halving(n: int, bits: int) -> None:
    """Partners share a range, of which each goes on with the half that the other leaves."""
    size = 1 << bits
    levels = [halving(n, rank, size) for rank in range(size)]
    for rank, of_rank in enumerate(levels):
        assert [level.partner for level in of_rank] == [rank ^ (1 << bit) for bit in range(bits)]
        shared = slice(0, n)
        for k, (partner, mine, theirs) in enumerate(of_rank):
            assert (theirs, mine) == levels[partner][k][1:]
            lower, upper = (mine, theirs) if rank < partner else (theirs, mine)
            assert (lower.start, lower.stop, upper.stop) == (shared.start, upper.start, shared.stop)
            assert 0 <= (upper.stop - upper.start) - (lower.stop - lower.start) <= 1
            shared = mine


@pytest.mark.parametrize("n", [2, 4])
def test_sums(mpi: Mpi, n: int) -> None:
    found = mpi.facts(n)
    assert found["wrong"] == [[]] * n
    assert found["infinite"]
    assert all(small < 2**13 and large < 2**16 for small, large in found["allocated"])


@pytest.mark.parametrize("n", [2, 4])
def test_what_they_tell_each_other(mpi: Mpi, n: int) -> None:
    found = mpi.facts(n)
    assert found["seen"] == [[rank, n, rank] for rank in range(n)]
    assert found["told"] == [{"rank": 0}] * n
    assert found["kept"] == [True] + [False] * (n - 1)
    assert found["arrays"] == [found["arrays"][0]] * n
    assert found["kinds"] == [["float64 (4, 3)", "float64 ()", "float16 (0, 2)", "float64 (1048576,)"]] * n
    where = ", ".join(rf"{rank} \(pid {process}\)" for rank, process in enumerate(found["pids"]))
    assert re.fullmatch(rf"{n} ranks: on \S+ {where}\n", found["log"])


def test_nothing_would_be_left_in_shared_memory(mpich: Mpi) -> None:
    assert mpich.facts(2)["segments"] == [[], []]


def test_one_rank(mpich: Mpi) -> None:
    found = mpich.facts(1)
    assert (found["seen"], found["wrong"], found["log"]) == ([[0, 1, 0]], [[]], "")


def test_what_cannot_be_summed(mpich: Mpi) -> None:
    assert errors(mpich.run(2, "integers")) == [
        "error: rank 0: ValueError: a flat array of float32 or float64 is summed, not int64 (3,)"
    ]


# faults ---------------------------------------------------------------------------------------------------------

FAULTS = {
    "raise": (1, "KeyError: 'a bug'"),
    "user-error": (2, "rows.csv: line 3 is broken"),
    "exit-0": (1, "ended while other ranks go on"),
    "user-error-at-the-end": (2, "rows.csv: line 3 is broken"),
}
MORE_FAULTS = {
    "no-file": (2, "no/such/file: No such file or directory"),
    "exit-3": (3, "exit status 3"),
    "interrupted": (130, "interrupted"),
    "return": (1, "ended while other ranks go on"),
    "return-while-told": (1, "ended while other ranks go on"),
    "user-error-while-one-saves": (2, "rows.csv: line 3 is broken"),
    "user-error-on-devices": (2, "rows.csv: line 3 is broken"),
    "diverged-on-devices-while-one-saves": (2, "rows.csv: line 3 is broken"),
    "user-error-meanwhile": (2, "rows.csv: line 3 is broken"),
    "aborted": (7, "no reason"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_rank_ends_all(mpi: Mpi, fault: str) -> None:
    status, line = FAULTS[fault]
    done = mpi.run(2, fault)
    assert (done.returncode, errors(done)) == (status, [f"error: rank 1: {line}"])
    assert ("Traceback" in done.stderr) == (fault == "raise")


@pytest.mark.parametrize("fault", MORE_FAULTS)
def test_other_faults(mpich: Mpi, fault: str) -> None:
    status, line = MORE_FAULTS[fault]
    done = mpich.run(2, fault)
    assert (done.returncode, errors(done)) == (status, [f"error: rank 1: {line}"])
    assert ("saved\n" in done.stderr) == fault.endswith("while-one-saves")


def test_a_fault_among_four(mpich: Mpi) -> None:
    done = mpich.run(4, "exit-0")
    assert (done.returncode, errors(done)) == (1, ["error: rank 1: ended while other ranks go on"])


def test_the_same_fault_on_all_is_said_once(mpi: Mpi) -> None:
    done = mpi.run(2, "user-error-on-all")
    assert (done.returncode, errors(done)) == (2, ["error: rank 0: rows.csv: line 3 is broken"])


def test_all_are_interrupted(mpich: Mpi) -> None:
    done = mpich.run(2, "all-interrupted")
    assert (done.returncode, errors(done)) == (143, [])


def test_a_rank_is_killed(mpi: Mpi) -> None:
    """The launcher ends the others; which rank a process was is to be looked up in what was logged."""
    done = mpi.run(2, "killed")
    assert done.returncode not in (0, 1, 2)
    assert errors(done) == []


# who they are ---------------------------------------------------------------------------------------------------


def test_a_process_by_itself() -> None:
    flat = np.ones(3)
    with join({"HOME": "/", "PMI_SIZE": "", "SLURM_NTASKS": "8"}) as ranks:
        assert isinstance(ranks, Alone)
        assert (ranks.rank, ranks.size, ranks.local_rank) == (0, 1, 0)
        ranks.sum_tree(flat)
        assert ranks.broadcast(flat) is flat
        assert ranks.all_gather(flat) == [flat]
    assert flat.tolist() == [1, 1, 1]
    with pytest.raises(KeyError), join({}):
        raise KeyError


def test_a_process_by_itself_is_aborted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Alone().abort("no device", 2)
    assert (ended.value.code, capsys.readouterr().err) == (2, "error: no device\n")


@pytest.mark.parametrize(
    ("environment", "n"),
    [
        ({}, 1),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1),  # within a batch script
        ({"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, 4),  # mpiexec, whose helpers Slurm has started
        ({"PMI_SIZE": "four"}, 1),
    ],
)
def test_launched(environment: dict[str, str], n: int) -> None:
    assert launched(environment) == n


def test_mpi4py_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "gpu_bp.mpi", raising=False)
    with pytest.raises(UserError, match=r"2 processes .* mpi4py is not installed: pip install 'gpu_bp\[mpi\]'"):
        join({"PMI_SIZE": "2"})


def test_mpi_cannot_be_loaded(mpich: Mpi) -> None:
    done = on_ranks("facts", ["env", "MPI4PY_LIBMPI=none.so"], mpich.python, PMI_SIZE="2")
    assert (done.returncode, len(errors(done))) == (2, 1)
    assert "mpi4py cannot load MPI (" in errors(done)[0]


def test_another_launcher(mpich: Mpi) -> None:
    """Of MPICH, the Python on Open MPI: each would train by itself."""
    done = on_ranks("facts", [mpich.mpiexec, "-n", 2], Mpi("open-mpi").python)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: 2 processes were started together, but Open MPI \S+, which mpi4py has loaded, knows of 1: .*",
        errors(done)[0],
    )


def test_a_launcher_that_mpi_does_not_know(mpich: Mpi) -> None:
    done = on_ranks("facts", [], mpich.python, OMPI_COMM_WORLD_SIZE="2")
    assert (done.returncode, len(errors(done))) == (2, 1)
    assert "2 processes were started together, but MPICH" in errors(done)[0]


def test_three_ranks(mpich: Mpi) -> None:
    done = mpich.run(3, "facts")
    assert done.returncode == 2
    assert errors(done) == ["error: 3 ranks: their number must be a power of two, such as 2"]


def test_more_ranks_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPICH is told to yield, unless it was told anything."""
    from gpu_bp.ranks import _yield_where_crowded

    for environment, told in (
        ({"MPI_LOCALNRANKS": "2"}, None),
        ({"MPI_LOCALNRANKS": "3"}, "1"),
        ({"MPI_LOCALNRANKS": "3", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "0"}, "0"),
    ):
        monkeypatch.setattr("gpu_bp.ranks.os.cpu_count", lambda: 2)
        monkeypatch.setattr("gpu_bp.ranks.os.environ", environment)
        _yield_where_crowded()
        assert environment.get("MPIR_CVAR_ENABLE_HEAVY_YIELD") == told


class Two(Alone):
    """The first of two ranks, of which the other takes as long for everything, and wants to pause at some time."""

    size = 2

    def __init__(self, trainer: list[Trainer], paces: list[int]) -> None:
        self.asked: list[int] = []
        self._trainer = trainer
        self._paces = paces

    def all_gather(self, value: Any) -> list[Any]:
        if not (isinstance(value, tuple) and isinstance(value[0], str) and self._trainer):
            return [value, value]
        self.asked.append(self._trainer[0].steps)
        pace = self._paces[len(self.asked) - 1]
        return [(value[0], 100), ("interrupted" if pace == 0 else "", max(1, pace))]


def test_when_ranks_ask_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the slower one thinks right, with each line of metrics, and all pause after the same step."""
    monkeypatch.setattr(NumpyBackend, "read_every", 100)
    trainers: list[Trainer] = []
    ranks = Two(trainers, [3, 10, 40, 1, 0])
    train = {"steps": 100, "batch_size": 8, "shards": 2, "log_every": 20}
    tables = {"name": "two", "data": {"kind": "friedman1", "rows": 100}, "network": {"hidden": [3]}, "train": train}
    config = parse_config({**tables, "optimizer": {"kind": "sgd", "learning_rate": 0.01}})
    trainer = Trainer(config, NumpyBackend(), ranks=ranks)
    trainers.append(trainer)
    assert len(list(trainer.run())) == 21
    assert ranks.asked == [1, 4, 14, 20, 21]
    assert (trainer.stopped, trainer.paused) == ("interrupted", True)


# what it costs --------------------------------------------------------------------------------------------------


def test_the_benchmark_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CELL", Cell(2, 8, 64, "tanh", "sgd", "squared_error"))
    monkeypatch.setattr(distributed, "ROUND_SECONDS", 0)
    measured = distributed.sharded(NumpyBackend())
    assert measured.value is not None
    assert measured.value > 0


def test_the_benchmark_of_sums(mpi: Mpi) -> None:
    measured = distributed.tree_sum(mpi.mpiexec, 2**20)
    assert measured.what.startswith("the sum of 1 MiB over 2 ranks in a tree, of MPI's: ")
    assert measured.value is not None
    assert measured.value > 0


def test_the_benchmark_of_bits(mpi: Mpi, capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks.main(["--backend", "numpy", "--mpiexec", str(mpi.mpiexec)]) == 0
    assert "| 2 ranks | through the host's memory |" in capsys.readouterr().out


def test_the_benchmarks_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = distributed.tree_sum(Path("no/mpiexec"))
    assert (measured.value, measured.passed) == (None, None)
    monkeypatch.setattr(ranks, "CELL", Cell(2, 8, 13, "tanh", "adam", "squared_error"))
    one, two = ranks.run(NumpyBackend(), Path("no/mpiexec"))
    assert (one.passed, two.passed, two.digest) == (True, True, None)
    assert "not run: no mpi4py, or no MPI" in ranks.table([one, two])
