"""The rows of a table as inputs and targets: `open_table`, then a `TableReader`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpu_bp.data.columns import Column, Columns, Weights
from gpu_bp.data.csv_table import CsvTable
from gpu_bp.data.parquet_table import ParquetTable
from gpu_bp.data.source import Rows
from gpu_bp.data.table import Table

KEPT_CHUNKS = 2  # a range that ends in one chunk and goes on in the next, whichever way it is read


def open_table(path: Path) -> Table:
    """A Parquet file where the name ends in .parquet, else a csv file with a header.

    Raises:
        UserError: a missing or broken file.
    """
    return ParquetTable(path) if path.suffix.lower() == ".parquet" else CsvTable(path)


class TableReader:
    """A `Reader` of the rows of a table, columns encoded by `columns`; several threads may read.

    The last chunks are kept as one number a column (a category's is its index), so that a range that is read part
    by part is parsed once.

    Args:
        targets: False gives inputs alone, from a file that need not have the target columns.
        weight: the column of the rows' weights, where they have some.
    """

    def __init__(self, table: Table, columns: Columns, *, targets: bool = True, weight: str | None = None) -> None:
        self._table = table
        self._inputs = columns.inputs
        self._targets = columns.targets if targets else ()
        self._weights = () if weight is None else (Weights(weight),)
        self.n_rows = table.n_rows
        self.n_inputs = _width(self._inputs)
        self.classes = columns.classes if targets else ()
        self.n_targets = 1 if self.classes else _width(self._targets)
        self.binary = False
        self.weighted = weight is not None
        self.block_rows = int(np.diff(table.starts).max())
        self.where = ", ".join([str(table.path), *(column.name for column in self._targets)])
        self._lock = threading.Lock()
        self._chunk = functools.lru_cache(KEPT_CHUNKS)(self._read_chunk)

    def read(self, first: int, n: int, out: Rows | None = None) -> Rows:
        """The n rows from number `first` on: inputs (n, n_inputs) float64, labels or float64 targets, and weights.

        Raises:
            UserError: a field there is missing or of the wrong kind, a category that the training rows lack, or a
                negative weight.
        """
        inputs = np.empty((n, self.n_inputs))
        labels = np.empty(n, np.int64) if self.classes else None
        targets = np.empty((n, self.n_targets)) if self._targets and not self.classes else None
        weights = np.empty(n) if self._weights else None
        for k, here, there in self._parts(first, n):
            with self._lock:
                values = self._chunk(k)
            values = [column[here] for column in values]
            n_inputs = len(self._inputs)
            _write(self._inputs, values[:n_inputs], inputs[there])
            if labels is not None:
                labels[there] = values[n_inputs]
            elif targets is not None:
                _write(self._targets, values[n_inputs : n_inputs + len(self._targets)], targets[there])
            if weights is not None:
                weights[there] = values[-1]
        return Rows(inputs, targets, labels, weights)

    def _parts(self, first: int, n: int) -> Iterator[tuple[int, slice, slice]]:
        """A range of rows by chunk: its number, which of its rows, and where these stand in the range."""
        row, end = first, first + n
        while row < end:
            k = self._table.chunk_of(row)
            start, stop = int(self._table.starts[k]), min(end, int(self._table.starts[k + 1]))
            yield k, slice(row - start, stop - start), slice(row - first, stop - first)
            row = stop

    def _read_chunk(self, k: int) -> list[np.ndarray]:
        chunk = self._table.chunk(k)
        return [column.read(chunk) for column in (*self._inputs, *self._targets, *self._weights)]


def _width(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns)


def _write(columns: Sequence[Column], values: list[np.ndarray], out: np.ndarray) -> None:
    """Side by side into (rows, width)."""
    k = 0
    for column, read in zip(columns, values, strict=True):
        column.write(read, out[:, k : k + column.width])
        k += column.width
