"""The gradient of a step whose rows are split into shards (see `sharding.py`), by one worker or several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from gpu_bp.backends.base import Action
from gpu_bp.data.source import Batch
from gpu_bp.objective import Objective
from gpu_bp.sharding import Operation, Sharding
from gpu_bp.share import Share
from gpu_bp.spec import Array


class ShardedGradient:
    """The sums over the rows of a step, which may come in several batches, as they are cut by `Sharding.leaves`.

    Args:
        objective: whose gradient and sums they become. steps: see `Share`.
        record: keeps what is done again and again under a key, for a worker; see `Backend.record`.
        across: makes arrays the sums over all processes, in the order of the tree; None where this one is alone.

    Attributes:
        part_rows: -1, since a batch of any size is cut, also one of no rows. objective: what works on a leaf.
        shares: the objective's alone, `used` once it has all of a step.
    """

    part_rows = -1

    def __init__(
        self,
        objective: Objective,
        steps: Array,
        sharding: Sharding,
        record: Callable[[tuple[object, ...], Action, int], Action],
        across: Callable[[Sequence[Array]], None] | None = None,
    ) -> None:
        self._whole = objective
        self._backend = objective.network.backend
        self.objective = objective.in_parts(sharding.leaf_rows)
        self.shares = [Share(objective, steps)]
        self.used = 0
        self._sharding = sharding
        self._steps = steps
        self._record = record
        self._across = across
        self._slots: list[list[Share]] = []  # of each worker
        self._plans: dict[tuple[object, ...], list[list[_Work]]] = {}
        # of a step in several batches: its rows, and what is still to be done
        self._rows = 0
        self._next: Operation | None = None
        self._others: Iterator[Operation] = iter(())

    def __call__(self, batch: Batch) -> None:
        """Goes on with a step; with its last batch all is in the objective's gradient, its sums and its share.

        Raises:
            ValueError: a batch that does not follow the one before, or does not end where a leaf does.
        """
        if batch.place == self._sharding.rows(batch.step_rows)[0] and self._next is not None:
            self.forget()  # the step before was not finished
        plan, weighted = self._plan(batch), self._whole.weighs(batch)
        self._backend.together([partial(_do, works, batch) for works in plan], alike=True)
        if batch.last:
            workers = len(plan)
            self._record(("sum of workers", workers, weighted), partial(self._sum_of_workers, workers, weighted), 0)()
            if self._across is not None:
                root = self._slots[0][0]
                weights = [root.weight, root.objective.weight] if weighted else []
                self._across([root.objective.gradients, root.objective.total, *weights])
            self._record(("end", weighted), partial(self._end, weighted), 0)()
            self._whole.count(batch, batch.step_rows)
            self.used = 1

    def _plan(self, batch: Batch) -> list[list[_Work]]:
        """What each worker does with a batch."""
        n = batch.step_rows
        if not batch.last or (batch.place, batch.place + batch.n) != self._sharding.rows(n):
            return [self._part(batch)]
        workers = self._workers(batch.n)
        key = n, workers, *batch.kind
        if key not in self._plans:
            count = self._sharding.count // workers
            starts = [self._sharding.first + worker * count for worker in range(workers)]
            self._plans[key] = [
                [self._work(each, batch, worker) for each in self._sharding.operations(n, first, count)]
                for worker, first in enumerate(starts)
            ]
        return self._plans[key]

    def _workers(self, n: int) -> int:
        """How many work on so many rows at once: a power of two."""
        most = min(self._backend.division(self._whole.network.widths, max(1, n)).workers, self._sharding.count)
        return 1 << (most.bit_length() - 1)

    def _part(self, batch: Batch) -> list[_Work]:
        """What is done with one batch of several."""
        sharding, n, end = self._sharding, batch.step_rows, batch.place + batch.n
        if batch.place == sharding.rows(n)[0]:
            self._rows, self._others = n, sharding.operations(n, sharding.first, sharding.count)
            self._next = next(self._others)
        follows, works = self._rows == n, []
        while self._next is not None and self._next.end <= end:
            works.append(self._work(self._next, batch, 0))
            self._next = next(self._others, None)
        fits = works and works[0].start == batch.place and works[-1].end == end
        if not (follows and fits and batch.last == (self._next is None)):
            raise ValueError(
                f"rows {batch.place} to {end} of a step of {n} in {sharding.shards} shards; cut it as Sharding.leaves "
                "does, and say rows_in_step"
            )
        return works

    def _work(self, operation: Operation, batch: Batch, worker: int) -> _Work:
        at, start, end, add = operation
        slots = self._slots_of(worker, at + 1)
        slot = slots[at]
        if add:
            other, weighted = slots[at + 1], self._whole.weighs(batch)
            key: tuple[object, ...] = "add", worker, at, weighted
            return _Work(start, end, self._record(key, partial(slot.add, other, weighted), worker))
        if start == end:
            return _Work(start, end, self._record(("none", worker, at), slot.clear, worker))
        rows = slots[0].part(batch, end - start)
        place = start if self._whole.noise is not None else 0
        run = partial(slot.gradient, replace(rows, place=place), add=False)
        key = "leaf", worker, at, rows.n, place, *batch.kind
        return _Work(start, end, self._record(key, run, worker), slots[0])

    def _slots_of(self, worker: int, count: int) -> list[Share]:
        """The slots of a worker; the first one of all has the objective's gradient."""
        if worker == len(self._slots):
            own = self._whole.like(self.objective.batch_size) if worker else self.objective
            self._slots.append([Share(own.beside(own.gradients), self._steps)])
        slots = self._slots[worker]
        while len(slots) < count:
            slots.append(Share(slots[0].objective.beside(), self._steps))
        return slots

    def _sum_of_workers(self, workers: int, weighted: bool) -> None:
        """The sums of the workers in the same tree."""
        stride = 1
        while stride < workers:
            for worker in range(0, workers, 2 * stride):
                self._slots[worker][0].add(self._slots[worker + stride][0], weighted)
            stride *= 2

    def _end(self, weighted: bool) -> None:
        """The sums of all are those of the objective."""
        share = self.shares[0]
        if weighted:
            self._backend.fill(share.weight, 0)
        share.add_totals(self._slots[0][0], weighted)

    def cuts(self, batch: Batch) -> list[tuple[int, int]]:
        """First and end of the leaves of a batch; of one without rows its own."""
        place, end = batch.place, batch.place + batch.n
        leaves = self._sharding.leaves(batch.step_rows)
        return [(a - place, b - place) for a, b in leaves if place <= a and b <= end] or [(0, 0)]

    def forget_plans(self) -> None:
        """What was recorded is gone."""
        self._plans.clear()

    def forget(self) -> None:
        """After a step that was not finished: nothing of it is added to the next."""
        self._next = None
        for slots in self._slots:
            for slot in slots:
                slot.clear()


class _Work(NamedTuple):
    """What is done once the rows up to `end` are there: they are taken into the arrays of a share first, if any."""

    start: int
    end: int
    action: Action
    share: Share | None = None


def _do(works: Sequence[_Work], batch: Batch) -> None:
    for start, end, action, share in works:
        if share is not None:
            share.take(batch, start - batch.place, end - batch.place)
        action()
