"""Tables larger than memory: where csv files are cut, both parsers, broken files, and statistics."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_bp import UserError
from gpu_bp.data import csv_table
from gpu_bp.data.columns import Categorical, Columns, Numeric
from gpu_bp.data.csv_table import CsvTable
from gpu_bp.data.table import Table
from gpu_bp.data.table_reader import TableReader

FIELDS = st.text(st.sampled_from("a1,;\"'\n\r é\x1c\u2028\ufeff\0"), max_size=6)
NUMBERS = st.text(st.sampled_from("0123456789+-.eE_ nainfx\t\u00a0٣"), min_size=1, max_size=9)


@contextmanager
def small_chunks(size: int, rows: int = 4096) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_table, "CHUNK_BYTES", size)
        patch.setattr(csv_table, "CHUNK_ROWS", rows)
        yield


@contextmanager
def without_pyarrow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_table, "_arrow", lambda: None)
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv file that each example writes anew."""
    return tmp_path_factory.mktemp("tables") / "t.csv"


def parsed_whole(data: bytes) -> list[list[str]]:
    """The rows of a csv file as Python's csv module gives them, all at once."""
    return [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True) if row]


def outcome(table: Table, what: str) -> Any:
    """All of column b, chunk by chunk: text, values by code, or the bits of numbers; or the error."""
    try:
        found: list[Any] = []
        for k in range(len(table.starts) - 1):
            chunk = table.chunk(k)
            if what == "coded":
                values, codes = chunk.coded("b")
                found += [values[code] for code in codes]
            else:
                found += chunk.text("b") if what == "text" else chunk.numbers("b").view(np.int64).tolist()
        return found
    except UserError as error:
        return str(error)


# where a csv file is cut ---------------------------------------------------------------------------------------


@st.composite
def csv_files(draw: st.DrawFn) -> bytes:
    """A csv file as Python's csv module writes it, with blank lines in between, and maybe a byte order mark."""
    text = io.StringIO(newline="")
    ending = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    quoting: Literal[0, 1] = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    lone = "" if quoting == csv.QUOTE_ALL or ending == "\r\n" else "\n\r".replace(ending, "")  # is not quoted
    writer = csv.writer(text, lineterminator=ending, quoting=quoting)
    text.write(ending * draw(st.integers(0, 2)))
    writer.writerow(["a", "b"])
    for row in draw(st.lists(st.tuples(FIELDS, FIELDS.map("{}v".format)), min_size=1, max_size=12)):
        text.write(ending * draw(st.integers(0, 2)))
        writer.writerow([field.replace(lone, "") for field in row] if lone else row)
    whole = text.getvalue()
    if draw(st.booleans()):
        whole = whole.removesuffix(ending)
    return (csv_table.BOM if draw(st.booleans()) else b"") + whole.encode()


@given(csv_files(), st.integers(1, 40), st.integers(1, 5))
def test_chunks_are_the_whole(path: Path, data: bytes, size: int, rows: int) -> None:
    """Whatever the size of a chunk, no cut is inside quotes, and rows and lines are counted right."""
    path.write_bytes(data)
    header, *expected = parsed_whole(data)
    with small_chunks(size, rows):
        pieces = list(csv_table.pieces(path))
        whole = [csv_table.parse(path, data[piece.start : piece.end], piece.line) for piece in pieces]
    assert [row for rows, _ in whole for row in rows] == [header, *expected]
    assert [len(rows) for rows, _ in whole] == [piece.n_rows for piece in pieces]
    assert all(piece.n_rows <= rows for piece in pieces[1:])
    assert [line for _, lines in whole for line in lines] == csv_table.parse(path, data.removeprefix(csv_table.BOM), 0)[
        1
    ]


@given(st.lists(st.sampled_from([b'"', b'""', b"a", b",", b"\n", b"\r\n", b"\r", b'5" x']), max_size=25))
def test_any_quotes(path: Path, parts: list[bytes]) -> None:
    """Quotes anywhere, also where they mean nothing: as Python's csv module takes them, or refuses them."""
    data = b"a,b\n1,2\n" + b"".join(parts)
    path.write_bytes(data)

    def rows(size: int) -> Any:
        with small_chunks(size):
            return [row for piece in csv_table.pieces(path) for row in csv_table.parse(path, *_read(piece))[0]]

    def _read(piece: csv_table.Piece) -> tuple[bytes, int]:
        return data[piece.start : piece.end], piece.line

    try:
        expected = parsed_whole(data)
    except csv.Error as error:
        for size in (1, 3, 2**20):
            with pytest.raises(UserError, match=str(error)):
                rows(size)
        return
    assert rows(1) == rows(3) == rows(2**20) == expected


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_a_row_longer_than_a_chunk(path: Path, ending: bytes) -> None:
    path.write_bytes(ending.join([b"a,b", b"x" * 500 + b",1", b"y,2", b'"' + b"\n" * 500 + b'z",3', b""]))
    with small_chunks(16):
        table = CsvTable(path)
    assert outcome(table, "coded") == ["1", "2", "3"]
    assert table.n_rows == 3


def test_a_quote_that_never_ends_is_found_soon(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stray quote does not make the rest of a large file one field."""
    path.write_bytes(b'a,b\n1,2\n3,"4\n' + b"5,6\n" * 10_000)
    default = csv.field_size_limit(100)
    try:
        with small_chunks(64), pytest.raises(UserError, match=r"t.csv, after line 2: field larger than .* \(100\)"):
            CsvTable(path)
    finally:
        csv.field_size_limit(default)


# the two parsers -----------------------------------------------------------------------------------------------


@given(csv_files(), st.integers(1, 60))
def test_both_parsers_give_the_same_text(path: Path, data: bytes, size: int) -> None:
    path.write_bytes(data)
    with small_chunks(size):
        table = CsvTable(path)
    quick = outcome(table, "coded")
    with without_pyarrow():
        assert outcome(table, "coded") == quick
        assert outcome(table, "text") == quick


@given(
    st.lists(NUMBERS | st.floats(allow_nan=False, allow_infinity=False).map(repr), min_size=1, max_size=6),
    st.sampled_from(["", " ", "\t"]),
)
def test_both_parsers_give_the_same_bits(path: Path, fields: list[str], blank: str) -> None:
    path.write_text("a,b\n" + "".join(f'x,"{blank}{field}"\n' for field in fields))
    table = CsvTable(path)
    quick = outcome(table, "numbers")
    with without_pyarrow():
        assert outcome(table, "numbers") == quick


def test_what_is_plain_goes_through_pyarrow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text('a,b\n x , 1.5\r\n\r\n"y\nz",-2e-3\n')
    table = CsvTable(path)
    monkeypatch.setattr(csv_table, "parse", None)
    assert table.chunk(0).numbers("b").tolist() == [1.5, -2e-3]
    values, codes = table.chunk(0).coded("a")
    assert [values[code] for code in codes] == ["x", "y\nz"]


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert csv_table._arrow.__wrapped__() is None


def test_a_byte_order_mark_before_a_chunk(path: Path) -> None:
    """Within a file it is text, for both parsers."""
    path.write_text("a,b\nx,1\n\ufeffx,2\n")
    with small_chunks(1):
        assert [CsvTable(path).chunk(k).coded("a")[0] for k in range(2)] == [["x"], ["\ufeffx"]]


def test_a_field_too_large_for_one_parser_is_for_both(path: Path) -> None:
    path.write_text("a,b\n" + "1,2\n" * 4096 + "x" * 131073 + ",2\n")
    table = CsvTable(path)
    assert table.chunk(0).numbers("b").max() == 2
    for read in (table.chunk(1).coded, table.chunk(1).numbers):
        with pytest.raises(UserError, match="t.csv, after line 4097: field larger than field limit"):
            read("a")


# broken csv files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrow", [True, False])
@pytest.mark.parametrize("row", [0, 3, 1000, 1999])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"1", "line {line}: 1 fields, the header has 2"),
        (b"1,2,3", "line {line}: 3 fields, the header has 2"),
        (b",2", "line {line}, column a: the field is empty"),
        (b"1,  ", "line {line}, column b: the field is empty"),
        (b"1,x", "line {line}, column b: 'x' is not a number (if it is a category"),
        (b"1_0,2", "line {line}, column a: '1_0' is not a number"),
        (b"1,nan", "line {line}, column b: nan is not a finite number"),
        (b'"1"2,2', "after line {before}: ',' expected after '\"'"),
        (b"1,\xff2", "after line {before}: not text in UTF-8 (invalid start byte)"),
        (b'1,"2', "after line {before}: unexpected end of data"),
    ],
)
def test_broken_rows(path: Path, row: int, broken: bytes, message: str, arrow: bool) -> None:
    """In the first chunk or a later one, the line is right; each good row here takes two lines, one of them blank."""
    rows = [b"%d,%d\n\n" % (k, k) for k in range(2000)]
    rows[row] = broken + b"\n\n"
    if broken.endswith(b'"2'):
        del rows[row + 1 :]
    path.write_bytes(b"a,b\n" + b"".join(rows))
    line = 2 + 2 * row

    def read() -> None:
        table = CsvTable(path)
        TableReader(table, Columns((Numeric("a"), Numeric("b")), ())).read(0, table.n_rows)

    with small_chunks(512), nullcontext() if arrow else without_pyarrow(), pytest.raises(UserError) as caught:
        read()
    # the csv module's last good row ends in the line before a blank one, which it has read too
    assert str(caught.value).startswith(f"{path}, {message.format(line=line, before=line - 1)}")


def test_a_file_that_changes_while_it_is_read(path: Path) -> None:
    path.write_text("a,b\n" + "1,2\n" * 10)
    table = CsvTable(path)
    path.write_text("a,b\n" + "1,2\n" * 5)
    with pytest.raises(UserError, match="the file changed while it was read"):
        table.chunk(0).numbers("a")
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        table.chunk(0)


# statistics and categories -------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=2, max_size=60),
    st.sampled_from([0.0, 1e6, -1e12]),
    st.integers(1, 20),
    st.data(),
)
def test_statistics(path: Path, values: list[float], offset: float, rows: int, data: st.DataObject) -> None:
    """Those of the training rows as one column, however far from zero and whatever the chunks."""
    column = np.array(values) + offset
    n_train = data.draw(st.integers(1, len(values)))
    path.write_text("a,b\n" + "".join(f"{value!r},{value!r}\n" for value in column.tolist()))
    with small_chunks(2**20, rows):
        fitted = Columns.fit(CsvTable(path), n_train, targets=["b"]).inputs[0]
    assert isinstance(fitted, Numeric)
    train = column[:n_train]
    if train.min() == train.max():
        assert (fitted.mean, fitted.sd) == (train[0], 1)
    else:
        exact = train - train[0]  # NumPy's own would cancel
        assert fitted.mean == pytest.approx(train[0] + exact.mean(), rel=1e-13, abs=1e-11)
        assert fitted.sd == pytest.approx(exact.std(), rel=1e-9)


def test_numbers_too_large_to_standardise(path: Path) -> None:
    """The largest of all training rows is named, in whichever chunk it is."""
    path.write_text("a,b\n" + "".join(f"{1e300 if k == 7 else k},{k}\n" for k in range(40)))
    with small_chunks(2**20, 5), pytest.raises(UserError, match="line 9, column a: the number is too large to stand"):
        Columns.fit(CsvTable(path), 40, targets=["b"])
    with small_chunks(2**20, 5):
        assert Columns.fit(CsvTable(path), 7, targets=["b"]).inputs == (Numeric("a", 3, 2),)


def test_categories_of_the_training_rows(path: Path) -> None:
    """Of these alone, from every chunk; another one later is refused with its line."""
    path.write_text("a,b\n" + "".join(f"{k % 700},{k}\n" for k in range(1400)) + "x,1\n")
    with small_chunks(64):
        table = CsvTable(path)
        columns = Columns.fit(table, 650, targets=["b"], categorical=["a"])
    assert columns.inputs == (Categorical("a", tuple(map(str, range(650)))),)
    reader = TableReader(table, columns)
    np.testing.assert_array_equal(reader.read(10, 5).inputs, np.eye(650)[10:15])
    with pytest.raises(UserError, match=r"line 652, column a: '650' does not occur in the training rows \(0, 1, 2,"):
        reader.read(600, 100)
    with small_chunks(64):
        whole = Columns.fit(table, 1401, targets=["b"], categorical=["a"]).inputs[0]
    assert isinstance(whole, Categorical)
    assert whole.categories == tuple(sorted({*map(str, range(700)), "x"}))
