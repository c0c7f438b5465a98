"""What one worker has of a step: arrays for rows, and sums and a gradient over those that it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gpu_bp.data.source import Batch
from gpu_bp.objective import Objective
from gpu_bp.spec import Array


class Share:
    """A worker's share of a step.

    Args:
        objective: whose gradients and sums are the worker's own. steps: (1,) int64, those taken before, on the device.

    Attributes:
        weight: (1,) float64 on the device, what the rows of the step so far weighed, where they have weights.
    """

    def __init__(self, objective: Objective, steps: Array) -> None:
        self.objective = objective
        self.weight = objective.network.backend.zeros((1,), np.float64)
        self._steps = steps
        self._arrays: dict[tuple[int, bool], Batch] = {}
        self._parts: dict[tuple[object, ...], Batch] = {}

    def part(self, batch: Batch, n: int) -> Batch:
        """The worker's own arrays for n rows of such a batch."""
        key = n, *batch.kind, batch.place, batch.last
        if key not in self._parts:
            self._parts[key] = self._new_part(batch, n)
        return self._parts[key]

    def _new_part(self, batch: Batch, n: int) -> Batch:
        kind = batch.kind
        if kind not in self._arrays:
            rows, zeros = self.objective.batch_size, self.objective.network.backend.zeros
            arrays = [zeros((rows, *array.shape[1:]), array.dtype) for array in batch.filled]
            self._arrays[kind] = Batch.of(arrays, batch.rows)
        return replace(self._arrays[kind].part(0, n), rows=batch.rows, place=batch.place, last=batch.last)

    def take(self, batch: Batch, start: int, end: int) -> Batch:
        """Copies rows of a batch into the worker's own arrays."""
        own, copy = self.part(batch, end - start), self.objective.network.backend.copy
        for array, to in zip(batch.filled, own.filled, strict=True):
            copy(array[start:end], to)
        return own

    def gradient(self, batch: Batch, *, add: bool, done: Callable[[int], None] = lambda layer: None) -> None:
        """The gradient of a batch, added to that of the step so far, or the first of it; and its loss, added.

        One that is the first of it is said to be `done` layer by layer, from the last one down.
        """
        objective, backend = self.objective, self.objective.network.backend
        objective.forward_at(batch, self._steps)
        if objective.last_weights is not None:
            if not add:
                backend.fill(self.weight, 0)
            backend.accumulate(objective.last_weights, self.weight)
        objective.backward_at(batch, self._steps, add=add, done=done)

    def add_totals(self, other: Share, weighted: bool) -> None:
        """Adds another's sums, but for the gradient, to these; its sums of losses begin anew."""
        own, theirs, backend = self.objective, other.objective, self.objective.network.backend
        pairs = [(own.total, theirs.total)]
        if weighted:
            backend.accumulate(other.weight, self.weight)
            pairs.append((own.weight, theirs.weight))
        for total, added in pairs:
            backend.accumulate(added, total)
            backend.fill(added, 0)

    def add(self, other: Share, weighted: bool) -> None:
        """Adds another's gradient and sums to these; its sums of losses begin anew."""
        own = self.objective.gradients
        self.objective.network.backend.add(own, other.objective.gradients, own)
        self.add_totals(other, weighted)

    def clear(self) -> None:
        """The gradient and all sums of no rows."""
        objective = self.objective
        for array in (objective.gradients, objective.total, objective.weight, self.weight):
            objective.network.backend.fill(array, 0)
