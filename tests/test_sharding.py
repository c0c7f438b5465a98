"""The shards of a step and the tree in which their sums are added, against the same written down another way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_bp import Sharding


def in_pairs(values: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """The sum of a power of two of values: level by level."""
    while len(values) > 1:
        values = [add(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def leaves_of(n: int, shards: int, shard: int, leaf_rows: int) -> list[tuple[int, int]]:
    """Of one shard: as even as may be, the last of them the larger ones."""
    start, end = math.floor(shard * n / shards), math.floor((shard + 1) * n / shards)
    parts = math.ceil((end - start) / leaf_rows)
    edges = [start + k * (end - start) // parts for k in range(parts)] + [end]
    return list(itertools.pairwise(edges)) if parts else []


def sum_in_tree(
    rows: Callable[[int, int], Any], zero: Any, n: int, sharding: Sharding, add: Callable[[Any, Any], Any] = np.add
) -> Any:
    """What a `Sharding` says, written down another way; `rows` gives the sum of the rows of a leaf."""
    of_shards = []
    for shard in range(sharding.first, sharding.first + sharding.count):
        of_leaves = [rows(a, b) for a, b in leaves_of(n, sharding.shards, shard, sharding.leaf_rows)] or [zero]
        total = of_leaves[0]
        for other in of_leaves[1:]:
            total = add(total, other)
        of_shards.append(total)
    return in_pairs(of_shards, add)


def executed(sharding: Sharding, n: int, first: int, count: int, rows: Callable[[int, int], Any], zero: Any) -> Any:
    """What the operations make of numbers; they may use only what they have put there."""
    slots: dict[int, Any] = {}
    for slot, start, end, add in sharding.operations(n, first, count):
        if add:
            slots[slot] = slots[slot] + slots.pop(slot + 1)
        else:
            slots[slot] = rows(start, end) if start < end else zero
    assert list(slots) == [0]
    return slots[0]


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    depth = draw(st.integers(0, 6))
    of_count = draw(st.integers(0, depth))
    count = 2**of_count
    return Sharding(
        2**depth, draw(st.integers(1, 40)), count * draw(st.integers(0, 2 ** (depth - of_count) - 1)), count
    )


@given(sharding=shardings(), n=st.integers(0, 700))
def test_leaves(sharding: Sharding, n: int) -> None:
    """They cover the rows of their shards in order, each with some, and no two shards share one."""
    first, end = (math.floor(n * (sharding.first + k) / sharding.shards) for k in (0, sharding.count))
    assert sharding.rows(n) == (first, end)
    shards = range(sharding.first, sharding.first + sharding.count)
    leaves = list(sharding.leaves(n))
    assert leaves == [leaf for s in shards for leaf in leaves_of(n, sharding.shards, s, sharding.leaf_rows)]
    assert [row for a, b in leaves for row in range(a, b)] == list(range(first, end))
    assert all(0 < b - a <= sharding.leaf_rows for a, b in leaves)


@given(sharding=shardings(), n=st.integers(1, 700))
def test_the_largest_leaf(sharding: Sharding, n: int) -> None:
    everywhere = Sharding(sharding.shards, sharding.leaf_rows, 0, sharding.shards)
    assert sharding.largest_leaf(n) == max(b - a for a, b in everywhere.leaves(n))


@given(sharding=shardings(), n=st.integers(0, 700), seed=st.integers(0, 99))
def test_operations_are_the_tree(sharding: Sharding, n: int, seed: int) -> None:
    """In float32, where another order gives other bits; a subtree that was computed apart takes its place."""
    x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)

    def rows(a: int, b: int) -> np.float32:
        return x[a:b].sum(dtype=np.float32)

    zero, first, count = np.float32(0), sharding.first, sharding.count
    whole = executed(sharding, n, first, count, rows, zero)
    assert whole == sum_in_tree(rows, zero, n, sharding)
    if count > 1:
        halves = (executed(sharding, n, first + k * count // 2, count // 2, rows, zero) for k in (0, 1))
        assert whole == np.add(*halves)


@given(sharding=shardings(), n=st.integers(0, 700))
def test_few_slots(sharding: Sharding, n: int) -> None:
    """And what is known at a row is never needed later than it says: the ends do not fall."""
    operations = list(sharding.operations(n, sharding.first, sharding.count))
    assert max(each.slot for each in operations) + 1 <= math.log2(sharding.count) + 2
    ends = [each.end for each in operations]
    assert ends == sorted(ends)


@pytest.mark.parametrize(
    "numbers", [(3, 1, 0, 1), (4, 0, 0, 4), (4, 1, 1, 2), (4, 1, 0, 3), (4, 1, 4, 1), (0, 1, 0, 1)]
)
def test_what_is_no_sharding(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="shards"):
        Sharding(*numbers)
