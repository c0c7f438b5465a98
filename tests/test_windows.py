"""Windows of rows: every row once, any place at once, and a thread that reads ahead of who takes them."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest

from gpu_bp import Batch, Batches, NumpyBackend, Source, Task
from gpu_bp.backends import Backend
from gpu_bp.data import windows
from gpu_bp.data.sources import ResidentSource
from gpu_bp.data.windows import Blocks

SAMPLINGS = ["ordered", "shuffled", "replacement"]


class Numbers(Source):
    """Row i is (2 i, 2 i + 1), its target 20 i; says which rows it was asked for. Row `broken` cannot be read."""

    def __init__(self, n_rows: int, broken: int = -1) -> None:
        super().__init__(n_rows, 2, 1, Task("none"))
        self.broken = broken
        self.asked: list[int] = []

    def fill(self, rows: Any, batch: Batch) -> None:
        self.asked.append(int(rows[0]))
        if self.broken in rows:
            raise RuntimeError(f"row {self.broken} is broken")
        batch.inputs[:] = 2 * rows[:, None] + [0, 1]
        batch.targets[:] = 20 * rows[:, None]


class Gated(Numbers):
    """Before the rows of a window are filled, its gate must be open."""

    def __init__(self, n_rows: int, window_rows: int) -> None:
        super().__init__(n_rows)
        self.window_rows = window_rows
        self.asked_for, self.gates = ([threading.Event() for _ in range(0, n_rows, window_rows)] for _ in range(2))
        self.gates[0].set()

    def fill(self, rows: Any, batch: Batch) -> None:
        super().fill(rows, batch)
        window = int(rows[0]) // self.window_rows
        self.asked_for[window].set()
        assert self.gates[window].wait(30)


def batches_of(source: Source, size: int, sampling: Any, backend: Backend | None = None, **blocks: Any) -> Batches:
    return Batches(backend or NumpyBackend(), source, size, sampling, 5, **blocks)


def numbers_of(batches: Any) -> list[list[int]]:
    """The row numbers of each batch, whose inputs and targets must be theirs."""
    taken = []
    for batch in batches:
        rows = np.array(batch.rows)
        np.testing.assert_array_equal(np.array(batch.inputs), 2 * rows[:, None] + [0, 1])
        np.testing.assert_array_equal(np.array(batch.targets), 20 * rows[:, None])
        taken.append(rows.tolist())
    return taken


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", [1, 8, 21, 50, 1000])
@pytest.mark.parametrize("resident", [False, True])
def test_an_epoch_from_its_middle_is_its_tail(sampling: str, size: int, resident: bool) -> None:
    """Windows have 21 rows, batches fewer or more; every row comes once, in batches that are full but for the last."""
    source = Numbers(100)
    rows = ResidentSource(NumpyBackend(), source, "float32") if resident else source
    batches = batches_of(rows, size, sampling, block_rows=7, window_blocks=3)
    for epoch in range(3):
        whole = numbers_of(batches.epoch(epoch))
        assert len(whole) == batches.per_epoch
        assert {len(batch) for batch in whole[:-1]} <= {batches.size}
        if sampling != "replacement":
            assert sorted(chain(*whole)) == list(range(100))
        for first in range(0, len(whole) + 1, max(1, len(whole) // 5)):
            assert numbers_of(batches.epoch(epoch, first)) == whole[first:]


@pytest.mark.parametrize("sampling", ["ordered", "shuffled"])
@pytest.mark.parametrize(("n_rows", "rows", "window"), [(100, 7, 3), (98, 7, 3), (63, 7, 3), (5, 1, 2), (9, 9, 1)])
def test_every_place_is_found(sampling: Any, n_rows: int, rows: int, window: int) -> None:
    blocks = Blocks(n_rows, rows, window, sampling, 0)
    for epoch in range(8):
        sizes = [sum(n for _, n in blocks.blocks(epoch, k)) for k in range(blocks.windows)]
        places = [(k, place) for k, size in enumerate(sizes) for place in range(size)]
        assert [blocks.find(epoch, place) for place in range(n_rows)] == places


@pytest.mark.parametrize(("sampling", "limit"), [("ordered", 2**24), ("shuffled", 2**26)])
@pytest.mark.parametrize("width", [1, 20, 784, 10**5])
def test_windows_are_small_by_default(sampling: Any, limit: int, width: int) -> None:
    """Where blocks are large, such as the row groups of a Parquet file, they are taken in parts, but for shuffling."""
    for block_rows in (1, 10, 2**20):
        source = Numbers(10**9)
        source.n_inputs, source.block_rows = width, block_rows
        blocks = Blocks.of(source, sampling, 0, None, None)
        assert blocks.rows * blocks.window * 8 * (width + 1) <= limit or (sampling, blocks.window) == ("shuffled", 1)
        assert blocks.rows == block_rows or sampling == "ordered"


@pytest.mark.parametrize("sampling", ["ordered", "shuffled"])
def test_an_epoch_that_is_left_early(sampling: str) -> None:
    """Whatever is being read for it then, the next epochs are as they should be."""
    options = {"block_rows": 7, "window_blocks": 3}
    expected = [numbers_of(batches_of(Numbers(200), 10, sampling, **options).epoch(epoch)) for epoch in range(4)]
    batches = batches_of(Numbers(200), 10, sampling, **options)
    for k in (1, 2, 3, 5, 7, 19):
        for epoch in range(4):
            assert numbers_of(islice(batches.epoch(epoch), k)) == expected[epoch][:k]
        left = batches.epoch(1)
        next(left)
        assert numbers_of(batches.epoch(2)) == expected[2]
        left.close()  # type: ignore[attr-defined]


def test_windows_are_read_ahead_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """While batches of a window are taken, the next is being read; there is memory for two."""
    made: list[int] = []
    empty = windows.empty
    monkeypatch.setattr(windows, "empty", lambda *args: [made.append(args[2]), empty(*args)][1])
    source = Gated(100, 20)
    batches = batches_of(source, 5, "ordered", block_rows=5, window_blocks=4).epoch(0, follows=False)
    for window in range(5):
        next(batches)
        if window < 4:
            assert source.asked_for[window + 1].wait(30), "nobody reads the next window"
        assert len(numbers_of(islice(batches, 3))) == 3  # although the next window is not there yet
        if window < 4:
            source.gates[window + 1].set()
    assert made == [20, 20]
    assert list(batches) == []
    assert source.asked == list(range(0, 100, 20)), "nothing is read twice, or beyond the end"


def test_what_is_read_for_nobody_stops() -> None:
    """When an epoch is left, what the thread is reading then is not taken for more than it is."""
    source = Gated(200, 50)
    batches = batches_of(source, 10, "ordered", block_rows=10, window_blocks=5)
    epoch = batches.epoch(0)
    next(epoch)
    assert source.asked_for[1].wait(30)
    epoch.close()  # type: ignore[attr-defined]
    for gate in source.gates:
        gate.set()
    assert list(chain(*numbers_of(batches.epoch(1, follows=False)))) == list(range(200))
    assert source.asked == [0, 50, 50, 100, 150]


def test_evaluations_read_on_from_the_window_that_is_there() -> None:
    source = Numbers(60)
    batches = batches_of(source, 10, "ordered", block_rows=10, window_blocks=2)  # three windows, and memory for two
    for epoch in range(2):
        assert list(chain(*numbers_of(batches.epoch(epoch, follows=epoch == 0)))) == list(range(60))
    assert source.asked == [0, 20, 40] * 2


class AtOnce:
    """An executor that has always done already what it is asked to do."""

    def __init__(self, *_: object) -> None: ...

    def submit(self, do: Any, *args: Any) -> Future[None]:
        future: Future[None] = Future()
        try:
            future.set_result(do(*args))
        except RuntimeError as error:
            future.set_exception(error)
        return future


@pytest.mark.parametrize("executor", [AtOnce, windows.ThreadPoolExecutor])
def test_an_error_comes_when_its_rows_are_needed(monkeypatch: pytest.MonkeyPatch, executor: Any) -> None:
    """Not when they are read, which is a matter of chance; and never where they are not needed."""
    monkeypatch.setattr(windows, "ThreadPoolExecutor", executor)
    batches = batches_of(Numbers(100, broken=60), 5, "ordered", block_rows=5, window_blocks=4)
    for _ in range(2):
        assert numbers_of(islice(batches.epoch(0), 12))[-1][-1] == 59
        epoch = batches.epoch(0)
        list(islice(epoch, 12))
        with pytest.raises(RuntimeError, match="row 60 is broken"):
            next(epoch)
        with pytest.raises(RuntimeError, match="row 60 is broken"):  # it is not taken for read
            next(batches.epoch(0, 12))


def test_a_single_window_that_could_not_be_read_is_not_there() -> None:
    source = Numbers(20, broken=10)
    batches = batches_of(source, 5, "ordered")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="row 10 is broken"):
            next(batches.epoch(0))
    source.broken = -1
    assert list(chain(*numbers_of(batches.epoch(0)))) == list(range(20))
