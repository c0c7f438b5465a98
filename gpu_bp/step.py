"""One training step: a batch's gradient, forward and back, then the update.

A step's rows may come as several batches, whose gradients are summed. A large batch is cut into parts where the backend
works on several at once, each forward and back by itself (`Backend.division`).

What a step asks of the backend is the same each time but for a few numbers, which stand where it finds them. So it is
recorded when it is asked for the first time, and from then on only run (`Backend.record`); or several steps as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from gpu_bp.average import Average
from gpu_bp.backends.base import Action
from gpu_bp.data.source import Batch
from gpu_bp.exchange import Exchange
from gpu_bp.gradient_in_parts import GradientInParts
from gpu_bp.loss_scaling import LossScaling
from gpu_bp.network import ALIGNMENT
from gpu_bp.objective import Objective
from gpu_bp.optimizer import Optimizer
from gpu_bp.sharded_gradient import ShardedGradient
from gpu_bp.sharding import Sharding
from gpu_bp.spec import Array

# So many batches are worked on where they lie, of small ones more: those of a training lie in the same arrays again and
# again. What comes from elsewhere, each time perhaps from other arrays, is copied into arrays of the step's own.
PLACES = 2
SMALL_PLACES, SMALL = 16, 2**16  # bytes
# So many recordings are kept, of batches of different sizes, before all begins anew.
RECORDINGS = 500
# Parameters for each worker that takes part in an update, at least.
UPDATED = 2**17


class Step:
    """A training step: the objective's gradient, then the optimizer's update by its mean over the rows.

    A step whose gradient is not finite, or after which the objective's total loss is not, changes neither parameters
    nor the optimizer's state nor the average, and no later step does: what was before it is there to be looked at.
    The host does not wait for the device to know; it asks now and then whether the training has `diverged`. In float16
    a gradient that is not finite is no divergence, but an affair of the loss's scale: that step alone is left out.

    Args:
        clip_norm: the mean gradient is shrunk to this length where it is longer (Pascanu et al., 2013); 0: never.
        max_norm: likewise the weights of each hidden unit after the update; 0: never.
        average: a moving average of the parameters that each step brings up to date.
        watch: False leaves out the look at what is finite; not in float16.
        sharding: how a step is split into shards, that its bits depend on nothing else; else its gradient is summed by
            as many workers as there are. exchange: between several ranks that share a step; see `ShardedGradient`.

    Attributes:
        flag: (1,) int64 on the device, -1 until a step goes wrong, then its number, the first step being 1; None
            without `watch`. scaling: of the loss, in float16; else None.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        *,
        clip_norm: float = 0.0,
        max_norm: float = 0.0,
        average: Average | None = None,
        watch: bool = True,
        sharding: Sharding | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        network, backend = objective.network, objective.network.backend
        self.objective = objective
        self.optimizer = optimizer
        self.average = average
        self._backend = backend
        self._clip_norm = clip_norm
        self._max_norm = max_norm
        self._squares = backend.zeros((1,), np.float64)
        self._factor = backend.zeros((1,), network.dtype)
        self.scaling = LossScaling(backend) if network.products == "float16" else None
        if self.scaling is not None:
            objective.loss_scale = self.scaling.scale
        self.flag: Array | None = backend.to_device(np.full(1, -1)) if watch or self.scaling else None
        self._steps = backend.zeros((1,), np.int64)  # taken so far, on the device
        self._counted = 0  # what it is
        self._updaters = backend.division(network.widths, objective.batch_size).workers
        self._gradient: GradientInParts | ShardedGradient
        if sharding is None:
            self._gradient = GradientInParts(objective, self._steps, self._record)
        else:
            self._gradient = ShardedGradient(objective, self._steps, sharding, self._record, exchange)
        self._rows = 0  # of the step so far
        self._recorded: dict[tuple[object, ...], Action] = {}
        self._places: dict[tuple[int | None, ...], Batch] = {}
        # of those recordings the ones that are a whole step, by the place of its batch and the kind of average
        self._whole: dict[tuple[object, ...], Action] = {}
        # a place, the batch that lay there first, without which others could take its place, and those of its steps
        self._several_at: tuple[tuple[int | None, ...], Batch, list[Batch]] | None = None

    def __call__(self, batch: Batch) -> None:
        objective, optimizer, place = self.objective, self.optimizer, _place_of(batch)
        if batch.steps > 1:
            self._several(batch, place)
            return
        if place not in self._places:
            objective.check(batch)
        if batch.place == 0:
            self._rows = self._gradient.used = 0
        whole = self._whole.get((place, *self._kind_of_average())) if batch.last and not batch.place else None
        self._rows = batch.rows_in_step or self._rows + len(batch.inputs)
        self._count()
        steps = optimizer.steps
        try:
            if batch.last:
                optimizer.begin(1.0 if objective.weighs(batch) else 1 / self._rows)  # 1 / total weight
            if whole is not None:
                whole()
                objective.count(batch)
            elif len(batch.inputs) <= self._gradient.part_rows:
                self._at_one_go(batch, place)
                objective.count(batch)
            elif isinstance(self._gradient, ShardedGradient) and self._is_whole(self._gradient, batch, place):
                self._in_shards(self._gradient, batch, place)
            else:
                self._gradient(batch)
                if batch.last:
                    self._update(batch)
        except BaseException:
            self._go_back(steps)
            raise
        if batch.last:
            self._counted += 1
            if self.average is not None:
                self.average.begun = True

    def _count(self) -> None:
        """The device knows the number of the step, whoever has changed it."""
        if self._counted != self.optimizer.steps:
            self._counted = self.optimizer.steps
            self._backend.fill(self._steps, self._counted)

    def _go_back(self, steps: int) -> None:
        """After so many steps, as if the one that failed had not been; what it has added to the loss is not known."""
        self.optimizer.steps, self._counted = steps, -1
        self._gradient.forget()

    # How a batch is worked on

    def _several(self, batch: Batch, place: tuple[int | None, ...]) -> None:
        """Steps one after the other, in one recording; what is not as ever, one by one."""
        objective, average, gradient = self.objective, self.average, self._gradient
        if self._several_at is None:
            self._several_at = place, batch, batch.of_steps()
        known, _, batches = self._several_at
        if known != place or len(batches) != batch.steps:
            batches = batch.of_steps()
        first, steps = batches[0], len(batches)
        begins, too_many = average is not None and not average.begun, steps > self._backend.steps_at_once
        if known != place or first.n > gradient.part_rows or begins or too_many:
            for each in batches:
                self(each)
            return
        objective.check(first)
        self._rows, gradient.used = first.n, 0
        self._count()
        before = self.optimizer.steps

        def run() -> None:
            for step, each in enumerate(batches):
                gradient.shares[0].gradient(each, add=False)
                for (action,) in self._phases(each, 1, 1, step):
                    action()

        try:
            self.optimizer.begin(1.0 if objective.weighs(batch) else 1 / first.n, steps)
            self._record(("several", steps, first.n, *first.kind, self._kind_of_update(first, 1)), run)()
        except BaseException:
            self._go_back(before)
            raise
        objective.count(batch)
        self._counted += steps

    def _at_one_go(self, batch: Batch, place: tuple[int | None, ...]) -> None:
        """A batch that is not cut: its gradient and, where it is the step's last, the update, in one recording."""
        share, used = self._gradient.shares[0], self._gradient.used
        if place not in self._places:
            small = sum(array.nbytes for array in batch.filled) <= SMALL
            if len(self._places) < (SMALL_PLACES if small else PLACES):
                self._places[place] = batch  # and so the arrays live on, and no others are taken for them
            else:
                batch, place = share.take(batch, 0, batch.n), ()
        update = self._kind_of_update(batch, used) if batch.last else None
        key = (
            "at one go",
            place,
            len(batch.inputs),
            batch.place if self.objective.noise is not None else 0,  # of which noise is drawn
            used > 0,
            batch.kind,
            update,
        )

        def run() -> None:
            share.gradient(batch, add=used > 0)
            if batch.last:
                for (action,) in self._phases(batch, max(1, used), 1):
                    action()

        action = self._record(key, run)
        if place and batch.last and not batch.place:
            self._whole[place, *self._kind_of_average()] = action
        action()
        self._gradient.used = max(1, used)

    def _is_whole(self, gradient: ShardedGradient, batch: Batch, place: tuple[int | None, ...]) -> bool:
        """Whether a step can be recorded whole: its batch has all rows that are worked on here, and stays there."""
        if self._backend.steps_at_once == 1 or not gradient.whole(batch):
            return False
        if place not in self._places and len(self._places) < PLACES:
            self._places[place] = batch
        return place in self._places

    def _in_shards(self, gradient: ShardedGradient, batch: Batch, place: tuple[int | None, ...]) -> None:
        """A whole step in one recording; or in two, where the host has a part in what is between."""
        gradient.used = 1
        key = place, batch.n, batch.step_rows, batch.place, *batch.kind, self._kind_of_update(batch, 1)

        def end() -> None:
            gradient.end(batch)
            self._update(batch)

        def step() -> None:
            gradient.sums(batch)
            end()

        if gradient.by_host:
            self._record(("sums", *key), partial(gradient.sums, batch))()
            gradient.across(batch)
            self._record(("end", *key), end)()
        else:
            self._record(("in shards", *key), step)()
        gradient.count(batch)

    def _record(self, key: tuple[object, ...], run: Action, worker: int = 0) -> Action:
        """What was recorded under that key; if nothing was, what `run` does."""
        if key not in self._recorded:
            if len(self._recorded) >= RECORDINGS:
                self._recorded.clear()
                self._gradient.forget_plans()
                self._whole.clear()
            self._recorded[key] = self._backend.record(run, worker)
        return self._recorded[key]

    # The update

    def _update(self, batch: Batch) -> None:
        """The update after a batch that was cut: by as many workers, each for a range of the parameters."""
        used, n = self._gradient.used, len(self.objective.gradients)
        workers = max(1, min(self._updaters, n // UPDATED))
        phases = self._phases(batch, used, workers)
        kind = self._kind_of_update(batch, used)
        for k, phase in enumerate(phases):
            self._backend.together(
                [self._record(("update", k, worker, kind), run, worker) for worker, run in enumerate(phase)]
            )

    def _kind_of_update(self, batch: Batch, used: int) -> tuple[object, ...]:
        rows = self._rows if self._clip_norm else 0
        return used, self.objective.weighs(batch), rows, *self._kind_of_average()

    def _kind_of_average(self) -> tuple[object, ...]:
        average = self.average
        return average, average is not None and average.begun

    def _phases(self, batch: Batch, used: int, workers: int, step: int = 0) -> list[list[Action]]:
        """The update of a step whose gradients stand in the first shares: what must be done before what.

        What stands in one phase can be done at once, by so many workers, each on a range of the parameters. `step` is
        its place among those that were begun at once.
        """
        objective, backend, optimizer, flag = self.objective, self._backend, self.optimizer, self.flag
        network, gradients, average = objective.network, objective.gradients, self.average
        first, *others = self._gradient.shares[:used]
        weighted = objective.weighs(batch)
        scaling = self.scaling
        skip = flag if scaling is None else scaling.skip  # whether the parameters stay as they are
        scaled = weighted or self._clip_norm > 0 or scaling is not None
        factor = self._factor if scaled else None

        def sum_totals() -> None:
            for share in others:
                first.add_totals(share, weighted)

        def begin() -> None:
            if scaling is not None:
                scaling.begin(objective.total, self._steps, flag)

        def sum_gradients(part: slice) -> None:
            for share in others:
                backend.add(gradients[part], share.objective.gradients[part], gradients[part])
            if skip is not None:
                backend.watch(gradients[part], objective.total, self._steps, skip)

        def clip() -> None:
            squares = None
            if self._clip_norm:
                squares = self._squares
                backend.fill(squares, 0)
                backend.accumulate(gradients, squares, squares=True)
            weight = first.weight if weighted else None
            scale = 1.0 if weighted else 1 / self._rows
            by = None if scaling is None else scaling.scale
            backend.step_factor(scale, weight, squares, self._clip_norm, self._factor, by)

        def change(part: slice) -> None:
            optimizer.update(gradients, factor, skip, part, step)
            if average is not None and not self._max_norm:
                average.add(network.parameters, flag, part)

        def end() -> None:
            if self._max_norm:
                for layer in network.layers[:-1]:
                    backend.limit_norms(layer.weights, self._max_norm, skip)
                if average is not None:
                    average.add(network.parameters, flag)
            if scaling is not None:
                scaling.end(self._steps, flag)
            backend.advance(self._steps)

        size = -(-len(gradients) // (workers * ALIGNMENT)) * ALIGNMENT
        parts = [slice(start, start + size) for start in range(0, len(gradients), size)]
        return [
            *([[sum_totals]] if others else []),
            *([[begin]] if scaling is not None else []),
            [partial(sum_gradients, part) for part in parts],
            *([[clip]] if scaled else []),
            [partial(change, part) for part in parts],
            [end],
        ]

    def diverged(self) -> int | None:
        """The number of the first step that went wrong, as metrics count them: the first step is 1; None: all is well.

        Waits for the device. To know why, see `gpu_bp.divergence.diagnose`.
        """
        if self.flag is None:
            return None
        step = int(self._backend.to_host(self.flag)[0])
        return step if step >= 0 else None

    def reset_flag(self) -> None:
        """Steps change parameters again, for whoever has set all back; the loss so far is forgotten."""
        self._gradient.forget()
        self.objective.forget_loss()
        if self.flag is not None:
            self._backend.fill(self.flag, -1)

    @property
    def objective_of_parts(self) -> Objective:
        """The objective as it works on the parts of a batch; its sums and gradients are those of `objective`."""
        return self._gradient.objective

    def cut(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches in parts that `objective_of_parts` takes."""
        for batch in batches:
            for start, end in self._gradient.cuts(batch):
                part = batch.part(start, end)
                yield replace(part, place=batch.place + start, last=batch.last and end == batch.n)


def _place_of(batch: Batch) -> tuple[int | None, ...]:
    weights = batch.weights
    return id(batch.inputs), id(batch.targets), None if weights is None else id(weights)
