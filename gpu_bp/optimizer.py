"""An optimizer: an update record, its state over the flat buffer, and a learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gpu_bp import registry
from gpu_bp.errors import UserError, unknown
from gpu_bp.network import Network
from gpu_bp.schedule import Schedule
from gpu_bp.spec import Array, Update


class Optimizer:
    """Changes a network's parameters, one step at a time.

    Args:
        record: the update rule. schedule: the learning rate of each step.
        penalties: numbers by the names of `registry.PENALTIES`, such as {"l2": 1e-4}; a zero is as good as none.
        biases: whether penalties of the weights act on biases and gains too.

    Raises:
        UserError: a penalty that is unknown or negative, or weight_decay beside a record that has its own.

    Attributes:
        steps: how many were taken. state: the record's state arrays by name, each as long as the parameters.
        rate_factor: what the schedule's rate is multiplied with, after a divergence.
        rate: the learning rate of the last step; NaN before the first.
    """

    def __init__(
        self,
        record: Update,
        network: Network,
        schedule: Schedule,
        *,
        penalties: Mapping[str, float] | None = None,
        biases: bool = False,
    ) -> None:
        for name, number in (penalties or {}).items():
            if name not in registry.PENALTIES:
                raise unknown("penalty", name, registry.PENALTIES)
            if not 0 <= number < math.inf:
                raise UserError(f"penalty {name} must be a number of 0 or more, not {number}")
        numbers = {name: number for name, number in (penalties or {}).items() if number}
        parameters = dict(record.values)
        if own := parameters.pop("weight_decay", 0.0):
            if "weight_decay" in numbers:
                raise UserError(f"{record.name} has a weight_decay of its own; leave one of the two out")
            numbers["weight_decay"] = own
        self.record = record
        self.schedule = schedule
        self.steps = 0
        self._network = network
        self._parameters = parameters
        self._numbers_of_penalties = numbers
        self._penalties = [penalty for name, penalty in registry.PENALTIES.items() if name in numbers]
        self._n_weights = network.layout.size if biases else network.layout.n_weights
        zeros = network.backend.zeros
        self.state: dict[str, Array] = {name: zeros((network.layout.size,), network.dtype) for name in record.state}
        self.rate_factor = 1.0
        self.rate = math.nan
        self._names = (*(penalty.name for penalty in self._penalties), *record.scalar_names)
        self._numbers = network.backend.numbers(1 + len(self._names), network.dtype)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.schedule(self.steps) * self.rate_factor

    def step(self, gradients: Array, scale: float, factor: Array | None = None, flag: Array | None = None) -> None:
        """Updates the parameters with the mean gradient, scale * factor * gradients (flat buffers).

        Where the `flag` of `Backend.watch` is set, a step is counted, and nothing is changed.
        """
        self.begin(scale)
        self.update(gradients, factor, flag)

    def begin(self, scale: float, steps: int = 1) -> None:
        """Counts steps that follow each other, and sets the numbers that their updates read, `scale` among them."""
        self._numbers.set(*[self._next(scale) for _ in range(steps)])

    def _next(self, scale: float) -> Sequence[float]:
        self.rate = rate = self.learning_rate
        self.steps += 1
        scalars = self.record.scalars(self.steps, rate, **self._parameters) | self._numbers_of_penalties
        if "weight_decay" in scalars:
            scalars["weight_decay"] *= rate
        return scale, *(scalars[name] for name in self._names)

    def update(
        self,
        gradients: Array,
        factor: Array | None = None,
        flag: Array | None = None,
        part: slice = slice(None),
        step: int = 0,
    ) -> None:
        """What `step` has the backend do; of a part of the flat buffers alone; for which of the steps begun at once."""
        network, start = self._network, part.indices(len(gradients))[0]
        network.backend.update(
            self.record,
            self._penalties,
            network.parameters[part],
            gradients[part],
            tuple(array[part] for array in self.state.values()),
            self._numbers,
            max(0, self._n_weights - start),
            factor,
            flag,
            step,
        )
