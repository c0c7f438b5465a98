"""A step's gradient as a sum over shards, in a fixed binary tree: the same bits however many compute it.

The n rows of a step are split into S shards, shard i from row floor(i n / S) on; S is a power of two. What is summed
over rows (the gradient, the loss, what the rows weigh) is summed within each shard by one worker, whose products take
a single thread, and then in pairs: shard 0 and 1, 2 and 3, then the sums of these, and so on. Who has a power of two
of consecutive shards computes a subtree of it, and the order of all additions stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Operation(NamedTuple):
    """The sums over the rows from start to end of a step are put into a slot, of which there may be none.

    Or, with `add`, those of the next slot are added to it; no row beyond `end` has a part in them.
    """

    slot: int
    start: int
    end: int
    add: bool = False


@dataclass(frozen=True)
class Sharding:
    """How the rows of a step are split, and which of them are worked on here.

    shards: S, a power of two. leaf_rows: rows that are worked on at a time, at most: a larger shard is cut, as evenly
    as may be. first, count: the shards of this process; a power of two of them, of which the first is a multiple.
    """

    shards: int
    leaf_rows: int
    first: int
    count: int

    def __post_init__(self) -> None:
        if min(self.shards, self.leaf_rows, self.count) < 1 or self.shards & (self.shards - 1):
            raise ValueError(f"{self.shards} shards in leaves of {self.leaf_rows} rows; a power of two, and 1 or more")
        if self.count & (self.count - 1) or self.first % self.count or not 0 <= self.first < self.shards:
            raise ValueError(f"shards {self.first} to {self.first + self.count} of {self.shards} are no subtree")

    @classmethod
    def of_rank(cls, shards: int, leaf_rows: int, rank: int, size: int) -> Sharding:
        """That of one of so many processes, which share the shards out evenly."""
        return cls(shards, leaf_rows, rank * (shards // size), shards // size)

    def rows(self, n: int) -> tuple[int, int]:
        """Of n rows of a step the first that is worked on here, and the end of them."""
        return self.edge(n, self.first), self.edge(n, self.first + self.count)

    def most_rows(self, n: int) -> int:
        """As many rows at most are worked on here, of a step of n rows or fewer."""
        return -(-n * self.count // self.shards)

    def leaves(self, n: int) -> Iterator[tuple[int, int]]:
        """What is worked on at a time here, of a step of n rows: first and end, none without rows."""
        for each in self.operations(n, self.first, self.count):
            if not each.add and each.start < each.end:
                yield each.start, each.end

    def largest_leaf(self, n: int) -> int:
        """Rows that are worked on at a time of a step of n rows, here or elsewhere, at most."""
        of_shards = {n // self.shards, -(-n // self.shards)} - {0}
        return max(-(-rows // -(-rows // self.leaf_rows)) for rows in of_shards)

    def operations(self, n: int, first: int, count: int, slot: int = 0) -> Iterator[Operation]:
        """What puts the sums over `count` shards from `first` on into a slot, in slots from there on."""
        start, end = self.edge(n, first), self.edge(n, first + count)
        if count > 1:
            yield from self.operations(n, first, count // 2, slot)
            yield from self.operations(n, first + count // 2, count // 2, slot + 1)
            yield Operation(slot, start, end, add=True)
            return
        parts = max(1, -(-(end - start) // self.leaf_rows))
        for k in range(parts):
            cuts = start + (end - start) * k // parts, start + (end - start) * (k + 1) // parts
            yield Operation(slot + (k > 0), *cuts)
            if k:
                yield Operation(slot, start, cuts[1], add=True)

    def edge(self, n: int, shard: int) -> int:
        """Of n rows of a step the first of a shard."""
        return shard * n // self.shards
