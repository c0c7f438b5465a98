"""Orders of rows: pseudo-random permutations, the order of an epoch, and shuffling by blocks and windows. Every row
comes once whatever the numbers, and where one is told nothing of where another is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gpu_bp import Batch, Batches, Source
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.data.order import CHUNK, Order
from gpu_bp.data.task import Task
from gpu_bp.data.windows import Blocks
from gpu_bp.kernels import shuffle
from gpu_bp.registry import Permutations, Purpose

LEVEL = 1e-4


# Permutations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 10**6 + 3])
def test_every_number_once(backend: Backend, n: int) -> None:
    """And the same on every backend, in one piece or from the middle on."""
    permutations = Permutations.of(11, Purpose.ORDER, n, first=5, count=2)
    out = backend.to_device(np.full((2, n), -1))
    backend.permute(permutations, 0, out)
    got, numbers = backend.to_host(out), np.arange(n)
    np.testing.assert_array_equal(np.sort(got), [numbers, numbers])
    np.testing.assert_array_equal(got, permutations(numbers))
    np.testing.assert_array_equal(permutations.inverse(got[1, :1000])[1], numbers[:1000])
    part = backend.to_device(np.full((1, n - n // 2), -1))
    backend.permute(Permutations.of(11, Purpose.ORDER, n, first=5), n // 2, part)
    np.testing.assert_array_equal(backend.to_host(part)[0], got[0, n // 2 :])


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_inverse(n: int, seed: int, data: st.DataObject) -> None:
    """Of any number below any n: back to itself, forwards and backwards."""
    numbers = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    p = Permutations.of(seed, Purpose.ORDER, n, first=2**32)
    for there in (p(numbers)[0], p.inverse(numbers)[0]):
        assert ((there >= 0) & (there < n)).all()
    np.testing.assert_array_equal(p.inverse(p(numbers)[0])[0], numbers)
    np.testing.assert_array_equal(p(p.inverse(numbers)[0])[0], numbers)


@given(st.integers(2**40, 2**62), st.integers(0, 2**64 - 1), st.integers(0, 2**40 - 50))
def test_large_permutations(n: int, seed: int, first: int) -> None:
    """By the definition, in Python's whole numbers, where NumPy's products overflow as they should."""
    p = Permutations.of(seed, Purpose.ORDER, n, first=0)
    keys = [int(key) for key in p.keys[:, 0, 0]]

    def hashed(x: int, key: int, modulus: int) -> int:
        h = ((x ^ key) * 0x9E3779B97F4A7C15) % 2**64
        h = ((h ^ h >> 32) * 0xD6E8FEB86659FD93) % 2**64
        return ((h >> 32) * modulus) >> 32

    def image(x: int) -> int:
        left, right = divmod(x, p.b)
        for k in range(0, len(keys), 2):
            left = (left + hashed(right, keys[k], p.a)) % p.a
            right = (right + hashed(left, keys[k + 1], p.b)) % p.b
        x = left * p.b + right
        return x if x < n else image(x)

    assert p(np.arange(first, first + 3))[0].tolist() == [image(x) for x in range(first, first + 3)]


@pytest.mark.parametrize("n", [2**62, 2**62 - 1, 2**40 + 7, 2**32 + 1, 12345])
def test_large_permutations_of_a_backend(backend: Backend, n: int) -> None:
    p = Permutations.of(2**64 - 1, Purpose.ORDER, n, first=3)
    for first in (0, n // 3, n - 1000):
        out = backend.to_device(np.full((1, 1000), -1))
        backend.permute(p, first, out)
        np.testing.assert_array_equal(backend.to_host(out), p(np.arange(first, first + 1000)))


def images(n: int, epochs: int) -> np.ndarray:
    """The permutations of n numbers of so many epochs: (epochs, n)."""
    return Permutations.of(4, Purpose.ORDER, n, first=0, count=epochs)(np.arange(n))


def unlike_random() -> list[str]:
    """What is not as among permutations that are drawn, each as likely as any other: nothing, of good ones."""
    found = []
    drawn = dict.fromkeys(itertools.permutations(range(4)), 0)
    for order in map(tuple, images(4, 12_000).tolist()):
        drawn[order] += 1
    if stats.chisquare(list(drawn.values())).pvalue < LEVEL:
        found.append("the 24 permutations of 4 are not equally likely")
    for n, epochs, count in ((5, 3000, 120), (6, 10_000, 720), (7, 70_000, 5040)):
        if len(np.unique(images(n, epochs) @ n ** np.arange(n))) < count:
            found.append(f"some of the {count} permutations of {n} do not occur")
    for n in (100, 20_000):
        for k, order in enumerate(images(n, 5)):
            neighbours = stats.pearsonr(order[1:], order[:-1]).pvalue
            if min(stats.spearmanr(np.arange(n), order).pvalue, neighbours) < LEVEL:
                found.append(f"permutation {k} of {n} is correlated with the order of the numbers")
        first, second = images(n, 2)
        if stats.spearmanr(first, second).pvalue < LEVEL:
            found.append(f"two permutations of {n} are correlated")
    return found


def test_permutations_are_random() -> None:
    assert unlike_random() == []


@pytest.mark.parametrize("rounds", [2, 4])
def test_fewer_rounds_are_seen(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    monkeypatch.setattr(shuffle, "ROUNDS", rounds)
    assert unlike_random()


# The order of an epoch ---------------------------------------------------------------------------------------


def one_epoch(order: Order, backend: Backend, epoch: int, length: int, size: int, first: int = 0) -> list[int]:
    """The rows of an epoch, batch by batch, from batch number `first` on."""
    starts = range(first * size, length, size)
    return [r for s in starts for r in backend.to_host(order.rows(epoch, s, min(size, length - s))).tolist()]


@pytest.mark.parametrize("sampling", ["ordered", "shuffled", "replacement"])
@pytest.mark.parametrize(("n", "size"), [(1, 1), (7, 3), (1000, 64), (CHUNK + 5, 1000), (2 * CHUNK + 1, CHUNK + 1)])
def test_order(backend: Backend, sampling: Any, n: int, size: int) -> None:
    """Short epochs are computed many at once, long ones in pieces; neither shows, nor where one begins."""
    length = -(-n // size) * size if sampling == "replacement" else n
    order = Order(backend, sampling, 9, n, length, size)
    for epoch in (0, 3, 4, 100_000):
        got = one_epoch(order, backend, epoch, length, size)
        if sampling == "ordered":
            assert got == list(range(n))
        elif sampling == "shuffled":
            assert got == Permutations.of(9, Purpose.ORDER, n, epoch)(np.arange(n))[0].tolist()
        else:
            assert got == np.floor(numbers_of(9, epoch * length, length) * n).astype(int).tolist()
        middle = length // size // 2
        fresh = Order(backend, sampling, 9, n, length, size)
        assert one_epoch(fresh, backend, epoch, length, size, middle) == got[middle * size :]


def numbers_of(seed: int, start: int, count: int) -> np.ndarray:
    """Uniforms of the stream of orders, by NumPy alone."""
    philox = np.random.Philox(key=np.array([seed, Purpose.ORDER], np.uint64))
    philox.advance(start // 4)
    return np.random.Generator(philox).random(start % 4 + count)[start % 4 :]


# Blocks and windows ------------------------------------------------------------------------------------------


@st.composite
def cuts(draw: Any) -> Blocks:
    """Some rows, in blocks and windows of any size."""
    n = draw(st.integers(1, 300))
    rows = draw(st.integers(1, n))
    window = draw(st.integers(1, -(-n // rows)))
    return Blocks(n, rows, window, draw(st.sampled_from(["ordered", "shuffled"])), draw(st.integers(0, 2**63)))


def walk(blocks: Blocks, epoch: int) -> list[list[tuple[int, int]]]:
    """The ranges of rows of each window."""
    return [blocks.blocks(epoch, window) for window in range(blocks.windows)]


@given(cuts(), st.integers(0, 10**6))
def test_every_row_once_by_windows(blocks: Blocks, epoch: int) -> None:
    windows = walk(blocks, epoch)
    rows = [row for ranges in windows for first, n in ranges for row in range(first, first + n)]
    assert sorted(rows) == list(range(blocks.n_rows))
    assert max(sum(n for _, n in ranges) for ranges in windows) <= blocks.window_rows
    if blocks.sampling == "ordered":
        assert rows == list(range(blocks.n_rows))
    elif blocks.windows > 1:  # whole blocks, so that each is within one window
        assert all(first % blocks.rows == 0 and n <= blocks.rows for ranges in windows for first, n in ranges)
        assert all(len(ranges) == blocks.window for ranges in windows[:-1])


@given(cuts(), st.integers(0, 10**6))
def test_find_agrees_with_walking(blocks: Blocks, epoch: int) -> None:
    sizes = [sum(n for _, n in ranges) for ranges in walk(blocks, epoch)]
    places = [(window, k) for window, n in enumerate(sizes) for k in range(n)]
    assert [blocks.find(epoch, place) for place in range(blocks.n_rows)] == places


def test_blocks_come_in_random_order() -> None:
    """By blocks, the place says nothing of the number, nor does the order of one epoch of that of another."""
    blocks = Blocks(5 * 3000 - 2, 5, 8, "shuffled", 1)
    orders = [[first // 5 for ranges in walk(blocks, epoch) for first, _ in ranges] for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(3000))
        assert stats.spearmanr(order, np.arange(3000)).pvalue > LEVEL
        assert stats.pearsonr(order[1:], order[:-1]).pvalue > LEVEL
    assert all(stats.spearmanr(a, b).pvalue > LEVEL for a, b in itertools.combinations(orders, 2))


class Numbers(Source):
    """Row i is (2 i, 2 i + 1), and its target 20 i; on the host, in blocks."""

    def __init__(self, n_rows: int) -> None:
        super().__init__(n_rows, 2, 1, Task("none"), block_rows=4)

    def fill(self, rows: Any, batch: Batch) -> None:
        batch.inputs[:] = 2 * rows[:, None] + [0, 1]
        batch.targets[:] = 20 * rows[:, None]


def taken(backend: Backend, batches: Batches, epoch: int, first: int = 0, count: int | None = None) -> list[list[int]]:
    """The row numbers of the batches of an epoch, each of which holds the rows of these numbers."""
    seen = []
    for batch in itertools.islice(batches.epoch(epoch, first), count):
        rows = backend.to_host(batch.rows)
        np.testing.assert_array_equal(backend.to_host(batch.inputs), 2 * rows[:, None] + [0, 1])
        np.testing.assert_array_equal(backend.to_host(batch.targets), 20 * rows[:, None])
        seen.append(rows.tolist())
    return seen


@pytest.mark.parametrize("sampling", ["ordered", "shuffled"])
@pytest.mark.parametrize("window_blocks", [3, 100])
def test_batches_by_windows(backend: Backend, sampling: Any, window_blocks: int) -> None:
    """The same on every backend, and from any batch on, after an epoch that was left early too."""

    def make(b: Backend) -> Batches:
        return Batches(b, Numbers(103), 7, sampling, seed=2, dtype="float64", window_blocks=window_blocks)

    batches, host = make(backend), NumpyBackend()
    whole = taken(backend, batches, 1)
    assert whole == taken(host, make(host), 1)
    assert sorted(itertools.chain(*whole)) == list(range(103))
    assert (whole == taken(backend, batches, 2)) == (sampling == "ordered")
    for first in (0, 1, 8, 14):
        taken(backend, batches, 1, first=3, count=2)
        assert taken(backend, batches, 1, first) == whole[first:]
    if sampling == "shuffled":  # rows of a block within one window, of 12 rows or 11, but not in their order
        places = np.argsort(list(itertools.chain(*whole)))
        assert window_blocks == 100 or all(np.ptp(places[k : k + 4]) < 12 for k in range(0, 103, 4))
        assert stats.spearmanr(places, np.arange(103)).pvalue > LEVEL
