"""Windows of rows on several ranks: each reads its own rows alone, and together they take those of one process."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_need_of_ranks import OneOf
from test_windows import Gated, Numbers

from gpu_bp import Batch, Batches, NumpyBackend, Sharding, Source, Trainer, parse_config
from gpu_bp.backends import Backend
from gpu_bp.data.arrays import ArrayReader
from gpu_bp.data.places import Places

LEVEL = 1e-4
SMALL: dict[str, Any] = {"block_rows": 7, "window_blocks": 3}


class Recorded(Numbers):
    """It says which rows it was asked for, all of them."""

    def __init__(self, n_rows: int) -> None:
        super().__init__(n_rows)
        self.rows: list[int] = []

    def fill(self, rows: Any, batch: Batch) -> None:
        self.rows.extend(rows.tolist())
        super().fill(rows, batch)


def batches_of(source: Source, size: int, sampling: Any, sharding: Sharding | None, **more: Any) -> Batches:
    """Batches in small windows; its own backend's, where the source has one."""
    return Batches(source.backend or NumpyBackend(), source, size, sampling, 5, sharding=sharding, **SMALL | more)


def steps_of(batches: Any, backend: Backend | None = None) -> list[list[int]]:
    """The row numbers of each step here, whose inputs and targets must be theirs."""
    backend, steps = backend or NumpyBackend(), [[]]  # type: list[list[int]]
    for batch in batches:
        rows, inputs, targets = map(backend.to_host, (batch.rows, batch.inputs, batch.targets))
        np.testing.assert_array_equal(inputs, 2 * rows[:, None] + [0, 1])
        np.testing.assert_array_equal(targets, 20 * rows[:, None])
        steps[-1] += rows.tolist()
        if batch.last:
            steps.append([])
    return steps[:-1]


def ranks_of(shards: int, n: int) -> list[Sharding]:
    return [Sharding.of_rank(shards, 5, rank, n) for rank in range(n)]


# which places ---------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[Places, list[tuple[int, int]]]:
    """Places, and the same written down: of each its number and shard."""
    n_rows, depth = draw(st.integers(1, 120)), draw(st.integers(0, 5))
    step_rows, shards = draw(st.integers(1, n_rows)), 2**depth
    size = 2 ** draw(st.integers(0, depth))
    sharding = Sharding.of_rank(shards, 1, draw(st.integers(0, size - 1)), size)
    written = []
    for begin in range(0, n_rows, step_rows):
        rows = min(step_rows, n_rows - begin)
        written += [max(s for s in range(shards) if s * rows // shards <= at) for at in range(rows)]
    return Places.of(n_rows, step_rows, sharding, in_order=False), list(enumerate(written))


@given(case=cases(), cuts=st.tuples(st.integers(0, 120), st.integers(0, 120)))
def test_places(case: tuple[Places, list[tuple[int, int]]], cuts: tuple[int, int]) -> None:
    places, written = case
    start, end = (min(cut, len(written)) for cut in sorted(cuts))
    own = [place for place, shard in written if shard in places.shards]
    for shard in range(places.sharding.shards + 1):
        assert places.before(end, shard) == sum(s < shard for _, s in written[:end])
    assert places.here(end) == sum(place < end for place in own)
    assert [places.place(k) for k in range(len(own))] == own
    found = [(place, shard) for shard, a, b in places.runs(start, end) for place in range(a, b)]
    assert found == [(place, shard) for place, shard in written[start:end] if shard in places.shards]
    assert sum(start <= place < end for place in own) <= places.most(end - start) <= end - start


@given(case=cases())
def test_places_in_order(case: tuple[Places, list[tuple[int, int]]]) -> None:
    """The same ones, and those of a step here are one run; where all are here, those of all steps."""
    places, written = case
    own = [place for place, shard in written if shard in places.shards]
    in_order = Places.of(places.n_rows, places.step_rows, places.sharding, in_order=True)
    runs = [(a, b) for _, a, b in in_order.runs(0, len(written))]
    assert [place for a, b in runs for place in range(a, b)] == own
    steps = {place // places.step_rows for place in own}
    assert len(runs) == (1 if places.sharding.count == places.sharding.shards else len(steps))


# the rows of a step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_here", [False, True])
@pytest.mark.parametrize("sampling", ["shuffled", "ordered"])
@pytest.mark.parametrize("part_rows", [None, 3])
@pytest.mark.parametrize("size", [1, 8, 20, 64, 1000])
def test_ranks_take_the_rows_of_one_process(size: int, part_rows: int | None, sampling: str, made_here: bool) -> None:
    """To the row: any number of ranks, windows of 21 rows, steps shorter or longer than these. Each row comes once."""
    n_rows = 203
    for shards in (2, 4, 8):
        epochs: list[list[int]] = []
        for epoch in range(2):
            by_size = []
            for n in (1, 2, 4):
                of_ranks = []
                for sharding in ranks_of(shards, n) if n <= shards else []:
                    source = Numbers(n_rows)
                    source.backend = NumpyBackend() if made_here else None
                    batches = batches_of(source, size, sampling, sharding, part_rows=part_rows)
                    of_ranks.append(steps_of(batches.epoch(epoch)))
                if of_ranks:
                    by_size.append([list(chain(*step)) for step in zip(*of_ranks, strict=True)])
            assert all(steps == by_size[0] for steps in by_size)
            assert [len(step) for step in by_size[0]] == [min(size, n_rows - k) for k in range(0, n_rows, size)]
            epochs.append(list(chain(*by_size[0])))
            assert sorted(epochs[-1]) == list(range(n_rows))
        if sampling == "ordered":
            assert epochs == [list(range(n_rows))] * 2
        else:
            assert epochs[0] != epochs[1]


def test_the_order_without_shards() -> None:
    """Trainings that were begun before there were any go on in the order that they had."""
    first = [47, 35, 42, 43, 45, 36, 49, 48, 37, 46, 38, 44, 40, 41, 39, 5]
    fourth = [35, 17, 36, 38, 39, 14, 16, 18, 49, 15, 40, 41, 19, 20, 37, 3]
    for sharding in (None, Sharding(1, 5, 0, 1)):
        batches = batches_of(Numbers(50), 8, "shuffled", sharding)
        assert list(chain(*islice(steps_of(batches.epoch(0)), 2))) == first
        assert list(chain(*islice(steps_of(batches.epoch(3)), 2))) == fourth


@pytest.mark.parametrize("sampling", ["shuffled", "ordered"])
def test_on_each_backend(backend: Backend, sampling: Any) -> None:
    for sharding in ranks_of(4, 2):
        batches = [
            (b, Batches(b, Numbers(103), 9, sampling, 5, sharding=sharding, **SMALL)) for b in (backend, NumpyBackend())
        ]
        for epoch in range(2):
            found = [steps_of(each.epoch(epoch), b) for b, each in batches]
            assert found[0] == found[1]


@pytest.mark.parametrize("sampling", ["shuffled", "ordered"])
@pytest.mark.parametrize("part_rows", [None, 3])
@pytest.mark.parametrize("size", [3, 20, 70])
def test_an_epoch_from_its_middle_is_its_tail(size: int, part_rows: int | None, sampling: str) -> None:
    """Also where another was left early before, whatever was being read for it."""
    for sharding in ranks_of(8, 4):
        batches = batches_of(Numbers(203), size, sampling, sharding, part_rows=part_rows)
        for epoch in range(3):
            whole = steps_of(batches.epoch(epoch))
            for first in range(0, len(whole) + 1, max(1, len(whole) // 5)):
                left = batches.epoch(epoch + 1)
                list(islice(left, first % 3))
                left.close()
                assert steps_of(batches.epoch(epoch, first)) == whole[first:]


@pytest.mark.parametrize("n_rows", [1, 3, 5, 22])
@pytest.mark.parametrize("sampling", ["shuffled", "ordered"])
def test_fewer_rows_than_shards(n_rows: int, sampling: str) -> None:
    """Ranks without rows read nothing, and have steps as the others do."""
    taken: Counter[int] = Counter()
    for sharding in ranks_of(32, 16):
        source = Recorded(n_rows)
        batches = batches_of(source, 30, sampling, sharding, block_rows=2)
        for epoch in range(2):
            steps = steps_of(batches.epoch(epoch, follows=epoch == 0))
            assert len(steps) == 1
            taken.update(chain(*steps))
        assert bool(source.rows) == any(steps)
    assert taken == dict.fromkeys(range(n_rows), 2)


# what is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["shuffled", "ordered"])
@pytest.mark.parametrize("size", [8, 64, 1000])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_rank_reads_its_own_rows_alone(n: int, size: int, sampling: str) -> None:
    """Each once, in an epoch: no more than a share of them, but for what does not come out even."""
    n_rows = 1003
    for sharding in ranks_of(8, n):
        source = Recorded(n_rows)
        batches = batches_of(source, size, sampling, sharding)
        steps = steps_of(batches.epoch(0, follows=False))
        assert sorted(source.rows) == sorted(chain(*steps))
        assert abs(len(source.rows) - n_rows / n) <= len(steps)
        assert batches.asked_rows <= 21


@pytest.mark.parametrize("sampling", ["shuffled", "ordered"])
def test_a_rank_reads_its_part_of_a_file(sampling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a training, and when it is evaluated."""
    asked: list[int] = []
    read = ArrayReader.read
    monkeypatch.setattr(
        ArrayReader, "read", lambda self, first, n, out=None: [asked.append(n), read(self, first, n, out)][1]
    )
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.standard_normal((2000, 3)))
    np.save(tmp_path / "d.npy", rng.standard_normal(2000))
    files = {"inputs": str(tmp_path / "x.npy"), "targets": str(tmp_path / "d.npy")}
    config = {
        "data": {"kind": "arrays", **files, "residency": "host", "block_rows": 50, "window_blocks": 8},
        "network": {"hidden": [3]},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
        "train": {"epochs": 2, "batch_size": 100, "shards": 4, "sampling": sampling},
    }
    for size in (1, 2, 4):
        trainer = Trainer(parse_config(config), NumpyBackend(), ranks=OneOf(size - 1, size))
        asked.clear()
        list(trainer.run())
        assert (sum(asked), trainer.steps) == (2 * 2000 // size, 40)
        asked.clear()
        trainer.evaluate()
        assert sum(asked) == 2000 // size


def test_what_it_holds() -> None:
    """Its share of a window, where a step is short against that; and never more than without shards."""
    window = 64 * SMALL["block_rows"]
    for size, rows in ((8, window // 4 + 4), (64, window // 4 + 32), (1000, window)):
        windows = batches_of(Numbers(5000), size, "shuffled", ranks_of(8, 4)[1], window_blocks=64)._windows
        assert windows is not None
        assert len(windows._slots[0].device.inputs) == windows.rows <= rows


def test_its_next_window_is_read_ahead() -> None:
    """Also where the windows between are those of other ranks."""
    source = Gated(400, 25)  # steps of eight windows, of which the first four are those of this rank
    sharding = Sharding(2, 25, 0, 1)
    batches = batches_of(source, 200, "ordered", sharding, part_rows=25, block_rows=25, window_blocks=1)
    epoch = batches.epoch(0, follows=False)
    for window in (0, 1, 2, 3, 8, 9, 10, 11):
        source.gates[window].set()
        assert steps_of([next(epoch)]) in ([], [list(range(25 * window, 25 * window + 25))])
        following = {3: 8, 11: None}.get(window, window + 1)
        if following:
            assert source.asked_for[following].wait(30), "nobody reads the next window"
    assert list(epoch) == []
    assert source.asked == [25 * window for window in (0, 1, 2, 3, 8, 9, 10, 11)]


def test_a_set_of_one_window_stays() -> None:
    """Its part of it is read once."""
    source = Recorded(100)
    batches = batches_of(source, 16, "shuffled", Sharding(4, 5, 2, 1), window_blocks=100)
    orders = [list(chain(*steps_of(batches.epoch(epoch)))) for epoch in range(3)]
    assert sorted(source.rows) == sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("sampling", ["shuffled", "ordered"])
def test_a_broken_row_is_the_error_of_one_rank(sampling: str) -> None:
    errors = []
    for rank, sharding in enumerate(ranks_of(4, 4)):
        try:
            steps_of(batches_of(Numbers(200, broken=60), 16, sampling, sharding).epoch(0))
        except RuntimeError as error:
            errors.append((rank, str(error)))
    (found,) = errors
    assert found[1] == "row 60 is broken"


def test_one_thread_reads() -> None:
    before = set(threading.enumerate())
    batches = batches_of(Numbers(200), 16, "shuffled", Sharding(8, 5, 0, 8))
    epoch = batches.epoch(0)
    next(epoch)
    assert len(set(threading.enumerate()) - before) == 1
    epoch.close()


# how well they are shuffled -------------------------------------------------------------------------------------------


def test_shuffled_by_shards() -> None:
    """Over the epochs a row is in every shard as often, and the first of two rows of a block and a shard is either."""
    n_rows, size, shards, epochs, block = 320, 16, 4, 120, 4
    source = Numbers(n_rows)
    source.backend = NumpyBackend()  # without a thread it is faster
    batches = batches_of(source, size, "shuffled", Sharding(shards, 16, 0, shards), block_rows=block)
    places = np.array([np.argsort(list(chain(*steps_of(batches.epoch(epoch))))) for epoch in range(epochs)])
    of_shard = places % size // (size // shards)  # by epoch and row, as the places are
    firsts = of_shard[:, ::block]  # of each block one row: those of one are not independent
    counts = np.array([(firsts == shard).sum(axis=0) for shard in range(shards)])
    expected = epochs / shards
    assert stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), (shards - 1) * counts.shape[1]) > LEVEL
    for epoch in range(20):
        assert stats.spearmanr(places[epoch, ::block], np.arange(n_rows // block)).pvalue > LEVEL
        assert stats.spearmanr(places[epoch, ::block], places[epoch + 1, ::block]).pvalue > LEVEL
    one, other = places[:, ::block], places[:, 1::block]
    earlier = (one < other)[of_shard[:, ::block] == of_shard[:, 1::block]]
    assert len(earlier) > 1000
    assert stats.binomtest(int(earlier.sum()), len(earlier)).pvalue > LEVEL
