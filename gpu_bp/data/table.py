"""Tables in files, chunk by chunk: what csv and Parquet files have in common.

A `Table` knows its columns, how many rows it has and where its chunks lie; a `Chunk` is so many rows of it, read on
their own. So a table may be larger than memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gpu_bp.errors import UserError, unknown

MOST_COLUMNS = 2**16


class Table(ABC):
    """The columns and chunks of a file.

    `names` of the columns, and the place of each; `starts`, (chunks + 1,) int64: the number of each chunk's first
    row, and after the last of them that of all rows.
    """

    path: Path
    names: Mapping[str, int]
    starts: np.ndarray

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])

    def chunk_of(self, row: int) -> int:
        """The number of the chunk that has a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    @abstractmethod
    def chunk(self, k: int) -> Chunk:
        """Chunk number k.

        Raises:
            UserError: the file cannot be read there.
        """


class Chunk(ABC):
    """Consecutive rows of a table, by column; `row` is counted from the first of them.

    All methods raise a UserError that says where in the file the fault is: the column is unknown, a row is broken,
    or a field is empty or of the wrong kind.
    """

    def __init__(self, path: Path, names: Mapping[str, int], n_rows: int) -> None:
        self.path = path
        self.names = names
        self.n_rows = n_rows

    @abstractmethod
    def text(self, name: str) -> Sequence[str]:
        """A column as it stands in the file, stripped of blanks around it; no field is empty."""

    @abstractmethod
    def fault(self, name: str, row: int, what: str) -> UserError:
        """The error for one field of the file."""

    def coded(self, name: str) -> tuple[list[str], np.ndarray]:
        """The column as values that occur in it, as `text` gives them, and which of these each row has: (n_rows,)."""
        places: dict[str, int] = {}
        codes = [places.setdefault(field, len(places)) for field in self.text(name)]
        return list(places), np.array(codes, np.int64)

    def numbers(self, name: str) -> np.ndarray:
        """A column as (n_rows,) float64, every value finite."""
        values = np.empty(self.n_rows)
        for row, field in enumerate(self.text(name)):
            try:
                values[row] = number(field)
            except ValueError:
                hint = "not a number (if it is a category, name the column in data.categorical_columns)"
                raise self.fault(name, row, f"{field!r} is {hint}") from None
            if not math.isfinite(values[row]):
                raise self.fault(name, row, f"{field} is not a finite number")
        return values

    def stripped(self, name: str, fields: Sequence[str]) -> list[str]:
        """The fields of a column without the blanks around them; an empty one is refused."""
        column = [field.strip() for field in fields]
        if "" in column:
            raise self.fault(name, column.index(""), "the field is empty")
        return column

    def unknown(self, name: str) -> UserError:
        """The error for a column that is not there."""
        return UserError(f"{self.path}: {unknown('column', name, self.names)}")


def places(where: object, names: Sequence[str]) -> dict[str, int]:
    """The place of each column. Raises UserError where one is there twice, or there are too many."""
    found: dict[str, int] = {}
    if len(names) > MOST_COLUMNS:
        raise UserError(f"{where}: there are {len(names)} columns; {MOST_COLUMNS} are the most that are read")
    for k, name in enumerate(names):
        if name in found:
            raise UserError(f"{where}: the column {name!r} is there twice")
        found[name] = k
    return found


def number(text: str) -> float:
    """A number as other programs write it: float() alone would take 1_000 and the digits of other scripts."""
    if "_" in text or not text.isascii():
        raise ValueError
    return float(text)


def is_number(text: str) -> bool:
    """Whether `number` takes it."""
    try:
        number(text)
    except ValueError:
        return False
    return True
