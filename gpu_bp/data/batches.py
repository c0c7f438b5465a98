"""Batches: which rows a step sees, in which order, and the arrays they are put into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from gpu_bp.backends import Backend
from gpu_bp.errors import UserError
from gpu_bp.registry import Purpose, permutation, uniforms
from gpu_bp.spec import Array

Sampling = Literal["shuffled", "ordered", "replacement"]


@dataclass(frozen=True)
class Batch:
    """The rows of one step, on the device.

    inputs (n, n_inputs); targets (n, n_targets), or (n,) int64 for class indices; rows (n,) int64, the row
    numbers in the source.
    """

    inputs: Array
    targets: Array
    rows: Array

    @property
    def n(self) -> int:
        return len(self.inputs)


class Source(Protocol):
    """Rows of inputs and targets by number."""

    n_rows: int

    def empty(self, n: int) -> Batch:
        """A batch of n rows with arrays of its own, not yet filled."""

    def fill(self, rows: Array, batch: Batch) -> None:
        """Puts the rows of these numbers (n,) int64, on the device, into a batch of n."""


def cast(values: np.ndarray, dtype: Any, what: str) -> np.ndarray:
    """Finite numbers (rows, n) in a floating dtype.

    Raises:
        UserError: one is too large for it (which).
    """
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    if not np.isfinite(result).all():
        row, column = np.argwhere(~np.isfinite(result))[0]
        raise UserError(
            f"{what}, row {row}, column {column} (counting from 0): {values[row, column]:g} is too large for "
            f"{result.dtype}; scale the data, or use train.precision = 'float64'"
        )
    return result


class ResidentSource:
    """A source whose rows all lie on the device.

    Args:
        inputs, targets: host arrays of n rows; inputs and real targets are cast to `dtype`, class indices are int64.

    Raises:
        UserError: a number is too large for the dtype.
    """

    def __init__(self, backend: Backend, inputs: np.ndarray, targets: np.ndarray, dtype: Any) -> None:
        self._backend = backend
        self.n_rows = len(inputs)
        self.inputs = backend.to_device(cast(inputs, dtype, "inputs"))
        self.targets = backend.to_device(targets if targets.ndim == 1 else cast(targets, dtype, "targets"))

    def empty(self, n: int) -> Batch:
        zeros = self._backend.zeros
        inputs, targets = (zeros((n, *like.shape[1:]), like.dtype) for like in (self.inputs, self.targets))
        return Batch(inputs, targets, zeros((n,), np.int64))

    def fill(self, rows: Array, batch: Batch) -> None:
        self._backend.gather(self.inputs, rows, batch.inputs)
        self._backend.gather(self.targets, rows, batch.targets)


def order(sampling: Sampling, seed: int, epoch: int, n_rows: int, batch_size: int) -> np.ndarray:
    """The row numbers of an epoch in the order of the steps: int64, a pure function of its arguments.

    With "replacement" every batch is full; else each row comes once and the last batch may be shorter.
    """
    if sampling == "ordered":
        return np.arange(n_rows)
    if sampling == "shuffled":
        return permutation(seed, Purpose.ORDER, epoch, n_rows)
    count = steps_per_epoch(n_rows, batch_size) * batch_size
    return (uniforms(seed, Purpose.ORDER, epoch * count, count) * n_rows).astype(np.int64)


def steps_per_epoch(n_rows: int, batch_size: int) -> int:
    """How many batches an epoch has, the last and perhaps shorter one included."""
    return -(-n_rows // batch_size)


class Batches:
    """The batches of a source, epoch after epoch, put into the same arrays again and again."""

    def __init__(self, backend: Backend, source: Source, batch_size: int, sampling: Sampling, seed: int) -> None:
        self._backend = backend
        self._source = source
        self._sampling = sampling
        self._seed = seed
        self.size = min(batch_size, source.n_rows)
        self.per_epoch = steps_per_epoch(source.n_rows, self.size)
        self._arrays = source.empty(self.size)
        self._rows: Array | None = None  # of the epoch in progress, on the device

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch; each is valid until the next is asked for."""
        if self._rows is None or self._sampling != "ordered":
            new = order(self._sampling, self._seed, epoch, self._source.n_rows, self.size)
            self._rows = self._backend.to_device(new)
        rows = self._rows
        for start in range(0, len(rows), self.size):
            part = rows[start : start + self.size]
            n = len(part)
            batch = Batch(self._arrays.inputs[:n], self._arrays.targets[:n], part)
            self._source.fill(part, batch)
            yield batch
