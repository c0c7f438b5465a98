"""What metrics are made of: sums over the rows of a split in float64, or all its rows, gathered batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gpu_bp.spec import GroupedLoss, Loss

if TYPE_CHECKING:
    from gpu_bp.data.task import Task


@dataclass(frozen=True)
class Rows:
    """Rows of a batch on the host: outputs (n, n_outputs), their targets, and weights (n,) if any, none of them 0."""

    task: Task
    loss: Loss
    outputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None

    @cached_property
    def count(self) -> np.ndarray:
        """As how many rows each counts, (n,): its weight, or else the integer 1."""
        return np.ones(len(self.outputs), np.int64) if self.weights is None else self.weights

    @cached_property
    def wanted(self) -> np.ndarray:
        """The numbers of the classes, as `Task.numbers`; of a regression the targets in float64, (n, n_targets)."""
        return self.task.numbers(self.targets) if self._classes else self.targets.astype(np.float64)

    @cached_property
    def predicted(self) -> np.ndarray:
        """Likewise what the outputs say: of several a target, the best single guess."""
        if self._classes:
            return self.task.numbers(self.outputs)
        return np.asarray(self.loss.point_prediction(self.outputs), np.float64)

    @property
    def _classes(self) -> bool:
        return self.task.kind == "classification"


class Gathered(Protocol):
    """What a metric needs of the rows; made for a number of classes, 0 where a row has not one class."""

    def __init__(self, n_classes: int) -> None: ...
    def add(self, rows: Rows) -> None:
        """Takes the rows of a batch in."""


class Errors:
    """How many rows have any output wrong, and how many there are."""

    def __init__(self, n_classes: int) -> None:
        self.wrong: float = 0
        self.n: float = 0

    def add(self, rows: Rows) -> None:
        self.wrong += rows.count[rows.task.wrong(rows.outputs, rows.targets)].sum().item()
        self.n += rows.count.sum().item()


class Counts:
    """How many rows are of each class, are decided to be, and are both: (n_classes,) each."""

    def __init__(self, n_classes: int) -> None:
        self.wanted, self.decided, self.right = np.zeros((3, n_classes))

    def add(self, rows: Rows) -> None:
        n_classes, right = len(self.wanted), rows.wanted == rows.predicted
        self.wanted += np.bincount(rows.wanted, rows.count, n_classes)
        self.decided += np.bincount(rows.predicted, rows.count, n_classes)
        self.right += np.bincount(rows.wanted[right], rows.count[right], n_classes)


class Residuals:
    """Sums over the rows, one an output: of residuals, absolute and squared, and of the targets and their squares.

    The targets are taken from the first row's on: sums about a value of the data itself do not cancel.
    """

    def __init__(self, n_classes: int) -> None:
        self.n: float = 0
        self.absolute: Any = 0.0
        self.squared: Any = 0.0
        self._sum: Any = 0.0
        self._square: Any = 0.0
        self._origin: np.ndarray | None = None

    def add(self, rows: Rows) -> None:
        if self._origin is None:
            self._origin = rows.wanted[0].copy()
        residual, from_origin, count = rows.predicted - rows.wanted, rows.wanted - self._origin, rows.count[:, None]
        self.n += rows.count.sum().item()
        self.absolute += (count * np.abs(residual)).sum(axis=0)
        self.squared += (count * residual**2).sum(axis=0)
        self._sum += (count * from_origin).sum(axis=0)
        self._square += (count * from_origin**2).sum(axis=0)

    @property
    def variation(self) -> np.ndarray:
        """The squares of the targets about their mean, summed."""
        return np.asarray(self._square - self._sum**2 / self.n)


class Covered:
    """How many targets lie in the interval that the outputs give for them, and how many there are."""

    def __init__(self, n_classes: int) -> None:
        self.inside: float = 0
        self.n: float = 0

    def add(self, rows: Rows) -> None:
        assert isinstance(rows.loss, GroupedLoss)
        grouped, wanted = rows.loss.grouped(rows.outputs), rows.wanted
        inside = (grouped[:, 0] <= wanted) & (wanted <= grouped[:, -1])
        self.inside += (rows.count[:, None] * inside).sum().item()
        self.n += rows.count.sum().item() * wanted.shape[1]


class Predictions:
    """All rows: the classes wanted and decided, as `Rows` has them, or the targets and outputs of a regression."""

    def __init__(self, n_classes: int) -> None:
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, rows: Rows) -> None:
        arrays = (rows.wanted, self._given(rows), *(() if rows.weights is None else (rows.weights,)))
        self._parts.append(tuple(np.array(array) for array in arrays))  # a batch's own arrays are filled again

    def _given(self, rows: Rows) -> np.ndarray:
        return rows.predicted

    def joined(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Targets, predictions and weights (rows,) if any; of one column a vector. None can be written to."""
        arrays = [np.concatenate(parts) for parts in zip(*self._parts, strict=True)]
        arrays = [array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array for array in arrays]
        for array in arrays:
            array.flags.writeable = False
        targets, predictions, *weights = arrays
        return targets, predictions, weights[0] if weights else None


class Outputs(Predictions):
    """All rows: the classes wanted, or the targets, and the outputs as the network gives them, in float64."""

    def _given(self, rows: Rows) -> np.ndarray:
        return rows.outputs.astype(np.float64)
