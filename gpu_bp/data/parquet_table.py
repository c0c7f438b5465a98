"""Tables from Parquet files, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gpu_bp.data.table import Chunk, Table, places
from gpu_bp.errors import UserError

# The most rows of a row group, which is read whole: numbers that are all alike take no room in a file, however many.
GROUP_ROWS = 2**26


class ParquetTable(Table):
    """A Parquet file; its row groups, but empty ones, are the chunks.

    Raises:
        UserError: pyarrow is not installed; the file is missing, not a whole Parquet file, has no rows, or names a
            column twice.
    """

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{path}: a Parquet file needs pyarrow: pip install 'gpu_bp[table]'") from None
        self.path = path
        with readable(path):
            self._file = pyarrow.parquet.ParquetFile(path)
            names, metadata = self._file.schema_arrow.names, self._file.metadata
            rows = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        self.names = places(path, names)
        if not any(rows):
            raise UserError(f"{path} has no rows")
        if not 0 <= min(rows) <= max(rows) <= GROUP_ROWS:
            raise UserError(
                f"{path} has a row group of {max(rows)} rows; {GROUP_ROWS} are the most that are read at once"
            )
        self._groups = np.flatnonzero(rows)
        self.starts = np.cumsum([0, *filter(None, rows)], dtype=np.int64)

    def chunk(self, k: int) -> ParquetChunk:
        """A row group; a column of it is read when it is asked for."""
        first, end = map(int, self.starts[k : k + 2])
        return ParquetChunk(self.path, self.names, end - first, self._file, int(self._groups[k]), first)


class ParquetChunk(Chunk):
    """A row group of a Parquet file; `first` is the number of its first row in the file."""

    def __init__(self, path: Path, names: Mapping[str, int], n_rows: int, file: Any, group: int, first: int) -> None:
        super().__init__(path, names, n_rows)
        self._file = file
        self._group = group
        self._first = first

    def text(self, name: str) -> list[str]:
        with readable(self.path, self._where(name)):
            return self.stripped(name, list(map(str, self._column(name).to_pylist())))

    def coded(self, name: str) -> tuple[list[str], np.ndarray]:
        with readable(self.path, self._where(name)):
            coded = self._column(name).dictionary_encode()
            values = [str(value).strip() for value in coded.dictionary.to_pylist()]
        return super().coded(name) if "" in values else (values, coded.indices.to_numpy().astype(np.int64))

    def numbers(self, name: str) -> np.ndarray:
        import pyarrow

        column = self._column(name)
        if _is_text(column.type):
            return super().numbers(name)
        with readable(self.path, self._where(name)):
            return np.asarray(column.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False))

    def fault(self, name: str, row: int, what: str) -> UserError:
        return UserError(f"{self.path}, row {self._first + row} (counting from 0), column {name}: {what}")

    def _where(self, name: str) -> str:
        return f", rows {self._first} to {self._first + self.n_rows - 1}, column {name}"

    def _column(self, name: str) -> Any:
        """An array of numbers or of text without nulls, the numbers finite."""
        import pyarrow
        import pyarrow.compute

        if name not in self.names:
            raise self.unknown(name)
        kind = self._file.schema_arrow.field(name).type
        plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (_is_text(plain) or _is_number(plain)):
            raise UserError(f"{self.path}, column {name}: numbers or text are needed, not {kind}")
        with readable(self.path, self._where(name)):
            column = self._file.read_row_group(self._group, columns=[name])[name].cast(plain).combine_chunks()
            if len(column) != self.n_rows:
                raise ValueError(f"there are {len(column)} of them")
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise self.fault(name, row, "the value is null")
        if pyarrow.types.is_floating(plain):
            finite = np.isfinite(column.to_numpy(zero_copy_only=False))
            if not finite.all():
                row = int(np.argmin(finite))
                raise self.fault(name, row, f"{column[row].as_py()} is not a finite number")
        return column


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_number(kind: Any) -> bool:
    from pyarrow import types

    return any(check(kind) for check in (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal))


@contextmanager
def readable(path: Path, where: str = "") -> Iterator[None]:
    """Whatever pyarrow makes within it of a file that is broken becomes a UserError; `where` is the place in it."""
    import pyarrow

    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        yield
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        what = str(error).partition("\n")[0]
        fault = "" if where else " is not a Parquet file, or not a whole one"
        raise UserError(f"{path}{where}{fault}: {what}") from None
