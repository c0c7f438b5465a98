"""The NumPy backend: the twins of the records, run on slices that fit the cache.

Nothing here makes an array after the first call for a shape: products and formulas write into arrays that the
caller owns, and scratch arrays are kept by shape.
"""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from gpu_bp import host_memory
from gpu_bp.backends.base import or_unknown
from gpu_bp.formula import Program, evaluate
from gpu_bp.registry import (
    Permutations,
    Purpose,
    dropout,
    limit_norm,
    normalise,
    normalise_delta,
    normals,
    uniforms,
)
from gpu_bp.spec import Activation, Array, FreeLoss, FusedLoss, GroupedLoss, Loss, Penalty, RowActivation, Update

# Elements that a formula works on at a time: its few arrays then stay in a core's second-level cache.
BLOCK = 16384
# Likewise where nothing is written.
LOOK = 4 * BLOCK


class Scratch:
    """Scratch arrays of one shape and dtype, made when first used. See `gpu_bp.spec.Scratch`."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._shape = shape
        self._dtype = dtype

    def _new(self) -> np.ndarray:
        return np.empty(self._shape, self._dtype)

    a = cached_property(_new)
    b = cached_property(lambda self: self._new())
    c = cached_property(lambda self: self._new())
    mask = cached_property(lambda self: np.empty(self._shape, np.bool_))
    uniforms = cached_property(lambda self: np.empty(self._shape))
    row_a = cached_property(lambda self: np.empty((self._shape[0], 1), self._dtype))
    row_b = cached_property(lambda self: np.empty((self._shape[0], 1), self._dtype))
    row_index = cached_property(lambda self: np.empty(self._shape[0], np.int64))
    row_start = cached_property(lambda self: np.arange(self._shape[0]) * self._shape[1])


def _is_set(flag: Array | None) -> bool:
    """Whether a training has gone wrong: see `Backend.watch`."""
    return flag is not None and bool(flag.item() >= 0)


def _block_rows(shape: tuple[int, ...]) -> int:
    """Rows of an array that a formula works on at a time."""
    rows, n = shape[0], math.prod(shape)
    return max(1, rows) if n <= BLOCK else max(1, BLOCK * rows // n)


class NumpyBackend:
    """Arrays in host memory, products by NumPy's BLAS."""

    name = "numpy"
    resident_bytes = 2**28
    read_every = 1

    def __init__(self) -> None:
        self.device = str(or_unknown(_processor))
        self._scratch: dict[tuple[tuple[int, ...], Any], Scratch] = {}
        self._zeros = {np.dtype(name): np.zeros(LOOK, name) for name in ("float32", "float64")}

    def libraries(self) -> dict[str, Any]:
        return {"simd": or_unknown(_simd), **_blas()}

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    def to_device(self, host: np.ndarray) -> Array:
        return np.array(host, order="C")

    def to_host(self, array: Array) -> np.ndarray:
        return np.array(array)

    def synchronize(self) -> None:
        pass  # NumPy has done everything when it returns

    def gather(self, table: Array, rows: Array, out: Array) -> None:
        # mode="clip": with "raise", take would write into a copy of out first
        np.take(table, rows, axis=0, out=out, mode="clip")

    def matmul(self, a: Array, b: Array, out: Array, *, transpose_a: bool = False, transpose_b: bool = False) -> None:
        np.dot(a.T if transpose_a else a, b.T if transpose_b else b, out=out)

    def activate(
        self, activation: Activation | RowActivation, net_input: Array, biases: Array | None, output: Array
    ) -> None:
        value = activation.value.numpy
        for (v, y), scratch in self._slices(net_input, output):
            if biases is not None:
                np.add(v, biases, out=v)
            value(v, v if output is net_input else y, scratch, **activation.values)

    def hidden_delta(self, activation: Activation, error: Array, net_input: Array, output: Array, delta: Array) -> None:
        x = output if activation.derivative_from == "output" else net_input
        for (e, x_slice, d), scratch in self._slices(error, x, delta):
            activation.delta.numpy(e, x_slice, e if delta is error else d, scratch, **activation.values)

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
                loss.delta.numpy(v, d, y, values, e, scratch, **loss.values)
            else:
                assert isinstance(activation, Activation)
                if isinstance(loss, GroupedLoss):
                    of_targets = self._scratch_like(d)
                    loss.error_signals.numpy(loss.grouped(y), d, values, loss.grouped(e), of_targets, **loss.values)
                else:
                    assert isinstance(loss, FreeLoss)
                    loss.error_signal.numpy(y, d, values, e, scratch, **loss.values)
                x = y if activation.derivative_from == "output" else v
                activation.delta.numpy(e, x, e, scratch, **activation.values)

    def column_sums(self, x: Array, out: Array) -> None:
        np.add.reduce(x, axis=0, out=out)

    def accumulate(self, x: Array, total: Array, *, squares: bool = False) -> None:
        if not squares:
            total[0] += np.add.reduce(x, axis=None)  # pairwise, so float32 is accurate enough within a batch
            return
        for (part,), scratch in self._slices(x):
            np.multiply(part, part, out=scratch.a)
            total[0] += np.add.reduce(scratch.a, axis=None)

    def add(self, a: Array, b: Array, out: Array) -> None:
        np.add(a, b, out=out)

    def normalise(self, product: Array, gains: Array, biases: Array | None, scale: Array, net_input: Array) -> None:
        for (x, s, v), scratch in self._slices(product, scale, net_input):
            normalise.numpy(x, gains, biases, s, v, scratch)

    def normalise_delta(self, delta: Array, normalised: Array, scale: Array, gains: Array) -> None:
        for (d, x, s), scratch in self._slices(delta, normalised, scale):
            normalise_delta.numpy(d, x, s, gains, scratch)

    def column_dots(self, x: Array, y: Array, out: Array) -> None:
        np.einsum("ij,ij->j", x, y, out=out)

    def weigh(self, weights: Array, losses: Array, delta: Array) -> None:
        for x in (losses, delta):
            for (part, w), scratch in self._slices(x, weights[:, None]):
                np.equal(w, 0, out=scratch.mask)
                np.copyto(part, 0, where=scratch.mask)
                np.multiply(part, w, out=part)

    def class_weights(self, targets: Array, table: Array, weights: Array | None, out: Array) -> None:
        index = targets
        if targets.ndim == 2:
            index = self._scratch_like(targets).row_index
            if targets.shape[1] == 1:
                np.greater_equal(targets[:, 0], 0.5, out=index, casting="unsafe")
            else:
                np.argmax(targets, axis=1, out=index)
        np.take(table, index, out=out, mode="clip")
        if weights is not None:
            np.multiply(out, weights, out=out)

    def dropout(self, seed: int, start: int, rate: float, x: Array, out: Array) -> None:
        for (x_part, part), scratch in self._slices(x.reshape(-1), out.reshape(-1)):
            dropout(seed, start, rate, x_part, part, scratch)
            start += len(part)

    def input_noise(self, seed: int, start: int, sd: float, x: Array, out: Array) -> None:
        for (x_part, part), _ in self._slices(x.reshape(-1), out.reshape(-1)):
            np.add(x_part, sd * normals(seed, Purpose.INPUT_NOISE, start, len(part)), out=part, casting="unsafe")
            start += len(part)

    def step_factor(self, scale: float, weight: Array | None, squares: Array | None, most: float, out: Array) -> None:
        total = 1.0 if weight is None else float(weight[0])
        mean = 1 / total if total > 0 else 0.0
        clip = 1.0 if squares is None else most / (math.sqrt(float(squares[0])) * scale * mean + 1e-6)
        out[0] = mean * min(clip, 1.0)

    def watch(self, gradients: Array, total: Array, step: int, flag: Array) -> None:
        finite = math.isfinite(total.item())
        for start in range(0, len(gradients), LOOK):
            part = gradients[start : start + LOOK]
            # 0 times what is finite is 0, and 0 times anything else is NaN
            finite = finite and part.dot(self._zeros[part.dtype][: len(part)]) == 0
        if not (finite or _is_set(flag)):
            flag[0] = step

    def limit_norms(self, weights: Array, most: float, flag: Array | None = None) -> None:
        if _is_set(flag):
            return
        for (w,), scratch in self._slices(weights):
            limit_norm.numpy(w, most, scratch)

    def average(self, parameters: Array, average: Array, rest: float, flag: Array | None = None) -> None:
        if _is_set(flag):
            return
        for (w, mean), scratch in self._slices(parameters, average):
            np.subtract(w, mean, out=scratch.a)
            scratch.a *= rest
            mean += scratch.a

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
        flag: Array | None = None,
    ) -> None:
        if _is_set(flag):
            return
        arrays = (parameters, gradients, *state)
        scale = scale if factor is None else scale * float(factor[0])
        if not any(penalty.weights_only for penalty in penalties):
            self._update(record, penalties, arrays, scale, scalars)
            return
        on_all = [penalty for penalty in penalties if not penalty.weights_only]
        for part, acting in ((slice(0, n_weights), penalties), (slice(n_weights, None), on_all)):
            self._update(record, acting, tuple(x[part] for x in arrays), scale, scalars)

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
        blocks = {(n, *shape[1:]) for shape in shapes for step in [_block_rows(shape)] for n in (step, shape[0] % step)}
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

    @staticmethod
    def _parts(n: int, width: int = 1) -> Iterator[slice]:
        """Slices of 0 .. n that fit the cache in float64, for `width` numbers a place."""
        step = max(1, 4 * BLOCK // width)
        return (slice(start, min(n, start + step)) for start in range(0, n, step))

    def _update(
        self,
        record: Update,
        penalties: Sequence[Penalty],
        arrays: tuple[Array, ...],
        scale: float,
        scalars: Mapping[str, float],
    ) -> None:
        own = {name: scalars[name] for name in record.scalar_names}
        for (w, gradient, *state), scratch in self._slices(*arrays):
            np.multiply(gradient, scale, out=scratch.a)
            for penalty in penalties:
                penalty.apply.numpy(w, scratch.a, scratch, scalars[penalty.name])
            record.update.numpy(w, scratch.a, *state, scratch, **own)

    def _slices(self, *arrays: Array) -> Iterator[tuple[tuple[Array, ...], Scratch]]:
        """The arrays cut into blocks of rows, with scratch arrays of the first one's shape."""
        first = arrays[0]
        rows, step = len(first), _block_rows(first.shape)
        if step >= rows:
            yield arrays, self._scratch_like(first)
            return
        for start in range(0, rows, step):
            part = tuple(x[start : start + step] for x in arrays)
            yield part, self._scratch_like(part[0])

    def _scratch_like(self, array: Array) -> Scratch:
        key = (array.shape, array.dtype)
        scratch = self._scratch.get(key)
        if scratch is None:
            scratch = self._scratch[key] = Scratch(*key)
        return scratch


# What the backend's results depend on --------------------------------------------------------------------


def _processor() -> str:
    """What the processor calls itself. BLAS chooses its kernels by it, and the blocks that they work on."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # another system than Linux
        names = []
    return next(filter(None, names), platform.processor() or platform.machine())


def _simd() -> str:
    """The sets of instructions that NumPy's own loops were chosen for, here and now."""
    from numpy.lib import introspect  # late: the first NumPy 2 has none

    functions = introspect.opt_func_info().values()
    return " ".join(sorted({chosen["current"] for signatures in functions for chosen in signatures.values()}))


def _blas() -> dict[str, Any]:
    """NumPy's BLAS: what it is called, with its version and the processor it takes this one for; and its threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as: two OpenMP libraries are loaded, which is no affair of ours
        loaded = or_unknown(threadpool_info)
    found = [library for library in loaded if library["user_api"] == "blas"] if loaded != "unknown" else []
    if not found:  # not one that can be asked, such as Apple's: what NumPy was built with
        built = or_unknown(lambda: np.show_config(mode="dicts")["Build Dependencies"]["blas"])
        words = [built.get(key) for key in ("name", "version")] if built != "unknown" else []
        return {"blas": " ".join(filter(None, words)) or "unknown", "threads": "unknown"}
    # wheels bring one each, NumPy's in numpy/ or numpy.libs/, and SciPy's is not the one wanted
    own = str(Path(np.__file__).resolve().parent)
    found.sort(key=lambda library: (not library["filepath"].startswith(own), library["filepath"]))
    words = [found[0].get(key) for key in ("internal_api", "version", "architecture")]
    return {"blas": " ".join(filter(None, words)), "threads": found[0]["num_threads"]}
