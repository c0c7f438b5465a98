"""The scale of the loss in float16, whose smallest numbers are not small enough for most deltas.

The output layer's delta is multiplied by a scale, and with it all that comes of it; the update divides by it. Where a
gradient overflows, the step is left out and the scale halved; after many good steps it is doubled (Micikevicius et al.,
2018, Mixed precision training). All of it stands on the device, and the host waits for none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_bp.backends import Backend
from gpu_bp.spec import Array

FIRST = 2.0**16
LEAST, MOST = 1.0, 2.0**24  # powers of 2: to multiply by one and to divide by it rounds nothing
GROWS_AFTER = 2000  # good steps


class LossScaling:
    """A scale that follows the gradients of a training.

    Attributes:
        scale: (1,) float32 on the device. skip: (1,) int64, what the update of a step takes for its flag: not negative
            where the step is left out.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.scale: Array = backend.to_device(np.full(1, FIRST, np.float32))
        self.skip: Array = backend.to_device(np.full(1, -1))
        self._good: Array = backend.zeros((1,), np.int64)

    def begin(self, total: Array, steps: Array, flag: Array) -> None:
        """Before gradients are looked at for `skip`: a loss that is not finite is no affair of the scale's."""
        self._backend.watch(self.scale, total, steps, flag)
        self._backend.copy(flag, self.skip)

    def end(self, steps: Array, flag: Array) -> None:
        """After the update: the next scale. Where it would be less than `LEAST`, the flag is set."""
        self._backend.adjust_scale(self.scale, self._good, self.skip, steps, flag, GROWS_AFTER, LEAST, MOST)

    def state(self) -> dict[str, Any]:
        """The scale, and how many good steps it has seen; fit for JSON. Waits for the device."""
        to_host = self._backend.to_host
        return {"scale": float(to_host(self.scale)[0]), "good": int(to_host(self._good)[0])}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on as the scaling did that gave this state."""
        self._backend.fill(self.scale, state["scale"])
        self._backend.fill(self._good, state["good"])
