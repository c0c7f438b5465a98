"""Which columns of a table are inputs and targets, and how a column becomes numbers.

A categorical column becomes one input a category (one-hot), a numeric one itself, standardised where asked:
less its mean, divided by its standard deviation. Categories and statistics come from the training rows alone,
and are saved with the model, so that `predict` takes raw rows and gives raw units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gpu_bp.data.table import Chunk, Table, is_number
from gpu_bp.errors import UserError, unknown


@dataclass(frozen=True)
class Numeric:
    """A numeric column: (value - mean) / sd."""

    name: str
    mean: float = 0.0
    sd: float = 1.0

    @property
    def width(self) -> int:
        return 1

    def names(self) -> list[str]:
        return [self.name]

    def read(self, chunk: Chunk) -> np.ndarray:
        """(rows,) float64."""
        return np.asarray((chunk.numbers(self.name) - self.mean) / self.sd)

    def write(self, values: np.ndarray, out: np.ndarray) -> None:
        """What was read, into a column (rows, 1)."""
        out[:, 0] = values

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Back to the column's own units, in float64."""
        return np.asarray(values.astype(np.float64) * self.sd + self.mean)


@dataclass(frozen=True)
class Weights(Numeric):
    """The column of the rows' weights: numbers that are not negative."""

    def read(self, chunk: Chunk) -> np.ndarray:
        weights = super().read(chunk)
        if weights.min() < 0:
            row = int(np.argmin(weights))
            raise chunk.fault(self.name, row, f"the weight is negative, {weights[row]:g}")
        return weights


@dataclass(frozen=True)
class Categorical:
    """A categorical column: its categories, as text, in the order of their inputs or classes."""

    name: str
    categories: tuple[str, ...]

    @property
    def width(self) -> int:
        return len(self.categories)

    def names(self) -> list[str]:
        return [f"{self.name}={category}" for category in self.categories]

    def read(self, chunk: Chunk) -> np.ndarray:
        """Which category each row has: (rows,) int64."""
        values, codes = chunk.coded(self.name)
        indices = np.array([self._places.get(value, -1) for value in values], np.int64)[codes]
        if (indices < 0).any():
            row = int(np.argmin(indices))
            known = ", ".join(self.categories[:12]) + (", ..." if len(self.categories) > 12 else "")
            what = f"{values[codes[row]]!r} does not occur in the training rows ({known})"
            raise chunk.fault(self.name, row, what)
        return np.asarray(indices)

    def write(self, values: np.ndarray, out: np.ndarray) -> None:
        """What was read, into one column a category (rows, categories)."""
        out[:] = 0
        out[np.arange(len(values)), values] = 1

    @cached_property
    def _places(self) -> dict[str, int]:
        return {category: k for k, category in enumerate(self.categories)}


Column = Numeric | Categorical


@dataclass(frozen=True)
class Columns:
    """How a table becomes inputs and targets: what is fitted to the training rows and saved with the model."""

    inputs: tuple[Column, ...]
    targets: tuple[Column, ...]

    @classmethod
    def fit(
        cls,
        table: Table,
        n_train: int,
        *,
        targets: Sequence[str],
        dropped: Sequence[str] = (),
        categorical: Sequence[str] = (),
        standardised: Sequence[str] | None = None,
        weight: str | None = None,
        standardise_targets: bool = True,
    ) -> Columns:
        """All columns but targets, dropped ones and the weight are inputs; the first n_train rows are read, chunk by
        chunk.

        `standardised` None means every numeric column, targets among them where `standardise_targets`.
        """
        named = {
            "target_columns": targets,
            "drop_columns": dropped,
            "categorical_columns": categorical,
            "standardise_columns": standardised or (),
            "weight_column": () if weight is None else (weight,),
        }
        for key, names in named.items():
            for k, name in enumerate(names):
                if name not in table.names:
                    raise UserError(f"{table.path}: {unknown('column', name, table.names)}")
                if name in names[:k]:
                    raise UserError(f"data.{key} names {name!r} twice")
        apart = [("target_columns", "drop_columns"), ("categorical_columns", "standardise_columns")]
        for one, other in (*apart, *((key, "weight_column") for key in named if key != "weight_column")):
            if both := sorted(set(named[one]) & set(named[other])):
                raise UserError(f"{both[0]!r} stands in data.{one} and in data.{other}; it can be one alone")
        others = {*targets, *dropped, weight}
        used = [name for name in table.names if name not in others]
        if not used:
            raise UserError(f"{table.path}: no column is left for the inputs")

        def standardise(name: str) -> bool:
            by_default = standardise_targets or name not in targets
            return by_default if standardised is None else name in standardised

        fits: dict[str, _NumericFit | _CategoricalFit] = {
            name: _CategoricalFit(name) if name in categorical else _NumericFit(name)
            for name in (*used, *targets)
            if name in categorical or standardise(name)
        }
        for k in range(table.chunk_of(n_train - 1) + 1 if fits else 0):
            chunk, first = table.chunk(k), int(table.starts[k])
            for fit in fits.values():
                fit.add(chunk, first, min(chunk.n_rows, n_train - first))

        def column(name: str) -> Column:
            return fits[name].column(table) if name in fits else Numeric(name)

        return cls(tuple(map(column, used)), tuple(map(column, targets)))

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of a single categorical target; empty where the target is something else."""
        target = self.targets[0] if len(self.targets) == 1 else None
        return target.categories if isinstance(target, Categorical) else ()

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the model file."""

        def plain(column: Column) -> dict[str, Any]:
            if isinstance(column, Categorical):
                return {"name": column.name, "categories": list(column.categories)}
            return {"name": column.name, "mean": column.mean, "sd": column.sd}

        return {"inputs": [plain(c) for c in self.inputs], "targets": [plain(c) for c in self.targets]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Columns:
        """The inverse of `to_json`."""

        def column(plain: dict[str, Any]) -> Column:
            if "categories" in plain:
                return Categorical(plain["name"], tuple(plain["categories"]))
            return Numeric(plain["name"], plain["mean"], plain["sd"])

        return cls(tuple(map(column, data["inputs"])), tuple(map(column, data["targets"])))


class _NumericFit:
    """Mean and (population) standard deviation of a column, gathered chunk by chunk.

    Chan, Golub and LeVeque: squares are summed about the mean of their own chunk, and chunks merged by how far their
    means are apart. All is taken less the first value, so that nothing cancels however far from zero the values lie.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._n = 0
        self._origin = self._mean = self._squares = 0.0
        self._least, self._most = math.inf, -math.inf
        self._largest, self._largest_row = -1.0, 0

    def add(self, chunk: Chunk, first: int, n: int) -> None:
        """The first n rows of a chunk that starts with row `first` of the table."""
        values = chunk.numbers(self._name)[:n]
        self._least, self._most = min(self._least, float(values.min())), max(self._most, float(values.max()))
        row = int(np.abs(values).argmax())
        if abs(values[row]) > self._largest:
            self._largest, self._largest_row = float(abs(values[row])), first + row
        if not self._n:
            self._origin = float(values[0])
        with np.errstate(over="ignore", invalid="ignore"):
            values = values - self._origin
            mean = values.mean()
            apart, together = mean - self._mean, self._n + n
            within = np.square(values - mean).sum()
            self._squares = float(self._squares + within + apart * apart * self._n * n / together)
            self._mean = float(self._mean + apart * n / together)
        self._n = together

    def column(self, table: Table) -> Numeric:
        """A column that does not vary keeps sd 1."""
        if self._least == self._most:  # its computed deviation may be a rounding error, not 0
            return Numeric(self._name, self._least)
        mean, sd = self._origin + self._mean, math.sqrt(self._squares / self._n)
        if not (math.isfinite(mean) and 0 < sd < math.inf):
            k = table.chunk_of(self._largest_row)
            row = self._largest_row - int(table.starts[k])
            raise table.chunk(k).fault(self._name, row, "the number is too large to standardise the column")
        return Numeric(self._name, mean, sd)


class _CategoricalFit:
    """The categories of a column, gathered chunk by chunk."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: set[str] = set()

    def add(self, chunk: Chunk, first: int, n: int) -> None:
        """The first n rows of a chunk."""
        values, codes = chunk.coded(self._name)
        self._seen.update(values[code] for code in np.unique(codes[:n]))

    def column(self, table: Table) -> Categorical:
        """Numbers in their order, or else text in its."""
        seen = sorted(self._seen)
        numeric = all(is_number(category) and math.isfinite(float(category)) for category in seen)
        return Categorical(self._name, tuple(sorted(seen, key=float) if numeric else seen))
