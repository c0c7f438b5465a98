"""Formulas of synthetic data, written once: NumPy evaluates them on arrays, and CUDA text is traced from them.

A formula is a function of a `Place`, the row and the column that it gives the value of, in ordinary NumPy:

    def target(at):                        # Friedman's first, of the stage "x" and normal noise
        x = lambda j: at.stage("x", j)
        return 10 * at.sinpi(x(0) * x(1)) + 20 * (x(2) - 0.5) ** 2 + 10 * x(3) + 5 * x(4) + at.normal(NOISE, 0)

NumPy calls it once for a block of rows, with arrays for `row` and `column` that broadcast to (rows, columns). The CuPy
backend calls it once in all, with symbols, whose ufuncs write down CUDA text (`backends/trace.py`); one thread
then computes one value. Everything is float64 until it is cast into the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpu_bp.registry import Purpose, normals, sincospi, uniforms

TERMS = 4096  # of a sum that are added up at a time


class Draws(NamedTuple):
    """A stream of random numbers with so many a row: draw j of row i is its element i * per_row + j."""

    purpose: Purpose
    per_row: int


class Place(Protocol):
    """Where a formula is evaluated. `row` and `column` are whole numbers from 0, as arrays or symbols.

    An index j of a method is a whole number, or computed from `column` alone.
    """

    row: Any
    column: Any

    def uniform(self, draws: Draws, j: Any) -> Any:
        """Draw j of this row, uniform on [0, 1)."""

    def normal(self, draws: Draws, j: Any) -> Any:
        """Draw j of this row, standard normal."""

    def stage(self, name: str, j: Any) -> Any:
        """The value of an earlier stage in this row and column j."""

    def table(self, name: str, j: Any) -> Any:
        """Entry j of a table of one dimension."""

    def dot(self, stage: str, table: str) -> Any:
        """The sum over j of stage[row, j] * table[column, j], for a table of two dimensions."""

    def sinpi(self, x: Any) -> Any:
        """sin(pi x)."""

    def cospi(self, x: Any) -> Any:
        """cos(pi x)."""


Formula = Callable[[Place], Any]


class Columns(NamedTuple):
    """A formula and over how many columns it goes."""

    width: int
    formula: Formula


@dataclass(frozen=True, eq=False)
class Program:
    """What makes the rows of a set: stages of float64 one after the other, then the outputs.

    `tables` are constant arrays that the formulas refer to by name: float64, of one or two dimensions.
    """

    outputs: tuple[Columns, ...]
    stages: Mapping[str, Columns] = field(default_factory=dict)
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def width(self) -> int:
        """The widest of its arrays."""
        return max(columns.width for columns in (*self.stages.values(), *self.outputs))


def runs(rows: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Start and end of each run of consecutive row numbers, of `most` rows at most."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1).tolist()
    for begin, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield from ((start, min(start + most, end)) for start in range(begin, end, most))


class _Rows:
    """What the places of one block of rows share: their draws and stages, each made when first asked for."""

    def __init__(self, program: Program, seed: int, rows: np.ndarray) -> None:
        self.program = program
        self.numbers = rows[:, None]
        self._seed = seed
        self._draws: dict[tuple[Any, Draws], np.ndarray] = {}
        self._stages: dict[str, np.ndarray] = {}

    def draws(self, draw: Callable[..., np.ndarray], draws: Draws) -> np.ndarray:
        """(rows, per_row) of a stream."""
        if (draw, draws) not in self._draws:
            k = draws.per_row
            numbers = self.numbers[:, 0]
            parts = [
                draw(self._seed, draws.purpose, int(numbers[start]) * k, (end - start) * k)
                for start, end in runs(numbers, len(numbers))
            ]
            drawn = parts[0] if len(parts) == 1 else np.concatenate(parts)
            self._draws[draw, draws] = drawn.reshape(len(self.numbers), k)
        return self._draws[draw, draws]

    def stage(self, name: str) -> np.ndarray:
        """(rows, width)."""
        if name not in self._stages:
            columns = self.program.stages[name]
            value = np.broadcast_to(self.evaluate(columns), (len(self.numbers), columns.width))
            self._stages[name] = np.ascontiguousarray(value, np.float64)
        return self._stages[name]

    def evaluate(self, columns: Columns) -> Any:
        """The values of a formula, which broadcast to (rows, width)."""
        return columns.formula(NumpyPlace(self, columns.width))


class NumpyPlace:
    """All places of a block of rows at once: `row` is (rows, 1), `column` (1, width)."""

    def __init__(self, rows: _Rows, width: int) -> None:
        self._rows = rows
        self.row = rows.numbers
        self.column = np.arange(width)[None]

    def _pick(self, values: np.ndarray, j: Any) -> np.ndarray:
        """Columns j of values: a view where j is one number, or all of them."""
        if not isinstance(j, np.ndarray):
            return values[:, j : j + 1]
        return values if j is self.column and j.shape[1] == values.shape[1] else values[:, j[0]]

    def uniform(self, draws: Draws, j: Any) -> np.ndarray:
        return self._pick(self._rows.draws(uniforms, draws), j)

    def normal(self, draws: Draws, j: Any) -> np.ndarray:
        return self._pick(self._rows.draws(normals, draws), j)

    def stage(self, name: str, j: Any) -> np.ndarray:
        return self._pick(self._rows.stage(name), j)

    def table(self, name: str, j: Any) -> np.ndarray:
        return np.asarray(self._rows.program.tables[name][j])

    def dot(self, stage: str, table: str) -> np.ndarray:
        # Not matmul: that rounds a row's sums differently in another block of rows. So does einsum where there are more
        # terms than it buffers, 8192, hence in parts.
        x, w = self._rows.stage(stage), self._rows.program.tables[table]
        parts = (slice(start, start + TERMS) for start in range(0, x.shape[1], TERMS))
        return np.asarray(sum(np.einsum("ij,kj->ik", x[:, part], w[:, part]) for part in parts))

    def sinpi(self, x: Any) -> np.ndarray:
        return sincospi(x)[0]

    def cospi(self, x: Any) -> np.ndarray:
        return sincospi(x)[1]


def evaluate(program: Program, seed: int, rows: np.ndarray, outputs: tuple[np.ndarray, ...]) -> None:
    """Writes the outputs of a program for rows of these numbers, (n,) int64; one of (n,) stands for (n, 1)."""
    block = _Rows(program, seed, rows)
    for columns, output in zip(program.outputs, outputs, strict=True):
        matrix = output.reshape(len(rows), columns.width)
        np.copyto(matrix, block.evaluate(columns), casting="unsafe")
