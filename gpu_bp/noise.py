"""What a training step leaves to chance beside the order of the rows: dropout, and noise on the inputs.

Nothing of it is stored: which outputs are left out is a function of the seed, the step, the layer and the place of the
row in the step, and is computed again on the way back. So it does not depend on how a step's rows are divided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpu_bp.backends import Backend
from gpu_bp.errors import UserError
from gpu_bp.registry import element_of_step
from gpu_bp.spec import Array


@dataclass(frozen=True)
class Noise:
    """Dropout and input noise.

    seed: of the draws. dropout: the share of the outputs that is left out, one a hidden layer.
    input_dropout: likewise of the inputs. input_noise: standard deviation of the normal noise added to the inputs.

    Raises:
        UserError: a rate outside [0, 1), or a negative deviation.
    """

    seed: int
    dropout: tuple[float, ...] = ()
    input_dropout: float = 0.0
    input_noise: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= rate < 1 for rate in (*self.dropout, self.input_dropout)):
            raise UserError(
                f"dropout rates must be in [0, 1), not {self.dropout} and {self.input_dropout} of the inputs"
            )
        if not 0 <= self.input_noise < math.inf:
            raise UserError(f"input_noise must be a standard deviation of 0 or more, not {self.input_noise}")

    @property
    def on_inputs(self) -> bool:
        """Whether the inputs are not taken as they are."""
        return self.input_dropout > 0 or self.input_noise > 0

    def rate(self, layer: int) -> float:
        """The share of a layer's outputs that is left out; the output layer keeps all."""
        return self.dropout[layer] if layer < len(self.dropout) else 0.0


@dataclass(frozen=True)
class Draw:
    """The noise of one batch, for rows from a place of a step on; `step` (1,) int64, from 0, stands on the device."""

    noise: Noise
    step: Array
    place: int

    def inputs(self, backend: Backend, inputs: Array, out: Array) -> None:
        """out = the inputs (rows, n) with noise."""
        noise, start = self.noise, self._start(0, inputs)
        if noise.input_noise:
            backend.input_noise(noise.seed, self.step, start, noise.input_noise, inputs, out)
            inputs = out
        if noise.input_dropout:
            backend.dropout(noise.seed, self.step, start, noise.input_dropout, inputs, out)

    def outputs(self, backend: Backend, layer: int, values: Array, out: Array) -> None:
        """out = values (rows, n) of a layer, some left out and the others scaled up; of its deltas likewise."""
        backend.dropout(self.noise.seed, self.step, self._start(layer + 1, values), self.noise.rate(layer), values, out)

    def _start(self, stage: int, values: Array) -> int:
        return element_of_step(0, stage, self.place * values.shape[1])
