"""Which places of an epoch are worked on here, where the rows of its steps are split into shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpu_bp.sharding import Sharding


@dataclass(frozen=True)
class Places:
    """The places of an epoch, 0 to n_rows, in steps of `step_rows`, of which the last may be shorter; by shard."""

    n_rows: int
    step_rows: int
    sharding: Sharding

    @classmethod
    def of(cls, n_rows: int, step_rows: int, sharding: Sharding | None, *, in_order: bool) -> Places:
        """Those of a sharding; all, where there is none. `in_order`: those here are not told apart by shard."""
        if sharding is not None and in_order:
            count = sharding.count
            sharding = Sharding(sharding.shards // count, sharding.leaf_rows, sharding.first // count, 1)
        if sharding is None or sharding.shards == 1:
            return cls(n_rows, n_rows, Sharding(1, 1, 0, 1))
        return cls(n_rows, step_rows, sharding)

    @property
    def shards(self) -> range:
        """The shards that are worked on here."""
        return range(self.sharding.first, self.sharding.first + self.sharding.count)

    def before(self, place: int, shard: int) -> int:
        """How many of the places before this one are of the shards before that one."""
        step, at = divmod(place, self.step_rows)
        edge = self.sharding.edge
        return step * edge(self.step_rows, shard) + min(at, edge(self._rows(step), shard))

    def of_shard(self, place: int, shard: int) -> int:
        """How many of the places before this one are of this shard."""
        return self.before(place, shard + 1) - self.before(place, shard)

    def here(self, place: int) -> int:
        """How many of the places before this one are worked on here."""
        return self.before(place, self.shards.stop) - self.before(place, self.shards.start)

    def most(self, n: int) -> int:
        """As many at most of n consecutive places are worked on here."""
        return min(n, self.here(self.n_rows), (n // self.step_rows + 2) * self.sharding.most_rows(self.step_rows))

    def place(self, k: int) -> int:
        """The place of number k, from 0 on, of those that are worked on here."""
        full, each = self.n_rows // self.step_rows, self.here(self.step_rows)
        step = min(k // each, full) if each else full
        return step * self.step_rows + self.sharding.rows(self._rows(step))[0] + k - step * each

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """What is worked on here of the places from start to end, in their order: shard, first place and end."""
        for step in range(start // self.step_rows, -(-end // self.step_rows)):
            begin, rows = step * self.step_rows, self._rows(step)
            for shard in self.shards:
                first = max(start, begin + self.sharding.edge(rows, shard))
                last = min(end, begin + self.sharding.edge(rows, shard + 1))
                if first < last:
                    yield shard, first, last

    def _rows(self, step: int) -> int:
        return max(0, min(self.step_rows, self.n_rows - step * self.step_rows))
