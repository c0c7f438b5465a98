"""What a backend does: hold arrays on a device, multiply matrices, and run the formulas of the records.

Arrays are C-contiguous and of one floating dtype, float32 or float64; rows are samples. Beside float32, factors of
products and signals of hidden layers may be of a smaller one (`gpu_bp.precision`): what takes these computes in float32
and rounds what it writes. Everything is written into arrays that the caller owns. Shapes and dtypes are the caller's
promise: `step.py` checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpu_bp import registry
from gpu_bp.exchange import Exchange
from gpu_bp.formula import Program
from gpu_bp.ranks import Ranks
from gpu_bp.registry import Permutations, Purpose
from gpu_bp.spec import Activation, Array, Loss, Penalty, RowActivation, Update

Action = Callable[[], None]

IDENTITY = registry.activation("identity")


class Division(NamedTuple):
    """How a step's rows are worked on: so many at a time, by so many workers at once."""

    rows: int
    workers: int


class Numbers(Protocol):
    """A few numbers that the host changes from step to step, where what is recorded finds them."""

    def set(self, *steps: Sequence[float]) -> None:
        """What is asked of the device from here on reads these values: those of a step, or of some that follow it too.

        Does not wait for the device.
        """


class Backend(Protocol):
    """A place where networks are trained. `name` and `device` describe it in words.

    `resident_bytes`: as much data is put on the device at once where nobody says otherwise. `read_every`: after how
    many steps it pays to read back a number of the device's, for which the host may wait: 1 where the two are one.
    `steps_at_once`: so many steps are recorded as one where nothing is to be done between them.
    """

    name: str
    device: str
    resident_bytes: int
    read_every: int
    steps_at_once: int

    def libraries(self) -> dict[str, Any]:
        """What computes here, by name: versions and settings that results depend on in their last bits.

        Plain values, in a fixed order; "unknown" where one cannot be found out.
        """

    def refuses(self, products: str) -> str | None:
        """Why it has no such matrix products (see `gpu_bp.precision`), and what to use; None where it has them."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array of zeros on the device."""

    def to_device(self, host: np.ndarray) -> Array:
        """A new device array with the values of a host array."""

    def to_host(self, array: Array) -> np.ndarray:
        """A new host array with the values of a device array. Waits for the device."""

    def synchronize(self) -> None:
        """Waits until the device has done all that it was given."""

    def exchange(self, ranks: Ranks) -> Exchange:
        """What sums arrays of this backend over ranks, all of which have to ask for it."""

    # doing the same again and again: what is recorded works on the same arrays, as they then are

    def record(self, run: Action, worker: int = 0) -> Action:
        """Nothing is done yet: what this gives does what `run` asks of the backend, at the least cost for the host.

        Two may run at once where they were recorded for different workers. Where `steps_at_once` is more than 1, what
        is recorded may have other recordings in it.
        """

    def together(self, actions: Sequence[Action], *, alike: bool = False) -> None:
        """Runs what was recorded for worker 0, 1, ..., all at once; returns when all have ended.

        `alike`: with the same bits however many they are, even where it is a single one.
        """

    def division(self, widths: Sequence[int], rows: int, workers: int | None = None) -> Division:
        """How to work on the rows of a step of a network of these widths, by so many workers at most.

        It depends on nothing else, but for how many workers there are where nothing is said of them.
        """

    def numbers(self, count: int, dtype: Any) -> Numbers:
        """So many numbers a step, for arithmetic in that dtype."""

    def copy(self, array: Array, out: Array) -> None:
        """out = array, of one shape; rounded where out's dtype has fewer bits."""

    def fill(self, array: Array, value: float) -> None:
        """All elements of the array become that value."""

    def advance(self, counter: Array) -> None:
        """counter, (1,) int64, becomes one more."""

    def gather(self, table: Array, rows: Array, out: Array) -> None:
        """out = table[rows]; rows are int64 row numbers on the device."""

    def matmul(
        self,
        a: Array,
        b: Array,
        out: Array,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        arithmetic: str = "",
    ) -> None:
        """out = a @ b, either factor transposed as asked, without a transposed copy.

        By default in the dtype of `out`; factors of float16 or bfloat16 are summed in float32. "tf32": float32 factors
        are rounded to TF32 first.
        """

    def activate(
        self, activation: Activation | RowActivation, net_input: Array, biases: Array | None, output: Array
    ) -> None:
        """Adds the biases to net_input (rows, n) in place, and output = phi(net_input).

        `output` may be the same array as `net_input`, which then holds the output.
        """

    def dense(
        self,
        activation: Activation | RowActivation | None,
        inputs: Array,
        weights: Array,
        biases: Array | None,
        net_input: Array,
        output: Array,
        *,
        arithmetic: str = "",
    ) -> None:
        """net_input = inputs @ weights.T + biases, and output = phi(net_input): `matmul`, then `activate`, or in one.

        Without an activation no output is written.
        """

    def dense_gradients(
        self, delta: Array, inputs: Array, weights: Array, biases: Array | None, *, arithmetic: str = ""
    ) -> None:
        """biases = the column sums of delta, and weights = delta.T @ inputs: `column_sums`, then `matmul`, or in one.

        Without biases the product alone.
        """

    def hidden_delta(self, activation: Activation, error: Array, net_input: Array, output: Array, delta: Array) -> None:
        """delta = error * phi': what came back from the layer above, dE/dy, becomes the local gradient.

        `delta` may be the same array as `error`.
        """

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

        For a fused loss `output` is written too, from `net_input`. `losses` is (rows, n_targets), or (rows, 1)
        for a loss that reduces rows.
        """

    def column_sums(self, x: Array, out: Array) -> None:
        """out = the sums of the columns of x: (rows, n) to (n,)."""

    def accumulate(self, x: Array, total: Array, *, squares: bool = False) -> None:
        """total += the sum of x, or of its squares; total is (1,) float64."""

    def add(self, a: Array, b: Array, out: Array) -> None:
        """out = a + b, of one shape; `out` may be one of them."""

    # layer normalisation and the weights of rows

    def normalise(self, product: Array, gains: Array, biases: Array | None, scale: Array, net_input: Array) -> None:
        """net_input = gains * x + biases, with x the rows of `product` (rows, n) less their mean, over their deviation.

        `product` becomes x, and `scale` (rows, 1) is what it was multiplied with.
        """

    def normalise_delta(self, delta: Array, normalised: Array, scale: Array, gains: Array) -> None:
        """delta, dE/dv of the net input that `normalise` gave, becomes that of the product."""

    def column_dots(self, x: Array, y: Array, out: Array) -> None:
        """out = the sums of the columns of x * y: (rows, n) to (n,)."""

    def weigh(self, weights: Array, losses: Array, delta: Array) -> None:
        """Multiplies rows by their weights (rows,), in place. Weight 0 gives 0, whatever was there."""

    def class_weights(self, targets: Array, table: Array, weights: Array | None, out: Array) -> None:
        """out (rows,) = the weight of each row's class, times its own where there are such.

        Targets are class indices, or rows the largest of which names the class; a row of one says it by its sign,
        0 being class 0.
        """

    # what only training does

    def dropout(self, seed: int, step: Array, start: int, rate: float, x: Array, out: Array) -> None:
        """out = x / (1 - rate), but 0 for the share `rate` of the elements; which, says the stream from `start` on.

        `start` is an element of step 0, and its like of step number `step`, (1,) int64, is taken (see
        `gpu_bp.kernels.random.element_of_step`). `out` may be the same array as `x`.
        """

    def input_noise(self, seed: int, step: Array, start: int, sd: float, x: Array, out: Array) -> None:
        """out = x + sd * standard normals, those of the stream from element `start` of the step on."""

    def step_factor(
        self,
        scale: float,
        weight: Array | None,
        squares: Array | None,
        most: float,
        out: Array,
        loss_scale: Array | None = None,
    ) -> None:
        """out (1,) = what the summed gradient, times scale, is to be multiplied with for the mean gradient.

        Divided by the total `weight` (1,) where there is one (0 for a weight of 0); and where there are `squares`
        (1,), the sum of the squared gradients, shrunk so that the mean gradient is at most about `most` long, by the
        rule of PyTorch: most / (length + 1e-6). Both are float64, on the device. Divided by the `loss_scale` (1,), by
        which the gradient was multiplied.
        """

    def multiply(self, x: Array, factor: Array) -> None:
        """x *= factor, (1,) on the device."""

    def adjust_scale(
        self,
        scale: Array,
        good: Array,
        skip: Array,
        steps: Array,
        flag: Array,
        every: int,
        least: float,
        most: float,
    ) -> None:
        """The loss scale (1,) after a step: halved where `skip` is set, doubled after `every` steps that were `good`.

        No more than `most`. Where it would become less than `least`, flag = steps + 1 instead. `good` counts; it,
        `skip`, `steps` and `flag` are (1,) int64, as for `watch`.
        """

    # Whether a training still goes: a `flag` (1,) int64 on the device is negative as long as it does, then it is the
    # number of the first step that went wrong. What takes a flag does nothing once it is set.

    def watch(self, gradients: Array, total: Array, steps: Array, flag: Array) -> None:
        """Where an element of gradients (n,), or total (1,) float64, is not finite, flag = steps + 1; one set stays.

        `steps` (1,) int64 counts those taken before.

        Does not wait for the device.
        """

    def limit_norms(self, weights: Array, most: float, flag: Array | None = None) -> None:
        """Shrinks the rows of weights (n_out, n_in) that are longer than `most` to that length."""

    def average(self, parameters: Array, average: Array, rest: float, flag: Array | None = None) -> None:
        """average += rest * (parameters - average)."""

    def update(
        self,
        record: Update,
        penalties: Sequence[Penalty],
        parameters: Array,
        gradients: Array,
        state: Sequence[Array],
        numbers: Numbers,
        n_weights: int,
        factor: Array | None = None,
        flag: Array | None = None,
        step: int = 0,
    ) -> None:
        """One step of an update rule over flat buffers, for the mean gradient scale * factor * gradients.

        Penalties come before the rule, in their order. `numbers` are the scale, the penalties' and the rule's scalars;
        of those of several steps `step` says which. Penalties of weights act on the first `n_weights` parameters alone.
        `factor` is (1,), on the device.
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

    # memory, in bytes

    def free_bytes(self) -> int:
        """What the device has free, with what this process holds there and does not use."""

    def scratch_bytes(self, shapes: Iterable[tuple[int, ...]], dtype: Any) -> int:
        """What it keeps for itself to work on arrays of these shapes, at most."""

    def generator_bytes(self, program: Program, n_rows: int) -> int:
        """What it keeps for itself to generate up to so many rows of a program at once."""

    # rows that come from the host while the device computes

    def staging(self, array: Array) -> np.ndarray:
        """Host memory of the same shape to be filled for `upload`: the array itself where the host is the device."""

    def upload(self, host: np.ndarray, array: Array) -> None:
        """Begins to copy `staging` memory to the device, after all that was asked of it so far; does not wait."""

    def await_uploads(self) -> None:
        """What is asked of the device from here on comes after all uploads so far; the host does not wait."""

    def finish_uploads(self) -> None:
        """The host waits until all uploads so far are made, and may fill their staging memory again."""

    # to see where the time goes

    def mark(self) -> Any:
        """A place in the order of what the device is given, for `seconds`; the host does not wait."""

    def seconds(self, begin: Any, end: Any) -> float:
        """How long the device took from one mark to the other, at which the host waits for it."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """What the host asks for within it has this name in a profiler's picture, where the backend has one."""


class Apart:
    """The operations of a backend that may be done in one, one after the other."""

    def dense(
        self: Backend,
        activation: Activation | RowActivation | None,
        inputs: Array,
        weights: Array,
        biases: Array | None,
        net_input: Array,
        output: Array,
        *,
        arithmetic: str = "",
    ) -> None:
        self.matmul(inputs, weights, net_input, transpose_b=True, arithmetic=arithmetic)  # V = Y_prev W.T
        if activation is not None:
            self.activate(activation, net_input, biases, output)  # V += b, Y = phi(V)
        elif biases is not None:
            self.activate(IDENTITY, net_input, biases, net_input)

    def dense_gradients(
        self: Backend, delta: Array, inputs: Array, weights: Array, biases: Array | None, *, arithmetic: str = ""
    ) -> None:
        if biases is not None:
            self.column_sums(delta, biases)  # dE/db
        self.matmul(delta, inputs, weights, transpose_a=True, arithmetic=arithmetic)  # dE/dW = Delta.T Y_prev


def or_unknown(ask: Callable[[], Any]) -> Any:
    """What a question to a library is answered with; "unknown" where that is nothing, or whatever error."""
    try:
        return ask() or "unknown"
    except Exception:
        return "unknown"
