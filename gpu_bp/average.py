"""A moving average of a network's parameters, kept beside the training."""

from __future__ import annotations

from gpu_bp.network import Network
from gpu_bp.spec import Array


class Average:
    """An exponential moving average of a network's parameters: average += (1 - decay) (parameters - average).

    It begins with the parameters after the first step (Polyak and Juditsky, 1992, with weights that decay).

    Attributes:
        network: the network with the averaged parameters.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.network = network.over(network.backend.zeros(network.parameters.shape, network.dtype))
        self._rest = 1 - decay
        self.begun = False  # whether there is a mean yet; said by the step

    def add(self, parameters: Array, flag: Array | None = None, part: slice = slice(None)) -> None:
        """Brings the average, or a part of it, up to date after a step; not where the `flag` of a watch is set."""
        rest = self._rest if self.begun else 1.0
        self.network.backend.average(parameters[part], self.network.parameters[part], rest, flag)
