"""What a rank needs of the memory: its own part of the rows, and of a machine that it shares with others."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import ROOT
from on_mpi import Mpi, errors
from test_need import Measured, Weighed, changed, check, make, proposals

from gpu_bp import NumpyBackend, Trainer, UserError, load_data, memory
from gpu_bp.config import Config
from gpu_bp.data import own_data
from gpu_bp.ranks import Alone

T = TypeVar("T")


class OneOf(Alone):
    """A rank without the others, who would tell the same as it does; so many are on its machine."""

    def __init__(self, rank: int, size: int, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, 0, local_size

    def all_gather(self, value: T) -> list[T]:
        return [value] * self.size


RANKS = [OneOf(0, 2), OneOf(1, 2), OneOf(2, 4), OneOf(3, 4)]
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {"train": {"shards": 4}},
    "parts": {"train": {"shards": 8, "part_rows": 60}, "regularisation": {"input_noise": 0.1}},
    "more shards than rows": {"train": {"shards": 32, "batch_size": 20}},
    "more shards than parts": {"train": {"shards": 32, "batch_size": 20, "part_rows": 2}},
    "ranks without rows": {"train": {"shards": 8, "batch_size": 3}},
    "ranks without parts": {"train": {"shards": 8, "batch_size": 3, "part_rows": 1}},
    "classes that weigh": {
        "data": {"kind": "double-moon"},
        "loss": {"kind": "cross_entropy", "class_weight": "balanced"},
        "train": {"shards": 4},
    },
    "generated, shuffled": {"data": {"residency": "host"}, "train": {"shards": 4}},
    "drawn": {"train": {"sampling": "replacement", "batch_size": 10_000, "shards": 4}},
    "average": {
        "stopping": {"metric": "average_validation_loss"},
        "train": {"average_decay": 0.9, "shards": 4},
    },
}


@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: f"{ranks.rank} of {ranks.size}")
@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_counted_is_made(name: str, ranks: OneOf) -> None:
    backend, parsed = Measured(), make(**OPTIONS[name])
    check(parsed, load_data(parsed, backend=backend), backend, ranks)


@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: f"{ranks.rank} of {ranks.size}")
@pytest.mark.parametrize("sampling", ["shuffled", "ordered", "replacement"])
def test_rows_of_the_host(sampling: str, ranks: OneOf) -> None:
    parsed = make(
        data={"kind": "own", "residency": "host", "window_blocks": 3},
        loss={"kind": "cross_entropy"},
        train={"sampling": sampling, "shards": 4},
    )
    backend = Measured()
    sources = {"train": Weighed(5000, 100), "validation": Weighed(700, 100)}
    check(parsed, own_data(sources, parsed.loss.record(), backend), backend, ranks)


def large(rows: int = 600_000) -> Config:
    """A training whose rows take most of the memory."""
    train = {"batch_size": rows, "sampling": "ordered", "shards": 8}
    return make(data={"rows": rows, "residency": "host"}, train=train)


@pytest.mark.parametrize("change", [[], ['train.sampling="shuffled"', "train.batch_size=1000", "data.rows=100000"]])
def test_a_rank_has_its_part_of_the_rows(change: list[str]) -> None:
    """Of batches, of windows, and of what is evaluated; gradients and parameters are whole."""
    parsed, backend = changed(large(), change), Measured()
    dataset = load_data(parsed, backend=backend)
    alone = memory.estimate(parsed, dataset, backend).device
    for size in (2, 4, 8):
        need = memory.estimate(parsed, dataset, backend, OneOf(size - 1, size)).device
        assert need["batches"] == pytest.approx(alone["batches"] / size, rel=0.05)
        less, rows = alone["evaluation"] - need["evaluation"], 4096 + 700 + 300
        assert less == pytest.approx((1 - 1 / size) * rows * (8 + 13 * 4), rel=1e-2)
        assert need["gradients"] == alone["gradients"]
        assert need["parameters"] == alone["parameters"]


def test_the_peak() -> None:
    """Python's and NumPy's own count of all memory, from before the training to its first step.

    But for the scratch, of which no more is counted than there may be, it is within 3 %.
    """
    parsed, backend, ranks = large(), NumpyBackend(), OneOf(1, 4)
    dataset = load_data(parsed, backend=backend)
    need = memory.estimate(parsed, dataset, backend, ranks).device
    tracemalloc.start()
    trainer = Trainer(parsed, backend, dataset, ranks)
    next(trainer.run())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    most = sum(need.values()) - need["checkpoint"]
    assert 0.97 * (most - need["scratch"]) < peak < most
    assert peak < 0.6 * memory.estimate(parsed, dataset, backend).total


def start(config: Config, budget: int, ranks: OneOf) -> None:
    """The first step of a training on a machine that has so much memory."""
    backend = Measured(budget)
    next(Trainer(config, backend, load_data(config, backend=backend), ranks).run())


def test_ranks_share_a_machine() -> None:
    """Two ranks on a machine each do not fit where four would on machines of their own; what is proposed does."""
    parsed, ranks, budget = large(), OneOf(3, 4, 2), 30 * 2**20
    start(parsed, budget, OneOf(3, 4))
    with pytest.raises(UserError) as caught:
        start(parsed, budget, ranks)
    assert re.match(
        r"each of the 2 ranks on a machine needs .* of memory, 15\.0 MiB are free for it and .* are missing; ",
        str(caught.value),
    )
    found = proposals(str(caught.value))
    assert [change[0].partition("=")[0] for change in found] == ["train.part_rows", "train.batch_size"]
    for change in found:
        start(changed(parsed, change), budget, ranks)
        key, _, number = change[0].partition("=")
        with pytest.raises(UserError, match="would fit"):
            start(changed(parsed, [f"{key}={int(number) * 3 // 2}"]), budget, ranks)


def test_the_least_machine_counts() -> None:
    """All refuse what does not fit on one of them."""

    class BesideASmallOne(OneOf):
        def all_gather(self, value: Any) -> list[Any]:
            return [value, (2**20, 4) if isinstance(value, tuple) else value]

    with pytest.raises(UserError, match=r"each of the 4 ranks on a machine needs .*, 1\.0 MiB are free for it"):
        start(large(), 2**40, BesideASmallOne(0, 2))


def test_out_of_memory_at_a_step() -> None:
    """What is still free is shared."""
    parsed, backend = large(), Measured()
    dataset = load_data(parsed, backend=backend)
    trainer = Trainer(parsed, backend, dataset, OneOf(0, 2))
    backend.budget = backend.used + 4 * 2**20
    said = [str(memory.out_of_memory(parsed, dataset, backend, 1, OneOf(0, 2, size))) for size in (1, 2)]
    there = [float(re.search(r"about ([\d.]+) MiB were there", line)[1]) for line in said]  # type: ignore[index]
    assert there[0] - there[1] == pytest.approx(2, abs=0.11)
    assert trainer.steps == 0


@pytest.mark.mpi
def test_ranks_are_refused_together(tmp_path: Path) -> None:
    """In one line; MPI knows how many are on the machine."""
    code = (
        "from gpu_bp import NumpyBackend; from gpu_bp.cli import main; "
        "NumpyBackend.free_bytes = lambda _: 2**10; main()"
    )
    words = ["-c", code, "train", ROOT / "configs/xor.toml", "--backend", "numpy", "train.shards=2", "--run"]
    done = Mpi("mpich").start(2, [*words, tmp_path / "run"])
    assert done.returncode == 2, done.stderr
    (line,) = errors(done)
    assert re.match(
        r"error: rank 0: each of the 2 ranks on a machine needs .* of memory, 0\.5 KiB are free for it and ", line
    )
    assert not (tmp_path / "run").exists()
