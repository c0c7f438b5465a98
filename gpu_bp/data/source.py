"""Where rows come from, and what they are put into.

reader -> source -> batch: a `Reader` gives rows as they stand in a file, a `Source` gives them as the network sees
them (scaled, targets coded for the loss), written into the arrays of a `Batch`. Rows have numbers, from 0, and any
range can be asked for at any time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gpu_bp.data.task import Task
from gpu_bp.spec import Array

if TYPE_CHECKING:
    from gpu_bp.backends import Backend

BLOCK_ROWS = 1024
BLOCK_BYTES = 2**20  # of numbers of 8 bytes, whatever they are in the file

# Numbers that are read at once: few calls for long ranges, and what is made on the way stays small.
READ_NUMBERS = 2**20


def block_rows_for(width: int) -> int:
    """How many rows of so many numbers are read together where nothing speaks for another number."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (8 * width)))


@dataclass(frozen=True)
class Batch:
    """Rows as a step sees them.

    inputs (n, n_inputs); targets (n, n_targets), or (n,) int64 for class indices; rows (n,) int64, the row
    numbers in the source; weights (n,), or None where each row weighs 1.

    A step may take its rows in several batches: `place` is the place of the first row among the step's rows, and the
    batch is the `last` of its step or not; where not all of the step's rows come here, it has `rows_in_step` in all.
    Or it has the rows of several `steps`, as many for each.
    """

    inputs: Array
    targets: Array
    rows: Array
    weights: Array | None = None
    place: int = 0
    last: bool = True
    steps: int = 1
    rows_in_step: int = 0

    @property
    def n(self) -> int:
        return len(self.inputs)

    @property
    def kind(self) -> tuple[int, bool]:
        """Of what kind its arrays are: the dimensions of the targets, and whether there are weights."""
        return self.targets.ndim, self.weights is not None

    @property
    def step_rows(self) -> int:
        """Rows of its step, here and elsewhere; only a batch that is not the whole step has to be told."""
        return self.rows_in_step or self.n

    @classmethod
    def of(cls, filled: Sequence[Array], rows: Array, place: int = 0, last: bool = True) -> Batch:
        """A batch of what a source fills, and of row numbers."""
        inputs, targets, *weights = filled
        return cls(inputs, targets, rows, weights[0] if weights else None, place, last)

    def of_steps(self) -> list[Batch]:
        """The batches of its steps, one each: views."""
        n = self.n // self.steps
        return [self.part(step * n, (step + 1) * n) for step in range(self.steps)]

    @property
    def filled(self) -> tuple[Array, ...]:
        """What a source fills: inputs, targets, and weights where there are any."""
        return (self.inputs, self.targets) if self.weights is None else (self.inputs, self.targets, self.weights)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What a source fills, and the row numbers."""
        return *self.filled, self.rows

    def map(self, change: Callable[[Array], Array]) -> Batch:
        """A batch of arrays made of these, one of each."""
        *filled, rows = map(change, self.arrays)
        return Batch.of(filled, rows)

    def part(self, start: int, end: int) -> Batch:
        """The rows from start to end: views."""
        return self.map(lambda array: array[start:end])


@dataclass(frozen=True)
class Rows:
    """Rows as they stand in a file: inputs (n, n_inputs), and what is wanted of them.

    Either `labels`, (n,) int64 numbers of classes, whose coding is the loss's affair; or `targets`, (n, n_targets).
    Perhaps `weights` (n,), none negative.
    """

    inputs: np.ndarray
    targets: np.ndarray | None = None
    labels: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def wanted(self) -> np.ndarray:
        """The labels or the targets."""
        wanted = self.targets if self.labels is None else self.labels
        assert wanted is not None
        return wanted


class Reader(Protocol):
    """Rows as they stand in files, by number.

    `classes` names the classes of labels, and is empty where targets are numbers; `n_targets` is then how many a
    row has (1 for labels), and `binary` says that they are 0 and 1. `weighted`: rows have weights. `block_rows` are
    best read together. `where` the rows come from is said in errors.
    """

    n_rows: int
    n_inputs: int
    n_targets: int
    classes: tuple[str, ...]
    binary: bool
    weighted: bool
    block_rows: int
    where: str

    def read(self, first: int, n: int, out: Rows | None = None) -> Rows:
        """The n rows from number `first` on: finite numbers, of float64 or of float32 where the file has these.

        Where `out` has arrays of the right dtype, a reader may fill and return them instead of new ones.

        Raises:
            UserError: a file is broken there (which, and where in it).
        """


class Source(ABC):
    """Rows as a network sees them, by number. A source of your own is a subclass with one method, `fill`.

    Args:
        n_rows: how many there are.
        n_inputs: numbers a row has as inputs.
        n_targets: numbers a row has as targets; with `indexed`, how many classes there are.
        task: what is asked of the network.
        indexed: targets are class indices (n,) int64, as for loss cross_entropy, and not numbers (n, n_targets).
        weighted: rows have weights, finite and not negative, not all of them 0.
        block_rows: rows that are best asked for together; 1 where any rows come as fast as consecutive ones.

    Attributes:
        backend: whose arrays it fills; None is the host, and then `fill` may be called by two threads at once.
    """

    backend: Backend | None = None

    def __init__(
        self,
        n_rows: int,
        n_inputs: int,
        n_targets: int,
        task: Task,
        *,
        indexed: bool = False,
        weighted: bool = False,
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        self.n_rows = n_rows
        self.n_inputs = n_inputs
        self.n_targets = n_targets
        self.task = task
        self.indexed = indexed
        self.weighted = weighted
        self.block_rows = block_rows

    @property
    def read_rows(self) -> int:
        """Rows to ask for at once where many are wanted: whole blocks, of about a million numbers."""
        return self.block_rows * max(1, READ_NUMBERS // (self.block_rows * (self.n_inputs + 1)))

    @abstractmethod
    def fill(self, rows: Array, batch: Batch) -> None:
        """Writes the rows of these numbers, (n,) int64, into batch.inputs, batch.targets and, if any, batch.weights.

        A pure function of the row numbers: whatever else is asked for, and in whatever order, row i is the same.
        """
