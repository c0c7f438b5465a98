"""Steps whose rows come in several batches: the same rows in the same order, with what is theirs beside them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest

from gpu_bp import Batch, Batches, NumpyBackend, ResidentSource, Source, Task, parse_config
from gpu_bp.backends import Backend
from gpu_bp.data import load_data
from gpu_bp.data.order import CHUNK
from gpu_bp.sharding import Sharding

SAMPLINGS = ["ordered", "shuffled", "replacement"]
# Rows of a step and of a part: one that divides the other or not, all rows, more than all, and one at a time.
SIZES = [(10, 3), (12, 4), (100, 7), (1000, 30), (8, 8), (5, 50), (3, 1)]


class Numbers(Source):
    """Row i is (2 i, 2 i + 1), its target 20 i, and its weight i + 1 where rows have weights."""

    def __init__(self, n_rows: int, *, weighted: bool = False) -> None:
        super().__init__(n_rows, 2, 1, Task("none"), weighted=weighted, block_rows=8)

    def fill(self, rows: Any, batch: Batch) -> None:
        batch.inputs[:] = 2 * rows[:, None] + [0, 1]
        batch.targets[:] = 20 * rows[:, None]
        if self.weighted:
            batch.weights[:] = rows + 1


def steps_of(backend: Backend, batches: Batches, epoch: int, first: int = 0) -> list[list[Batch]]:
    """The batches of each step, copied to the host."""
    taken = []
    for batch in batches.epoch(epoch, first):
        assert batch.n <= batches.part_size
        host = [backend.to_host(array).copy() for array in batch.filled]
        taken.append(Batch.of(host, backend.to_host(batch.rows).copy(), batch.place, batch.last))
    ends = np.cumsum([batch.last for batch in taken])
    return [
        [batch for _, batch in step]
        for _, step in groupby(zip(ends - [b.last for b in taken], taken, strict=True), lambda pair: pair[0])
    ]


def whole(parts: list[Batch]) -> Batch:
    """The parts of a step as one batch; places count up, and the last part alone is the last."""
    assert [part.place for part in parts] == [0, *np.cumsum([part.n for part in parts])[:-1]]
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    arrays = [np.concatenate(arrays) for arrays in zip(*(part.arrays for part in parts), strict=True)]
    return Batch.of(arrays[:-1], arrays[-1])


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    for batch, expected in zip(one, other, strict=True):
        for array, wanted in zip(batch.arrays, expected.arrays, strict=True):
            np.testing.assert_array_equal(array, wanted)


def pair(backend: Backend, source: Source, size: int, part: int, sampling: Any) -> tuple[Batches, Batches]:
    """Batches in parts, and whole ones."""
    options = {"block_rows": 7, "window_blocks": 3}
    parts = Batches(backend, source, size, sampling, 5, part_rows=part, **options)
    return parts, Batches(backend, source, size, sampling, 5, **options)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(("size", "part"), SIZES)
def test_parts_are_the_whole(
    backend: Backend, sampling: str, weighted: bool, resident: bool, size: int, part: int
) -> None:
    """Also from a step in the middle of an epoch; windows have 21 rows, so that parts and steps lie across them."""
    source: Source = Numbers(100, weighted=weighted)
    source = ResidentSource(backend, source, "float32") if resident else source
    batches, expected = pair(backend, source, size, part, sampling)
    assert batches.size == expected.size == expected.part_size == min(size, 100)
    assert batches.part_size == min(size, part, 100)
    assert batches.per_epoch == expected.per_epoch
    for epoch in (0, 1, 4):
        wanted = [whole(step) for step in steps_of(backend, expected, epoch)]
        assert_same([whole(step) for step in steps_of(backend, batches, epoch)], wanted)
        for batch in wanted:
            np.testing.assert_array_equal(batch.inputs, 2 * batch.rows[:, None] + [0, 1])
            np.testing.assert_array_equal(batch.targets, 20 * batch.rows[:, None])
            assert (batch.weights is not None) == weighted
            if weighted:
                np.testing.assert_array_equal(batch.weights, batch.rows + 1)
        middle = len(wanted) // 2
        assert_same([whole(step) for step in steps_of(backend, batches, epoch, middle)], wanted[middle:])
        assert steps_of(backend, batches, epoch, len(wanted)) == []


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_parts_of_generated_rows(backend: Backend, sampling: str) -> None:
    """Made on the device, straight into the parts or in windows."""
    raw = {
        "data": {"kind": "teacher", "rows": 100},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
        "train": {"epochs": 1},
    }
    source = load_data(parse_config(raw), backend=backend).sources["train"]
    batches, expected = pair(backend, source, 30, 11, sampling)
    for epoch in range(2):
        one, other = ([whole(step) for step in steps_of(backend, made, epoch)] for made in (batches, expected))
        assert_same(one, other)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_parts_of_a_step_longer_than_the_orders_chunk(sampling: str) -> None:
    """Parts do not divide what the order computes at once, and their arrays have their rows alone."""
    backend, n = NumpyBackend(), 2 * CHUNK + 1
    source = ResidentSource(backend, Numbers(n), "float64")
    batches, expected = pair(backend, source, n, 1000, sampling)
    (step,), (wanted,) = (steps_of(backend, made, 3) for made in (batches, expected))
    assert_same([whole(step)], [whole(wanted)])
    arrays = {len(batch.inputs.base) for batch in batches.epoch(0)}
    assert arrays == {1000}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("in_leaves", [False, True])
@pytest.mark.parametrize("size", [1, 5, 12, 33, 100, 1000])
def test_processes_share_a_step(sampling: Any, resident: bool, in_leaves: bool, size: int) -> None:
    """What they have of it is together the step that one alone has; also where some have no row of it.

    It is the step that there is without shards, but where rows are shuffled by windows.
    """
    backend, shards = NumpyBackend(), 8
    source: Source = Numbers(100, weighted=True)
    source = ResidentSource(backend, source, "float32") if resident else source
    options: dict[str, Any] = {"block_rows": 7, "window_blocks": 3}
    by_windows = sampling == "shuffled" and not resident
    alone = Sharding(shards, 3, 0, shards) if by_windows else None
    whole_steps = Batches(backend, source, size, sampling, 5, sharding=alone, **options)
    for processes in (1, 2, 4, 8):
        count, theirs = shards // processes, []
        for process in range(processes):
            sharding = Sharding(shards, 3, process * count, count)
            part = 3 if in_leaves else None
            batches = Batches(backend, source, size, sampling, 5, part_rows=part, sharding=sharding, **options)
            theirs.append([steps_of(backend, batches, epoch) for epoch in (0, 1)])
        for epoch in (0, 1):
            wanted = [step for (step,) in steps_of(backend, whole_steps, epoch)]
            steps = [
                [b for part in parts for b in part] for parts in zip(*(each[epoch] for each in theirs), strict=True)
            ]
            for step, expected in zip(steps, wanted, strict=True):
                assert [b.last for b in step].count(True) == processes
                filled = [b for b in step if b.n]
                assert [b.place for b in filled] == [0, *np.cumsum([b.n for b in filled])[:-1]]
                arrays = zip(*(b.arrays for b in filled), strict=True)
                for array, right in zip(map(np.concatenate, arrays), expected.arrays, strict=True):
                    np.testing.assert_array_equal(array, right)
