"""An optimizer: an update record, its state over the flat buffer, and a learning-rate schedule."""

from __future__ import annotations

from gpu_bp.network import Network
from gpu_bp.schedule import Schedule
from gpu_bp.spec import Array, Update


class Optimizer:
    """Changes a network's parameters, one step at a time.

    Attributes:
        steps: how many were taken. state: the record's state arrays, each as long as the parameters.
    """

    def __init__(self, record: Update, network: Network, schedule: Schedule) -> None:
        self.record = record
        self.schedule = schedule
        self.steps = 0
        self._network = network
        zeros = network.backend.zeros
        self.state: tuple[Array, ...] = tuple(zeros((network.layout.size,), network.dtype) for _ in record.state)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.schedule(self.steps)

    def step(self, gradients: Array, scale: float) -> None:
        """Updates the parameters with the mean gradient, scale * gradients (flat buffers)."""
        rate = self.learning_rate
        self.steps += 1
        scalars = self.record.scalars(self.steps, rate, **self.record.values)
        network = self._network
        network.backend.update(
            self.record, network.parameters, gradients, self.state, scale, scalars, network.layout.n_decayed
        )
