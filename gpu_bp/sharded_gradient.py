"""The gradient of a step whose rows are split into shards (see `sharding.py`), by one worker or several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from gpu_bp.backends.base import Action
from gpu_bp.data.source import Batch
from gpu_bp.exchange import Exchange
from gpu_bp.network import Layout
from gpu_bp.objective import Objective
from gpu_bp.sharding import Operation, Sharding
from gpu_bp.share import Share
from gpu_bp.spec import Array

# Numbers of a gradient that go to the other ranks at a time, at least: each message costs its latency.
TOGETHER = 2**18


class ShardedGradient:
    """The sums over the rows of a step, which may come in several batches, as they are cut by `Sharding.leaves`.

    Args:
        objective: whose gradient and sums they become. steps: see `Share`.
        record: keeps what is done again and again under a key, for a worker; see `Backend.record`.
        exchange: makes arrays the sums over all ranks; None where this one is alone. Where it works beside what else is
            asked of the device, a layer's gradient is on its way while those of the layers below are computed.

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
        exchange: Exchange | None = None,
    ) -> None:
        self._whole = objective
        self._backend = objective.network.backend
        self.objective = objective.in_parts(sharding.leaf_rows)
        self.shares = [Share(objective, steps)]
        self.used = 0
        self._sharding = sharding
        self._steps = steps
        self._record = record
        self._exchange = exchange
        network = objective.network
        self._ready = ready(network.layout, len(network.layers), TOGETHER)
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
        self.sums(batch)
        if batch.last:
            self.across(batch)
            self.end(batch)
            self.count(batch)

    def whole(self, batch: Batch) -> bool:
        """Whether it has all rows of its step that are worked on here."""
        return batch.last and (batch.place, batch.place + batch.n) == self._sharding.rows(batch.step_rows)

    # The stages of it: all but `across` where the host has a part in it, and `count`, can be recorded together.

    def sums(self, batch: Batch) -> None:
        """Those of the rows of a batch, and if it is the last one, of all of the step that are worked on here."""
        if batch.place == self._sharding.rows(batch.step_rows)[0] and self._next is not None:
            self.forget()  # the step before was not finished
        plan, weighted = self._plan(batch), self._whole.weighs(batch)
        self._backend.together([partial(_do, works, batch) for works in plan], alike=True)
        if batch.last and len(plan) > 1:
            key = "sum of workers", len(plan), weighted
            self._record(key, partial(self._sum_of_workers, len(plan), weighted), 0)()

    @property
    def by_host(self) -> bool:
        """Whether the host has a part in what is done `across` ranks."""
        return self._exchange is not None and not self._exchange.beside

    def across(self, batch: Batch) -> None:
        """Those become the sums over all ranks, where they are not yet."""
        if self._exchange is not None and not self._exchange.beside:
            self._exchange.begin([self._slots[0][0].objective.gradients, *self._totals(self._whole.weighs(batch))])
            self._exchange.end()

    def end(self, batch: Batch) -> None:
        """They are the objective's, and those of its share."""
        weighted = self._whole.weighs(batch)
        self._record(("end", weighted), partial(self._end, weighted), 0)()

    def count(self, batch: Batch) -> None:
        """Takes note of a step."""
        self._whole.count(batch, batch.step_rows)
        self.used = 1

    # What is done with a batch

    def _plan(self, batch: Batch) -> list[list[_Work]]:
        """What each worker does with a batch."""
        n = batch.step_rows
        if not self.whole(batch):
            return [self._part(batch)]
        workers = self._workers(batch.n)
        key = n, workers, *batch.kind
        if key not in self._plans:
            count = self._sharding.count // workers
            starts = [self._sharding.first + worker * count for worker in range(workers)]
            self._plans[key] = [
                self._works(list(self._sharding.operations(n, first, count)), batch, worker)
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
        return [*works, self._sent(batch)] if batch.last and self._sends else works

    @property
    def _sends(self) -> bool:
        """Whether sums are on their way to other ranks while others are computed; by a single worker then."""
        return self._exchange is not None and self._exchange.beside

    def _works(self, operations: list[Operation], batch: Batch, worker: int) -> list[_Work]:
        """What a worker does, the operations being all of its own."""
        if not self._sends:
            return [self._work(each, batch, worker) for each in operations]
        leaves = [k for k, each in enumerate(operations) if not each.add]
        last = operations[leaves[-1]]
        if last.start == last.end:
            return [*(self._work(each, batch, 0) for each in operations), self._sent(batch)]
        # what is added to it is added layer by layer
        return [*(self._work(each, batch, 0) for each in operations[: leaves[-1]]), self._sent(batch, last)]

    def _sent(self, batch: Batch, leaf: Operation | None = None) -> _Work:
        """The sums of the first slot, with those of the last leaf if one is given, become those of all ranks."""
        weighted = self._whole.weighs(batch)
        if leaf is None:
            slots, end = self._slots_of(0, 1)[:1], batch.place + batch.n
            return _Work(end, end, self._record(("send", weighted), partial(self._send, slots, weighted), 0))
        slots, rows = self._slots_of(0, leaf.slot + 1)[: leaf.slot + 1], self._rows_of(leaf, batch, 0)
        key = "last leaf", leaf.slot, rows.n, rows.place, *batch.kind, weighted
        run = partial(self._send, slots, weighted, rows)
        return _Work(leaf.start, leaf.end, self._record(key, run, 0), slots[0])

    def _send(self, slots: Sequence[Share], weighted: bool, rows: Batch | None = None) -> None:
        """Puts the gradient of some rows into the last slot, adds it to the one before, and so on, and the first one to
        those of the other ranks: layer by layer, each as soon as it is there. Likewise the other sums.

        The messages are the same on all ranks, whether they have rows or not.
        """
        exchange, backend = self._exchange, self._backend
        assert exchange is not None
        pairs = list(zip(slots[-2::-1], slots[:0:-1], strict=True))

        def done(layer: int) -> None:
            for part in self._ready[layer]:
                for share, other in pairs:
                    own = share.objective.gradients[part]
                    backend.add(own, other.objective.gradients[part], own)
                exchange.begin([slots[0].objective.gradients[part]])

        if rows is None:
            for layer in reversed(range(len(self._ready))):
                done(layer)
        else:
            slots[-1].gradient(rows, add=False, done=done)
        for share, other in pairs:
            share.add_totals(other, weighted)
        exchange.begin(self._totals(weighted))
        exchange.end()

    def _totals(self, weighted: bool) -> list[Array]:
        """The sums of the first slot beside its gradient."""
        share = self._slots[0][0]
        return [share.objective.total, *([share.weight, share.objective.weight] if weighted else [])]

    def _rows_of(self, leaf: Operation, batch: Batch, worker: int) -> Batch:
        """The worker's own arrays for the rows of a leaf, with their place if that matters.

        A leaf is not worked on where it lies: at other addresses a library may choose another way to multiply.
        """
        rows = self._slots_of(worker, 1)[0].part(batch, leaf.end - leaf.start)
        return replace(rows, place=leaf.start if self._whole.noise is not None else 0)

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
        rows = self._rows_of(operation, batch, worker)
        run = partial(slot.gradient, rows, add=False)
        key = "leaf", worker, at, rows.n, rows.place, *batch.kind
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


def ready(layout: Layout, layers: int, at_least: int) -> list[list[slice]]:
    """What of a flat gradient may be on its way once that of a layer is there, and those above: for each layer.

    Ranges of so many numbers at least, but for the first layer's, with which all the rest goes.
    """
    found: list[list[slice]] = [[] for _ in range(layers)]
    end = layout.n_weights
    for layer in reversed(range(layers)):
        start = layout.offsets[f"layers.{layer}.weights"] if layer else 0
        if end - start >= at_least or not layer:
            found[layer].append(slice(start, end))
            end = start
    if layout.size > layout.n_weights:  # biases and gains of all
        found[0].append(slice(layout.n_weights, layout.size))
    return found
