"""What a backend does: hold arrays on a device, multiply matrices, and run the formulas of the records.

Arrays are C-contiguous and of one floating dtype, float32 or float64; rows are samples. Everything is
written into arrays that the caller owns. Shapes and dtypes are the caller's promise: `step.py` checks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gpu_bp.spec import Activation, Array, Loss, RowActivation, Update


class Backend(Protocol):
    """A place where networks are trained. `name` and `device` describe it in words."""

    name: str
    device: str

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array of zeros on the device."""

    def to_device(self, host: np.ndarray) -> Array:
        """A new device array with the values of a host array."""

    def to_host(self, array: Array) -> np.ndarray:
        """A new host array with the values of a device array. Waits for the device."""

    def synchronize(self) -> None:
        """Waits until the device has done all that it was given."""

    def gather(self, table: Array, rows: Array, out: Array) -> None:
        """out = table[rows]; rows are int64 row numbers on the device."""

    def matmul(self, a: Array, b: Array, out: Array, *, transpose_a: bool = False, transpose_b: bool = False) -> None:
        """out = a @ b, either factor transposed as asked, without a transposed copy."""

    def activate(
        self, activation: Activation | RowActivation, net_input: Array, biases: Array | None, output: Array
    ) -> None:
        """Adds the biases to net_input (rows, n) in place, and output = phi(net_input).

        `output` may be the same array as `net_input`, which then holds the output.
        """

    def hidden_delta(self, activation: Activation, delta: Array, net_input: Array, output: Array) -> None:
        """delta *= phi', in place: what came back from the layer above, dE/dy, becomes the local gradient."""

    def output_delta(
        self,
        loss: Loss,
        activation: Activation | RowActivation,
        net_input: Array,
        target: Array,
        output: Array,
        losses: Array,
        delta: Array,
    ) -> None:
        """The loss values and the local gradient of the output layer, together.

        For a fused loss `output` is written too, from `net_input`. `losses` is (rows, n), or (rows, 1) for a
        loss that reduces rows.
        """

    def column_sums(self, x: Array, out: Array) -> None:
        """out = the sums of the columns of x: (rows, n) to (n,)."""

    def accumulate(self, losses: Array, total: Array) -> None:
        """total += the sum of losses; total is (1,) float64."""

    def update(
        self,
        record: Update,
        parameters: Array,
        gradients: Array,
        state: Sequence[Array],
        scale: float,
        scalars: Mapping[str, float],
        n_decayed: int,
    ) -> None:
        """One step of an update rule over the flat buffers, for the mean gradient scale * gradients.

        A scalar called `weight_decay` acts on the first `n_decayed` parameters alone.
        """
