"""The gradient of a step whose rows are split into shards (see `sharding.py`), by one worker or several at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
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
        share: the objective's, with what the step's rows weighed.
    """

    def __init__(
        self,
        objective: Objective,
        steps: Array,
        sharding: Sharding,
        record: Callable[[tuple[object, ...], Action, int], Action],
        across: Callable[[Sequence[Array]], None] | None = None,
    ) -> None:
        self.share = Share(objective, steps)
        self.sharding = sharding
        self._objective = objective
        self._backend = objective.network.backend
        self._steps = steps
        self._record = record
        self._across = across
        self._slots: list[list[Share]] = []  # of each worker
        self._plans: dict[tuple[object, ...], list[list[_Work]]] = {}

    def workers(self, n: int) -> int:
        """How many work on so many rows at once: a power of two."""
        widths = self._objective.network.widths
        most = min(self._backend.division(widths, max(1, n)).workers, self.sharding.count)
        return 1 << (most.bit_length() - 1)

    def __call__(self, batch: Batch) -> None:
        """Goes on with a step; with its last batch all is in the objective's gradient, its sums and `share`."""
        n, here = batch.step_rows, self.sharding.rows(batch.step_rows)
        whole = (batch.place, batch.place + batch.n) == here
        workers = self.workers(batch.n) if whole else 1
        key = n, workers, batch.targets.ndim, batch.weights is not None
        if key not in self._plans:
            self._plans[key] = self._plan(batch, workers)
        plan = self._plans[key]
        if not whole:
            ends = [work.end for work in plan[0]]
            done = bisect_right(ends, batch.place) if batch.place > here[0] else 0
            plan = [plan[0][done : bisect_right(ends, batch.place + batch.n)]]
        self._backend.together([partial(_do, works, batch) for works in plan], alike=True)
        if batch.last:
            weighted = self._objective.weighs(batch)
            self._record(("sum of workers", workers, weighted), partial(self._sum_of_workers, workers, weighted), 0)()
            if self._across is not None:
                root = self._slots[0][0]
                weights = [root.weight, root.objective.weight] if weighted else []
                self._across([root.objective.gradients, root.objective.total, *weights])
            self._record(("end", weighted), partial(self._end, weighted), 0)()

    def _plan(self, batch: Batch, workers: int) -> list[list[_Work]]:
        """What each worker does with the rows of a step."""
        count = self.sharding.count // workers
        plan = []
        for worker in range(workers):
            first = self.sharding.first + worker * count
            operations = list(self.sharding.operations(batch.step_rows, first, count))
            slots = self._slots_of(worker, 1 + max(each.slot for each in operations))
            plan.append([self._work(each, batch, worker, slots) for each in operations])
        return plan

    def _work(self, operation: Operation, batch: Batch, worker: int, slots: list[Share]) -> _Work:
        at, start, end, add = operation
        slot = slots[at]
        if add:
            other, weighted = slots[at + 1], self._objective.weighs(batch)
            key: tuple[object, ...] = "add", worker, at, weighted
            return _Work(start, end, self._record(key, partial(slot.add, other, weighted), worker))
        if start == end:
            return _Work(start, end, self._record(("none", worker, at), slot.clear, worker))
        rows = slots[0].part(batch, end - start)
        place = start if self._objective.noise is not None else 0
        run = partial(slot.gradient, replace(rows, place=place), add=False)
        key = "leaf", worker, at, rows.n, place, batch.targets.ndim, batch.weights is not None
        return _Work(start, end, self._record(key, run, worker), slots[0])

    def _slots_of(self, worker: int, count: int) -> list[Share]:
        """The slots of a worker; the first one of all has the objective's gradient."""
        if worker == len(self._slots):
            rows = self.sharding.leaf_rows
            own = self._objective.like(rows) if worker else self._objective.in_parts(rows)
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
        if weighted:
            self._backend.fill(self.share.weight, 0)
        self.share.add_totals(self._slots[0][0], weighted)

    def forget(self) -> None:
        """After a step that was not finished: nothing of it is added to the next."""
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
