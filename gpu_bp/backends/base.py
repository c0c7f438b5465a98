"""What a backend does: hold arrays on a device, multiply matrices, and run the formulas of the records.

Arrays are C-contiguous and of one floating dtype, float32 or float64; rows are samples. Everything is
written into arrays that the caller owns. Shapes and dtypes are the caller's promise: `step.py` checks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gpu_bp.formula import Program
from gpu_bp.registry import Permutations, Purpose
from gpu_bp.spec import Activation, Array, Loss, Penalty, RowActivation, Update


class Backend(Protocol):
    """A place where networks are trained. `name` and `device` describe it in words.

    `resident_bytes`: as much data is put on the device at once where nobody says otherwise.
    """

    name: str
    device: str
    resident_bytes: int

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
        penalties: Sequence[Penalty],
        parameters: Array,
        gradients: Array,
        state: Sequence[Array],
        scale: float,
        scalars: Mapping[str, float],
        n_weights: int,
        factor: Array | None = None,
    ) -> None:
        """One step of an update rule over the flat buffers, for the mean gradient scale * factor * gradients.

        Penalties come before the rule, in their order; `scalars` has their numbers by their names beside the rule's.
        Those of weights act on the first `n_weights` parameters alone. `factor` is (1,), on the device.
        """

    # random numbers and generated rows

    def uniforms(self, seed: int, purpose: Purpose, start: int, out: Array) -> None:
        """out (n,) float64 = elements start to start + n of a stream, uniform on [0, 1)."""

    def normals(self, seed: int, purpose: Purpose, start: int, out: Array) -> None:
        """out (n,) float64 = elements start to start + n of a stream of standard normals."""

    def generate(self, program: Program, seed: int, first: int, rows: Array, outputs: Sequence[Array]) -> None:
        """The outputs of a program for the rows first + `rows`, (n,) int64; cast to the outputs' dtypes."""

    def count(self, first: int, out: Array) -> None:
        """out (n,) int64 = first, first + 1, ..."""

    def permute(self, permutations: Permutations, first: int, out: Array) -> None:
        """out[k] = the images under permutation k of first, first + 1, ...; out is (permutations, n) int64."""

    # rows that come from the host while the device computes

    def staging(self, array: Array) -> np.ndarray:
        """Host memory of the same shape to be filled for `upload`: the array itself where the host is the device."""

    def upload(self, host: np.ndarray, array: Array) -> None:
        """Begins to copy `staging` memory to the device, after all that was asked of it so far; does not wait."""

    def await_uploads(self) -> None:
        """What is asked of the device from here on comes after all uploads so far; the host does not wait."""

    def finish_uploads(self) -> None:
        """The host waits until all uploads so far are made, and may fill their staging memory again."""
