"""Tables from csv files of any size.

One pass over the bytes finds where the file can be cut, which is at the ends of rows; a chunk is parsed when it is
asked for. Where pyarrow is installed it parses what is plain; what is not, or is not right, Python's csv module
parses, whose word is final: both give the same values, and only the second says what is wrong, and in which line.
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpu_bp.data.table import Chunk, Table, is_number, places
from gpu_bp.errors import UserError

# The most a chunk has of either; a longer row is a chunk of its own.
CHUNK_BYTES = 2**20
CHUNK_ROWS = 4096
# The most a row has: a file in which none ends would be read whole.
ROW_BYTES = 2**22

BOM = "\N{BYTE ORDER MARK}".encode()
# A quote that starts a field opens a quoted one, to the next single quote. Elsewhere in a field it is a character.
QUOTED = re.compile(rb'(?<![^,\r\n])"[^"]*(?:""[^"]*)*(?:"|\Z)')
# What a quote has beside it, outwards, where all quotes stand around whole fields, or doubled in these.
BESIDE = np.isin(np.arange(256), list(b',\r\n"'))


class Piece(NamedTuple):
    """Where a chunk lies: its bytes from `start` to `end`, its rows, and the lines of the file before it."""

    start: int
    end: int
    n_rows: int
    line: int


class CsvTable(Table):
    """A csv file with a header.

    Raises:
        UserError: the file is missing, empty, or has no rows; the header is not one, or names a column twice; the
            first rows are broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"no file {path}")
        header, *self._pieces = pieces(path)
        self.names = _names(path, parse(path, _read(path, header), header.line)[0])
        if not self._pieces:
            raise UserError(f"{path} has a header and no rows")
        self.starts = np.cumsum([0, *(piece.n_rows for piece in self._pieces)], dtype=np.int64)
        _ = self.chunk(0).rows  # a file that is no table is best told by its first rows

    def chunk(self, k: int) -> CsvChunk:
        """Chunk number k: its bytes; they are parsed when a column is asked for."""
        piece = self._pieces[k]
        return CsvChunk(self.path, self.names, piece.n_rows, _read(self.path, piece), piece.line)


class CsvChunk(Chunk):
    """Rows of a csv file; `line` is how many lines of the file stand before them."""

    def __init__(self, path: Path, names: Mapping[str, int], n_rows: int, data: bytes, line: int) -> None:
        super().__init__(path, names, n_rows)
        self._data = data
        self._line = line

    def text(self, name: str) -> list[str]:
        if name not in self.names:
            raise self.unknown(name)
        k = self.names[name]
        return self.stripped(name, [row[k] for row in self.rows[0]])

    def coded(self, name: str) -> tuple[list[str], np.ndarray]:
        column = self._arrow_column(name)
        if column is None:
            return super().coded(name)
        coded = column.dictionary_encode()
        values = [value.strip() for value in coded.dictionary.to_pylist()]
        return super().coded(name) if "" in values else (values, coded.indices.to_numpy().astype(np.int64))

    def numbers(self, name: str) -> np.ndarray:
        column = self._arrow_column(name)
        if column is not None:
            arrow = _arrow()
            try:
                values = arrow.compute.ascii_trim_whitespace(column).cast(arrow.float64()).to_numpy()
            except arrow.ArrowInvalid:
                return super().numbers(name)
            if np.isfinite(values).all():
                return np.asarray(values)
        return super().numbers(name)

    def fault(self, name: str, row: int, what: str) -> UserError:
        return UserError(f"{self.path}, line {self.rows[1][row]}, column {name}: {what}")

    @functools.cached_property
    def rows(self) -> tuple[list[list[str]], list[int]]:
        """The rows by Python's csv module, and the line in which each ends."""
        rows, lines = parse(self.path, self._data, self._line)
        for row, line in zip(rows, lines, strict=True):
            if len(row) != len(self.names):
                raise UserError(f"{self.path}, line {line}: {len(row)} fields, the header has {len(self.names)}")
        if len(rows) != self.n_rows:
            raise UserError(f"{self.path}, after line {self._line}: the file changed while it was read")
        return rows, lines

    @functools.cached_property
    def _arrow_table(self) -> Any:
        """The rows by pyarrow, every column as text; None without it, or where the csv module must look."""
        arrow, data = _arrow(), self._data
        quotes, plain = _quotes(data)
        # pyarrow is lenient with quotes, and takes a byte order mark before the chunk for one before the file
        # what it makes of each column is more than a short one has
        if arrow is None or len(self.names) > self.n_rows or not plain or len(quotes) % 2 or data.startswith(BOM):
            return None
        names = [str(k) for k in range(len(self.names))]
        try:
            table = arrow.csv.read_csv(
                arrow.BufferReader(data),
                arrow.csv.ReadOptions(column_names=names, block_size=len(data) + 1, use_threads=False),
                arrow.csv.ParseOptions(newlines_in_values=True),
                arrow.csv.ConvertOptions(column_types=dict.fromkeys(names, arrow.string())),
            )
        except (arrow.ArrowException, OverflowError):
            return None
        return table.combine_chunks() if table.num_rows == self.n_rows else None

    def _arrow_column(self, name: str) -> Any:
        if name not in self.names:
            raise self.unknown(name)
        if self._arrow_table is None:
            return None
        column = self._arrow_table[self.names[name]].chunk(0)
        longest = _arrow().compute.max(_arrow().compute.binary_length(column)).as_py()
        return column if longest <= csv.field_size_limit() else None  # the csv module may refuse it


def pieces(path: Path) -> Iterator[Piece]:
    """The file in pieces that can be parsed alone: the header, then the chunks.

    Raises:
        UserError: the file is empty, or has a quote that does not end.
    """
    with path.open("rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(start)
        line, block, header, last = 0, b"", True, False
        while not last:
            wanted = max(CHUNK_BYTES, len(block))  # doubled as long as no row ends
            more = file.read(wanted)
            block, last = block + more, len(more) < wanted
            done = 0
            for part in _parts(_row_ends(path, block, line, last), header):
                header = False
                end = int(part[-1])
                yield Piece(start + done, start + end, len(part), line)
                line += _count_lines(block[done:end])
                done = end
            start, block = start + done, block[done:]
            if len(block) > ROW_BYTES:
                raise _broken(path, line, f"a row is longer than {ROW_BYTES >> 20} MiB")
        if header:
            raise UserError(f"{path} is empty; a header and rows are needed")


def parse(path: Path, data: bytes, line: int) -> tuple[list[list[str]], list[int]]:
    """The rows in a piece of a csv file, blank lines left out, and the line in which each ends.

    `line` is how many lines of the file stand before the piece.

    Raises:
        UserError: not UTF-8, or quotes that do not fit; it says after which line.
    """
    rows: list[list[str]] = []
    lines: list[int] = []
    ended = line
    try:
        reader = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
        for row in reader:
            ended = line + reader.line_num
            if row:
                rows.append(row)
                lines.append(ended)
    except UnicodeDecodeError as error:
        ended = line + _count_lines(data[: error.start])
        raise _broken(path, ended, f"not text in UTF-8 ({error.reason})") from None
    except csv.Error as error:
        raise _broken(path, ended, str(error)) from None
    return rows, lines


def _names(path: Path, rows: list[list[str]]) -> dict[str, int]:
    names = [name.strip() for name in rows[0]]
    if "" in names:
        raise UserError(f"{path}, line 1: column {names.index('') + 1} has no name")
    found = places(f"{path}, line 1", names)
    if len(names) == 1 and ";" in names[0]:
        raise UserError(f"{path}, line 1: there is one column, {names[0]!r}; the separator must be a comma")
    if all(map(is_number, names)):
        raise UserError(f"{path}, line 1: a header with the names of the columns is needed, not numbers")
    return found


def _row_ends(path: Path, block: bytes, line: int, last: bool) -> np.ndarray:
    """Where the rows end, which are the lines outside quotes but blank ones, in a block that starts with a row.

    `last`: the file ends with the block, and so does its last row.
    """
    text = np.frombuffer(block, np.uint8)
    ending = feed = text == ord("\n")
    returned = text == ord("\r")
    if returned.any():  # a line of its own, unless a line feed follows, or may follow
        ending = feed | returned
        ending[:-1] &= ~(returned[:-1] & feed[1:])
        ending[-1] &= feed[-1] or last
    ends = np.flatnonzero(ending) + 1
    quoted = _quoted(block)
    if len(quoted):
        longest = int((quoted[1::2] - quoted[::2]).argmax())
        start, end = quoted[2 * longest : 2 * longest + 2]
        if end - start > 4 * csv.field_size_limit():  # even in characters of four bytes it is longer
            before = line + _count_lines(block[:start])
            raise _broken(path, before, f"field larger than field limit ({csv.field_size_limit()})")
        ends = ends[np.searchsorted(quoted, ends - 1, side="right") % 2 == 0]
    if last and len(block) and (len(ends) == 0 or ends[-1] < len(block)):
        ends = np.append(ends, len(block))
    begins = np.append(0, ends)[:-1]
    blank = feed[begins] | returned[begins]
    return np.asarray(ends[~blank])


def _quoted(block: bytes) -> np.ndarray:
    """Where quoted parts of a block start and end, by turns; the last may end with the block."""
    quotes, plain = _quotes(block)
    if not plain:
        quotes = np.array([match.span() for match in QUOTED.finditer(block)], np.int64).reshape(-1)
    return np.append(quotes, len(block)) if len(quotes) % 2 else quotes


def _quotes(data: bytes) -> tuple[np.ndarray, bool]:
    """Where quotes stand, and whether they open and close by turns and stand around whole fields alone."""
    text = np.frombuffer(b"\n" + data + b"\n", np.uint8)
    quotes = np.flatnonzero(text == ord('"'))
    return quotes - 1, bool(BESIDE[text[quotes[::2] - 1]].all() and BESIDE[text[quotes[1::2] + 1]].all())


def _parts(rows: np.ndarray, header: bool) -> list[np.ndarray]:
    """Ends of rows, as many together as make a chunk; a header is one of its own."""
    groups = [rows[:1], rows[1:]] if header else [rows]
    return [part for rows in groups if len(rows) for part in np.array_split(rows, -(-len(rows) // CHUNK_ROWS))]


def _count_lines(data: bytes) -> int:
    """As Python counts them: a line ends with a line feed, a carriage return or both."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def _broken(path: Path, line: int, what: str) -> UserError:
    return UserError(f"{path}, {f'after line {line}' if line else 'line 1'}: {what}")


def _read(path: Path, piece: Piece) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(piece.start)
            return file.read(piece.end - piece.start)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


@functools.cache
def _arrow() -> Any:
    """pyarrow, or None."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
    except ImportError:
        return None
    return pyarrow
