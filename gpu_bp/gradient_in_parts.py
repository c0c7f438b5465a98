"""The gradient of a step whose batches are cut into parts, each forward and back by itself, by several workers at once.

Each worker takes its parts one after the other, in arrays of its own, and sums their gradients; the update sums the
workers'. How many there are follows from the backend (`Backend.division`); see `sharded_gradient.py` for a gradient
that does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from gpu_bp.backends.base import Action
from gpu_bp.data.source import Batch
from gpu_bp.objective import Objective
from gpu_bp.share import Share
from gpu_bp.spec import Array


class GradientInParts:
    """The sums over the rows of a step, which may come in several batches.

    Args:
        objective: whose gradient and sums are those of the first share. steps: see `Share`.
        record: keeps what is done again and again under a key, for a worker; see `Backend.record`.

    Attributes:
        part_rows: a batch of more rows is to be cut. objective: what works on a part.
        shares: of the workers. used: how many of them, the first ones, have a gradient of the step so far.
    """

    def __init__(
        self, objective: Objective, steps: Array, record: Callable[[tuple[object, ...], Action, int], Action]
    ) -> None:
        network = objective.network
        self._backend = network.backend
        self._whole = objective
        self.part_rows, workers = self._backend.division(network.widths, objective.batch_size)
        self.objective = objective if self.part_rows >= objective.batch_size else objective.in_parts(self.part_rows)
        others = [objective.like(self.part_rows) for _ in range(workers - 1)]
        self.shares = [Share(each, steps) for each in (self.objective, *others)]
        self.used = 0
        self._record = record
        self._plans: dict[tuple[object, ...], list[list[_Part]]] = {}

    def __call__(self, batch: Batch) -> None:
        """Goes on with a step."""
        place = batch.place if self._whole.noise is not None else 0
        key = batch.n, place, self.used, *batch.kind
        if key not in self._plans:
            self._plans[key] = self._plan(batch)
        plan = self._plans[key]
        self._backend.together([partial(_do, parts, batch) for parts in plan])
        self.used = max(self.used, len(plan))
        self._whole.count(batch)

    def _plan(self, batch: Batch) -> list[list[_Part]]:
        """The parts of a batch for each worker, and what each does with them."""
        draws = self._whole.noise is not None
        workers = self._backend.division(self._whole.network.widths, batch.n).workers
        plan: list[list[_Part]] = []
        for worker, share in enumerate(self.shares[:workers]):
            parts: list[_Part] = []
            for start, end in cut(batch.n, workers, worker, self.part_rows):
                own = replace(share.part(batch, end - start), place=batch.place + start)
                add = bool(parts) or worker < self.used
                run = partial(share.gradient, own, add=add)
                key = ("part", worker, own.n, own.place if draws else 0, add, *batch.kind)
                parts.append(_Part(start, end, share, self._record(key, run, worker)))
            plan.append(parts)
        return plan

    def cuts(self, batch: Batch) -> list[tuple[int, int]]:
        """First and end of the parts of a batch, as a single worker takes them."""
        return cut(batch.n, 1, 0, self.part_rows)

    def forget_plans(self) -> None:
        """What was recorded is gone."""
        self._plans.clear()

    def forget(self) -> None:
        """After a step that was not finished: nothing of it is added to the next."""
        for share in self.shares[1:]:
            share.objective.total.fill(0)
            share.objective.weight.fill(0)


class _Part(NamedTuple):
    """Rows of a batch for a worker, who takes them into the arrays of its share; and what is then done."""

    start: int
    end: int
    share: Share
    action: Action


def _do(parts: Sequence[_Part], batch: Batch) -> None:
    for part in parts:
        part.share.take(batch, part.start, part.end)
        part.action()


def cut(n: int, workers: int, worker: int, most: int) -> list[tuple[int, int]]:
    """Of n rows those of a worker, in parts of `most` rows at most, of about the same size."""
    begin, end = n * worker // workers, n * (worker + 1) // workers
    parts = -(-(end - begin) // most)
    cuts = [begin + (end - begin) * k // parts for k in range(parts + 1)]
    return list(pairwise(cuts))
