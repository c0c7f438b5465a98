"""Tables from csv files: which columns are inputs and targets, and how a column becomes numbers.

A categorical column becomes one input a category (one-hot), a numeric one itself, standardised where asked:
less its mean, divided by its standard deviation. Categories and statistics come from the training rows alone,
and are saved with the model, so that `predict` takes raw rows and gives raw units.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpu_bp.errors import UserError, unknown


class Table:
    """The text of a csv file with a header, by column.

    Raises:
        UserError: the file is missing, empty or not UTF-8 text; a header names a column twice; a row has
            another number of fields than the header (which line).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"no file {path}")
        rows: list[list[str]] = []
        self.lines: list[int] = []  # where each row ends in the file
        line = 1
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file, strict=True)
                header = next((row for row in reader if row), None)
                if header is None:
                    raise UserError(f"{path} is empty; a header and rows are needed")
                for row in reader:
                    line = reader.line_num
                    if not row:
                        continue
                    if len(row) != len(header):
                        raise UserError(
                            f"{path}, line {reader.line_num}: {len(row)} fields, the header has {len(header)}"
                        )
                    rows.append(row)
                    self.lines.append(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, after line {line}: not text in UTF-8 ({error.reason})") from None
        except csv.Error as error:
            raise UserError(f"{path}, after line {line}: {error}") from None
        self.names = [name.strip() for name in header]
        if "" in self.names:
            raise UserError(f"{path}, line 1: column {self.names.index('') + 1} has no name")
        if len(set(self.names)) < len(self.names):
            twice = next(name for k, name in enumerate(self.names) if name in self.names[:k])
            raise UserError(f"{path}, line 1: the column {twice!r} is there twice")
        if len(self.names) == 1 and ";" in self.names[0]:
            raise UserError(f"{path}, line 1: there is one column, {self.names[0]!r}; the separator must be a comma")
        if all(map(_is_number, self.names)):
            raise UserError(f"{path}, line 1: a header with the names of the columns is needed, not numbers")
        if not rows:
            raise UserError(f"{path} has a header and no rows")
        self._columns = dict(zip(self.names, zip(*rows, strict=True), strict=True))

    def __len__(self) -> int:
        return len(self.lines)

    def text(self, name: str) -> tuple[str, ...]:
        """A column as it stands in the file, stripped of blanks around it."""
        if name not in self._columns:
            raise UserError(f"{self.path}: {unknown('column', name, self.names)}")
        column = tuple(field.strip() for field in self._columns[name])
        if "" in column:
            raise self.fault(name, column.index(""), "the field is empty")
        return column

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64, every value finite."""
        column = self.text(name)
        values = np.empty(len(column))
        for row, field in enumerate(column):
            try:
                values[row] = _number(field)
            except ValueError:
                hint = "not a number (if it is a category, name the column in data.categorical_columns)"
                raise self.fault(name, row, f"{field!r} is {hint}") from None
            if not math.isfinite(values[row]):
                raise self.fault(name, row, f"{field} is not a finite number")
        return values

    def fault(self, name: str, row: int, what: str) -> UserError:
        """The error for one field of the file."""
        return UserError(f"{self.path}, line {self.lines[row]}, column {name}: {what}")


def _number(text: str) -> float:
    """A number as other programs write it: float() alone would take 1_000 and the digits of other scripts."""
    if "_" in text or not text.isascii():
        raise ValueError
    return float(text)


def _is_number(text: str) -> bool:
    try:
        _number(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Numeric:
    """A numeric column: (value - mean) / sd."""

    name: str
    mean: float = 0.0
    sd: float = 1.0

    @classmethod
    def fit(cls, table: Table, name: str, n_train: int, standardise: bool) -> Numeric:
        """Mean and (population) standard deviation of the training rows; a constant column keeps sd 1."""
        if not standardise:
            return cls(name)
        values = table.numbers(name)[:n_train]
        if values.min() == values.max():  # its computed deviation may be a rounding error, not 0
            return cls(name, float(values[0]))
        with np.errstate(over="ignore", invalid="ignore"):
            mean, sd = float(values.mean()), float(values.std())
        if not (math.isfinite(mean) and 0 < sd < math.inf):
            raise table.fault(name, int(np.abs(values).argmax()), "the number is too large to standardise the column")
        return cls(name, mean, sd)

    def names(self) -> list[str]:
        return [self.name]

    def encode(self, table: Table) -> np.ndarray:
        """The column as (rows, 1)."""
        return ((table.numbers(self.name) - self.mean) / self.sd)[:, None]

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Back to the column's own units, in float64."""
        return np.asarray(values.astype(np.float64) * self.sd + self.mean)


@dataclass(frozen=True)
class Categorical:
    """A categorical column: its categories, as text, in the order of their inputs or classes."""

    name: str
    categories: tuple[str, ...]

    @classmethod
    def fit(cls, table: Table, name: str, n_train: int) -> Categorical:
        """The categories of the training rows: numbers in their order, or else text in its."""
        seen = sorted(set(table.text(name)[:n_train]))
        numeric = all(_is_number(category) and math.isfinite(float(category)) for category in seen)
        return cls(name, tuple(sorted(seen, key=float) if numeric else seen))

    def names(self) -> list[str]:
        return [f"{self.name}={category}" for category in self.categories]

    def indices(self, table: Table) -> np.ndarray:
        """Which category each row has: (rows,) int64."""
        places = {category: k for k, category in enumerate(self.categories)}
        column = table.text(self.name)
        indices = np.array([places.get(field, -1) for field in column], np.int64)
        if (indices < 0).any():
            row = int(np.argmin(indices))
            known = ", ".join(self.categories[:12]) + (", ..." if len(self.categories) > 12 else "")
            raise table.fault(self.name, row, f"{column[row]!r} does not occur in the training rows ({known})")
        return indices

    def encode(self, table: Table) -> np.ndarray:
        """One-hot: (rows, categories)."""
        return np.asarray(np.eye(len(self.categories))[self.indices(table)])


@dataclass(frozen=True)
class Columns:
    """How a table becomes inputs and targets: what is fitted to the training rows and saved with the model."""

    inputs: tuple[Numeric | Categorical, ...]
    targets: tuple[Numeric | Categorical, ...]

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
        standardise_targets: bool = True,
    ) -> Columns:
        """All columns but targets and dropped ones are inputs.

        `standardised` None means every numeric column, targets among them where `standardise_targets`.
        """
        named = {"target": targets, "drop": dropped, "categorical": categorical, "standardise": standardised or ()}
        for key, names in named.items():
            for k, name in enumerate(names):
                if name not in table.names:
                    raise UserError(f"{table.path}: {unknown('column', name, table.names)}")
                if name in names[:k]:
                    raise UserError(f"data.{key}_columns names {name!r} twice")
        for one, other in (("target", "drop"), ("categorical", "standardise")):
            if both := sorted(set(named[one]) & set(named[other])):
                raise UserError(
                    f"{both[0]!r} stands in data.{one}_columns and in data.{other}_columns; it can be one alone"
                )

        def column(name: str) -> Numeric | Categorical:
            if name in categorical:
                return Categorical.fit(table, name, n_train)
            by_default = standardise_targets or name not in targets
            return Numeric.fit(table, name, n_train, by_default if standardised is None else name in standardised)

        used = [name for name in table.names if name not in targets and name not in dropped]
        if not used:
            raise UserError(f"{table.path}: no column is left for the inputs")
        return cls(tuple(map(column, used)), tuple(map(column, targets)))

    def encode_inputs(self, table: Table) -> np.ndarray:
        """(rows, n_inputs) float64."""
        return np.concatenate([column.encode(table) for column in self.inputs], axis=1)

    def encode_targets(self, table: Table) -> np.ndarray:
        """(rows, n_targets) float64."""
        return np.concatenate([column.encode(table) for column in self.targets], axis=1)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of a single categorical target; empty where the target is something else."""
        target = self.targets[0]
        return target.categories if len(self.targets) == 1 and isinstance(target, Categorical) else ()

    def class_indices(self, table: Table) -> np.ndarray:
        """Which of `classes` each row is: (rows,) int64."""
        target = self.targets[0]
        assert isinstance(target, Categorical)
        return target.indices(table)

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the model file."""

        def plain(column: Numeric | Categorical) -> dict[str, Any]:
            if isinstance(column, Categorical):
                return {"name": column.name, "categories": list(column.categories)}
            return {"name": column.name, "mean": column.mean, "sd": column.sd}

        return {"inputs": [plain(c) for c in self.inputs], "targets": [plain(c) for c in self.targets]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Columns:
        """The inverse of `to_json`."""

        def column(plain: dict[str, Any]) -> Numeric | Categorical:
            if "categories" in plain:
                return Categorical(plain["name"], tuple(plain["categories"]))
            return Numeric(plain["name"], plain["mean"], plain["sd"])

        return cls(tuple(map(column, data["inputs"])), tuple(map(column, data["targets"])))


class TableReader:
    def __init__(self, table: Table, columns: Columns) -> None:

        self.n_rows = len(table)
        self._inputs = columns.encode_inputs(table)
        self.classes = columns.classes
        self._wanted = columns.class_indices(table) if self.classes else columns.encode_targets(table)
        self.n_inputs = self._inputs.shape[1]
        self.n_targets = 1 if self.classes else self._wanted.shape[1]
        self.block_rows = 1024
        self.binary = False
        self.where = f"{table.path}, {', '.join(c.name for c in columns.targets)}"

    def read(self, first: int, n: int) -> Any:
        from gpu_bp.data.source import Rows

        x, d = self._inputs[first : first + n], self._wanted[first : first + n]
        return Rows(x, labels=d) if self.classes else Rows(x, targets=d)
