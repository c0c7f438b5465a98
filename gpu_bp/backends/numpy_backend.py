"""The NumPy backend: the twins of the records, run on slices that fit the cache.

Each operation is a list of calls of NumPy, twins among them, which are made at once, or kept as a recording: to do it
again is then to make these calls, and nothing else.

Nothing here makes an array after the first call for a shape: products and formulas write into arrays that the
caller owns, and scratch arrays are kept by shape.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import get_ident
from typing import Any

import numpy as np

from gpu_bp import host_memory
from gpu_bp.backends import host_calls as calls
from gpu_bp.backends import host_libraries, host_threads
from gpu_bp.backends.base import Action, Apart, Division, Numbers, or_unknown
from gpu_bp.backends.host_scratch import BLOCK, LOOK, TILE, Scratch, block_rows
from gpu_bp.exchange import Exchange, ThroughHost
from gpu_bp.formula import Program, evaluate
from gpu_bp.precision import PRECISIONS, dotted
from gpu_bp.ranks import Ranks
from gpu_bp.registry import (
    Permutations,
    Purpose,
    limit_norm,
    normalise,
    normalise_delta,
    normals,
    uniforms,
)
from gpu_bp.spec import Activation, Array, FreeLoss, FusedLoss, GroupedLoss, Loss, Penalty, RowActivation, Update

LARGE = float(np.finfo(np.float32).max) / 2  # numbers that are smaller fit every dtype


class HostNumbers:
    """Numbers that are read where they are: see `gpu_bp.backends.base.Numbers`.

    `arrays`: each as an array (), which NumPy would have to make of a number each time.
    """

    def __init__(self, count: int, dtype: Any) -> None:
        self._values: tuple[float, ...] = ()
        self._array = np.full(count, np.nan, dtype)
        self.arrays = [self._array[k : k + 1].reshape(()) for k in range(count)]
        for array in self.arrays:
            array.flags.writeable = False  # they are those of all steps: a twin that changes one would change them all

    def set(self, *steps: Sequence[float]) -> None:
        (values,) = steps  # one: see steps_at_once
        if values == self._values:
            return
        self._values = tuple(values)
        if max(map(abs, values)) < LARGE:
            self._array[:] = self._values
        else:
            with np.errstate(over="ignore"):  # which takes longer than all the rest
                self._array[:] = self._values


class NumpyBackend(Apart):
    """Arrays in host memory, products by NumPy's BLAS."""

    name = "numpy"
    resident_bytes = 2**28
    read_every = 1
    steps_at_once = 1  # to be asked costs nothing here

    def __init__(self) -> None:
        self.device = str(or_unknown(host_libraries.processor))
        self._workers = host_threads.Workers()
        self._scratch_of: defaultdict[int, dict[tuple[tuple[int, ...], Any], Scratch]] = defaultdict(dict)
        self._worker = 0
        self._calls: list[Action] | None = None  # of what is being recorded
        self._largest = 0  # of its products, in multiplications
        self._recording = 0  # the thread that does so: what another asks for meanwhile is done
        self._zeros = {np.dtype(name): np.zeros(LOOK, name) for name in ("float32", "float64")}

    def libraries(self) -> dict[str, Any]:
        return {"simd": or_unknown(host_libraries.simd), **host_libraries.blas()}

    def refuses(self, products: str) -> str | None:
        return (
            f"the numpy backend has no matrix products in {products}; use float32, or --backend cupy on a GPU of "
            f"compute capability {dotted(PRECISIONS[products].capability)} or newer"
        )

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    def to_device(self, host: np.ndarray) -> Array:
        return np.array(host, order="C")

    def to_host(self, array: Array) -> np.ndarray:
        return np.array(array)

    def synchronize(self) -> None:
        pass  # NumPy has done everything when it returns

    def exchange(self, ranks: Ranks) -> Exchange:
        return ThroughHost(ranks, self.to_host, self.to_device)

    def record(self, run: Action, worker: int = 0) -> Action:
        kept: list[Action] = []
        self._calls, self._worker, self._largest, self._recording = kept, worker, 0, get_ident()
        try:
            run()
        finally:
            self._calls, self._worker = None, 0
        threads = host_threads.blas_threads(self._largest)

        def play() -> None:
            for call in kept:
                call()

        def play_within() -> None:
            with self._workers.at_most(threads):
                play()

        return play if self._largest <= host_threads.BLAS_SMALL or threads >= self._workers.count else play_within

    def together(self, actions: Sequence[Action], *, alike: bool = False) -> None:
        self._workers.together(actions, alike)

    def division(self, widths: Sequence[int], rows: int, workers: int | None = None) -> Division:
        return host_threads.division(widths, rows, workers or self._workers.count)

    def numbers(self, count: int, dtype: Any) -> HostNumbers:
        return HostNumbers(count, dtype)

    def copy(self, array: Array, out: Array) -> None:
        self._do(np.copyto, out, array)

    def fill(self, array: Array, value: float) -> None:
        self._do(array.fill, value)

    def advance(self, counter: Array) -> None:
        self._do(calls.advance, counter)

    def gather(self, table: Array, rows: Array, out: Array) -> None:
        # mode="clip": with "raise", take would write into a copy of out first
        self._do(table.take, rows, axis=0, out=out, mode="clip")

    def matmul(
        self,
        a: Array,
        b: Array,
        out: Array,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        arithmetic: str = "",  # none but that of the dtype: see `refuses`
    ) -> None:
        self._largest = max(self._largest, a.size * out.shape[1])
        left: Any = a.T if transpose_a else a
        self._do(left.dot, b.T if transpose_b else b, out)  # which is found faster than np.dot

    def activate(
        self, activation: Activation | RowActivation, net_input: Array, biases: Array | None, output: Array
    ) -> None:
        tile = self._tile(biases, len(net_input))
        for (v, y), scratch in self._slices(net_input, output):
            if tile is not None and len(v) % len(tile) == 0:
                several = v.reshape(-1, tile.size)
                self._do(np.add, several, tile.reshape(1, -1), several)
            elif biases is not None:
                row = v[0] if len(v) == 1 else v  # of one dimension, as the biases, it is faster
                self._do(np.add, row, biases, row)
            self._do(activation.value.numpy, v, v if output is net_input else y, scratch, **activation.values)

    def hidden_delta(self, activation: Activation, error: Array, net_input: Array, output: Array, delta: Array) -> None:
        x = output if activation.derivative_from == "output" else net_input
        for (e, x_slice, d), scratch in self._slices(error, x, delta):
            self._do(activation.delta.numpy, e, x_slice, e if delta is error else d, scratch, **activation.values)

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
        for (v, d, y, values, e), scratch in self._slices(net_input, target, output, losses, delta):
            if isinstance(loss, FusedLoss):
                self._do(loss.delta.numpy, v, d, y, values, e, scratch, **loss.values)
            else:
                assert isinstance(activation, Activation)
                if isinstance(loss, GroupedLoss):
                    of_targets = self._scratch_like(d)
                    grouped = loss.grouped(y), d, values, loss.grouped(e)
                    self._do(loss.error_signals.numpy, *grouped, of_targets, **loss.values)
                else:
                    assert isinstance(loss, FreeLoss)
                    self._do(loss.error_signal.numpy, y, d, values, e, scratch, **loss.values)
                x = y if activation.derivative_from == "output" else v
                self._do(activation.delta.numpy, e, x, e, scratch, **activation.values)

    def column_sums(self, x: Array, out: Array) -> None:
        if len(x) == 1:
            self._do(np.copyto, out, x[0])
        else:
            self._do(self._scratch_like(x[:, 0]).ones.dot, x, out)

    def accumulate(self, x: Array, total: Array, *, squares: bool = False) -> None:
        flat = x.reshape(-1)
        if not squares:
            self._do(calls.add_sum, flat, self._scratch_like(flat[: calls.FEW]).ones, total)
            return
        for (part,), scratch in self._slices(flat):
            self._do(np.multiply, part, part, scratch.a)
            self._do(calls.add_sum, scratch.a, scratch.ones, total)

    def add(self, a: Array, b: Array, out: Array) -> None:
        self._do(np.add, a, b, out)

    def normalise(self, product: Array, gains: Array, biases: Array | None, scale: Array, net_input: Array) -> None:
        for (x, s, v), scratch in self._slices(product, scale, net_input):
            self._do(normalise.numpy, x, gains, biases, s, v, scratch)

    def normalise_delta(self, delta: Array, normalised: Array, scale: Array, gains: Array) -> None:
        for (d, x, s), scratch in self._slices(delta, normalised, scale):
            self._do(normalise_delta.numpy, d, x, s, gains, scratch)

    def column_dots(self, x: Array, y: Array, out: Array) -> None:
        self._do(np.einsum, "ij,ij->j", x, y, out=out)

    def weigh(self, weights: Array, losses: Array, delta: Array) -> None:
        for x in (losses, delta):
            for (part, w), scratch in self._slices(x, weights[:, None]):
                self._do(np.equal, w, 0, scratch.mask)
                self._do(np.copyto, part, 0, where=scratch.mask)
                self._do(np.multiply, part, w, part)

    def class_weights(self, targets: Array, table: Array, weights: Array | None, out: Array) -> None:
        index = targets
        if targets.ndim == 2:
            index = self._scratch_like(targets).row_index
            if targets.shape[1] == 1:
                self._do(np.greater_equal, targets[:, 0], 0.5, out=index, casting="unsafe")
            else:
                self._do(np.argmax, targets, axis=1, out=index)
        self._do(np.take, table, index, out=out, mode="clip")
        if weights is not None:
            self._do(np.multiply, out, weights, out)

    def dropout(self, seed: int, step: Array, start: int, rate: float, x: Array, out: Array) -> None:
        for (x_part, part), scratch in self._slices(self._flat(x), out.reshape(-1)):
            self._do(calls.dropout, seed, step, start, rate, x_part, part, scratch)
            start += len(part)

    def input_noise(self, seed: int, step: Array, start: int, sd: float, x: Array, out: Array) -> None:
        for (x_part, part), _ in self._slices(self._flat(x), out.reshape(-1)):
            self._do(calls.input_noise, seed, step, start, sd, x_part, part)
            start += len(part)

    def step_factor(
        self,
        scale: float,
        weight: Array | None,
        squares: Array | None,
        most: float,
        out: Array,
        loss_scale: Array | None = None,
    ) -> None:
        self._do(calls.step_factor, scale, weight, squares, most, out, loss_scale)

    def multiply(self, x: Array, factor: Array) -> None:
        self._do(np.multiply, x, factor, x)

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
        self._do(calls.adjust_scale, scale, good, skip, steps, flag, every, least, most)

    def watch(self, gradients: Array, total: Array, steps: Array, flag: Array) -> None:
        self._do(calls.watch, gradients, self._zeros[gradients.dtype][: max(1, len(gradients))], total, steps, flag)

    def limit_norms(self, weights: Array, most: float, flag: Array | None = None) -> None:
        slices = list(self._slices(weights))

        def run() -> None:
            for (w,), scratch in slices:
                limit_norm.numpy(w, most, scratch)

        self._do(calls.unless_set, flag, run)

    def average(self, parameters: Array, average: Array, rest: float, flag: Array | None = None) -> None:
        slices = list(self._slices(parameters, average))

        def run() -> None:
            for (w, mean), scratch in slices:
                np.subtract(w, mean, out=scratch.a)
                scratch.a *= rest
                mean += scratch.a

        self._do(calls.unless_set, flag, run)

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
        assert isinstance(numbers, HostNumbers)
        arrays = (parameters, gradients, *state)
        acting = list(range(len(penalties)))  # by their places
        on_all = [k for k in acting if not penalties[k].weights_only]
        ranges = [(slice(0, n_weights), acting), (slice(n_weights, None), on_all)]
        if acting == on_all:
            ranges = [(slice(None), acting)]
        slices = [
            (part, scratch, [(penalties[k].apply.numpy, k) for k in which])
            for range_, which in ranges
            for part, scratch in self._slices(*(x[range_] for x in arrays))
            if part[0].size
        ]
        scale, *values = numbers.arrays
        own = dict(zip(record.scalar_names, values[len(penalties) :], strict=True))
        twin = record.update.numpy

        def run() -> None:
            whole: Any = scale if factor is None else scale * factor[0]
            for (w, gradient, *rest), scratch, before in slices:
                np.multiply(gradient, whole, scratch.a)
                for penalty, k in before:
                    penalty(w, scratch.a, scratch, values[k])
                twin(w, scratch.a, *rest, scratch, **own)

        self._do(calls.unless_set, flag, run)

    def uniforms(self, seed: int, purpose: Purpose, start: int, out: Array) -> None:
        for part in self._parts(len(out)):
            out[part] = uniforms(seed, purpose, start + part.start, part.stop - part.start)

    def normals(self, seed: int, purpose: Purpose, start: int, out: Array) -> None:
        for part in self._parts(len(out)):
            out[part] = normals(seed, purpose, start + part.start, part.stop - part.start)

    def generate(self, program: Program, seed: int, first: int, rows: Array, outputs: Sequence[Array]) -> None:
        for part in self._parts(len(rows), program.width):
            evaluate(program, seed, rows[part] + first, tuple(output[part] for output in outputs))

    def count(self, first: int, out: Array) -> None:
        out[:] = np.arange(first, first + len(out))

    def permute(self, permutations: Permutations, first: int, out: Array) -> None:
        for part in self._parts(out.shape[1], len(out)):
            out[:, part] = permutations(np.arange(first + part.start, first + part.stop))

    def free_bytes(self) -> int:
        return host_memory.free_bytes()

    def scratch_bytes(self, shapes: Iterable[tuple[int, ...]], dtype: Any) -> int:
        blocks = {(n, *shape[1:]) for shape in shapes for step in [block_rows(shape)] for n in (step, shape[0] % step)}
        each: int = 3 * np.dtype(dtype).itemsize + 1 + 8  # a, b, c; mask; uniforms
        return each * sum(map(math.prod, blocks))

    def generator_bytes(self, program: Program, n_rows: int) -> int:
        return 0  # what is made on the way is small, and gone afterwards

    def staging(self, array: Array) -> np.ndarray:
        host: np.ndarray = array
        return host

    def upload(self, host: np.ndarray, array: Array) -> None:
        pass  # it is there

    def await_uploads(self) -> None:
        pass

    def finish_uploads(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def span(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    @staticmethod
    def _parts(n: int, width: int = 1) -> Iterator[slice]:
        """Slices of 0 .. n that fit the cache in float64, for `width` numbers a place."""
        step = max(1, BLOCK // width)
        return (slice(start, min(n, start + step)) for start in range(0, n, step))

    def _do(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """Calls the function, or keeps the call where something is recorded."""
        if self._calls is None or self._recording != get_ident():
            function(*arguments, **keywords)
        else:
            self._calls.append(partial(function, *arguments, **keywords))

    def _flat(self, x: Array) -> Array:
        """All elements in a row; of an array with gaps a copy, which is made each time."""
        if x.flags.c_contiguous:
            return x.reshape(-1)
        flat = np.empty(x.size, x.dtype)
        self._do(np.copyto, flat.reshape(x.shape), x)
        return flat

    def _tile(self, biases: Array | None, rows: int) -> Array | None:
        """The biases over and over, as rows: NumPy adds a few long rows faster than many short ones. None: not so."""
        if biases is None or rows * len(biases) < BLOCK // 4 or len(biases) > TILE // 4:
            return None
        tile = self._scratch_like(biases).tile
        self._do(np.copyto, tile, biases)
        return tile

    def _slices(self, *arrays: Array) -> Iterator[tuple[tuple[Array, ...], Scratch]]:
        """The arrays cut into blocks of rows, with scratch arrays of the first one's shape."""
        first = arrays[0]
        rows, step = len(first), block_rows(first.shape)
        if step >= rows:
            yield arrays, self._scratch_like(first)
            return
        for start in range(0, rows, step):
            part = tuple(x[start : start + step] for x in arrays)
            yield part, self._scratch_like(part[0])

    def _scratch_like(self, array: Array) -> Scratch:
        kept, key = self._scratch_of[self._worker], (array.shape, array.dtype)
        scratch = kept.get(key)
        if scratch is None:
            scratch = kept[key] = Scratch(*key)
        return scratch
