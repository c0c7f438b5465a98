"""Tables larger than memory: where csv files are cut, both parsers, Parquet, statistics, and the rows of a reader."""

from __future__ import annotations

import csv
import decimal
import io
import math
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_bp import UserError, load_data, parse_config
from gpu_bp.data import csv_table, parquet_table
from gpu_bp.data.columns import Categorical, Columns, Numeric
from gpu_bp.data.csv_table import CsvTable
from gpu_bp.data.preparation import Preparation
from gpu_bp.data.source import Reader
from gpu_bp.data.table import Table
from gpu_bp.data.table_reader import TableReader, open_table
from gpu_bp.data.task import Task

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


# Parquet -------------------------------------------------------------------------------------------------------


def parquet(folder: Path, columns: dict[str, Any], size: int = 3) -> Path:
    """A Parquet file with `size` rows a row group."""
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=size)
    return folder / "t.parquet"


@pytest.mark.parametrize(
    "values",
    [
        pa.array([3, 1, 2, 2**53 + 1, -5], pa.int64()),
        pa.array([3, 1, 2, 2**64 - 1, 0], pa.uint64()),
        pa.array([0.1, -0.0, 1e300, 5e-324, 2.5]),
        pa.array([0.1, 1e-7, 3, 4, 5], pa.float32()),
        pa.array(np.array([0.5, 1, 2, 3, 4], np.float16)),
        pa.array([True, False, True, True, False]),
        pa.array([decimal.Decimal("1.25"), *map(decimal.Decimal, range(4))]),
        pa.array([" 1.5", "2", "3e2", "1", "2"]),
        pa.array(["1", "2", "2", "1", "2"]).dictionary_encode(),
        pa.array(["1", "2", "2", "1", "2"], pa.large_string()),
    ],
    ids=lambda values: str(values.type),
)
def test_parquet_columns(tmp_path: Path, values: pa.Array) -> None:
    """Numbers as numbers and as categories, in Python's way of writing them; text as both."""
    table = open_table(parquet(tmp_path, {"x.y": values, "i": range(5)}))
    chunks = [table.chunk(k) for k in range(2)]
    numbers = np.concatenate([chunk.numbers("x.y") for chunk in chunks])
    assert numbers.dtype == np.float64
    assert numbers.tolist() == [float(value) for value in values.to_pylist()]
    text = [str(value).strip() for value in values.to_pylist()]
    assert [field for chunk in chunks for field in chunk.text("x.y")] == text
    coded = [chunk.coded("x.y") for chunk in chunks]
    assert [values[code] for values, codes in coded for code in codes] == text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([1, 2, 3, None, 5]), "row 3 (counting from 0), column x: the value is null"),
        (pa.array(["1", "2", "3", "4", None]), "row 4 (counting from 0), column x: the value is null"),
        (pa.array(["a", "b", None]).dictionary_encode(), "row 2 (counting from 0), column x: the value is null"),
        (pa.array([1, 2, 3, 4, math.nan]), "row 4 (counting from 0), column x: nan is not a finite number"),
        (pa.array([1, -math.inf, 3]), "row 1 (counting from 0), column x: -inf is not a finite number"),
        (pa.array(["1", "2", "3", "four"]), "row 3 (counting from 0), column x: 'four' is not a number"),
        (pa.array(["1", "2", "3", " "]), "row 3 (counting from 0), column x: the field is empty"),
        (pa.array([[1, 2], [3]]), "column x: numbers or text are needed, not list<"),
        (pa.array([{"a": 1}]), "column x: numbers or text are needed, not struct<"),
        (pa.array([1], pa.timestamp("s")), "column x: numbers or text are needed, not timestamp"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value.type),
)
def test_parquet_that_is_refused(tmp_path: Path, values: pa.Array, message: str) -> None:
    table = open_table(parquet(tmp_path, {"y": range(len(values)), "x": values}))
    with pytest.raises(UserError) as caught:
        TableReader(table, Columns((Numeric("y"), Numeric("x")), ())).read(0, table.n_rows)
    assert str(caught.value).startswith(f"{tmp_path / 't.parquet'}, {message}")
    assert "\n" not in str(caught.value)
    if "number" not in message:  # a fault of a category too
        with pytest.raises(UserError, match="column x: "):
            Columns.fit(table, table.n_rows, targets=["y"], categorical=["x"])
    TableReader(table, Columns((Numeric("y"),), ())).read(0, table.n_rows)  # what is not used may be anything


def test_files_that_are_not_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path, {"x": np.arange(1000.0), "y": np.arange(1000.0)}, 100)
    whole = path.read_bytes()
    for broken in (b"", b"a,b\n1,2\n", whole[:-20], whole[:100]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"^[^\n]*t.parquet is not a Parquet file, or not a whole one: [^\n]*$"):
            open_table(path)
    path.write_bytes(whole[:4] + bytes(200) + whole[204:])
    with pytest.raises(UserError, match=r"^[^\n]*t.parquet, rows 0 to 99, column x: [^\n]*$"):
        open_table(path).chunk(0).numbers("x")
    with pytest.raises(UserError, match="unknown column 'z'"):
        open_table(path).chunk(0).numbers("z")
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["x", "x"]), path)
    with pytest.raises(UserError, match="t.parquet: the column 'x' is there twice"):
        open_table(path)
    pq.write_table(pa.table({"x": pa.array([], pa.int64())}), path)
    with pytest.raises(UserError, match="t.parquet has no rows"):
        open_table(path)
    path.unlink()
    with pytest.raises(UserError, match="no file .*t.parquet"):
        open_table(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'gpu_bp\[table\]'"):
        open_table(path)


def test_empty_row_groups(tmp_path: Path) -> None:
    empty, full = pa.table({"x": pa.array([], pa.int64())}), pa.table({"x": [1, 2]})
    with pq.ParquetWriter(tmp_path / "T.PARQUET", full.schema) as writer:
        for part in (empty, full, empty, full, empty):
            writer.write_table(part)
    table = open_table(tmp_path / "T.PARQUET")
    assert table.starts.tolist() == [0, 2, 4]
    assert TableReader(table, Columns((Numeric("x"),), ())).read(1, 2).inputs.tolist() == [[2], [1]]


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


# the reader ----------------------------------------------------------------------------------------------------


def write_table(path: Path, n: int) -> None:
    """n rows: a number, a category of three, and a target; as csv or Parquet."""
    columns = {"x": [k / 7 for k in range(n)], "kind": [f"k{k % 3}" for k in range(n)], "y": [k * k for k in range(n)]}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=7)
    else:
        rows = "".join(f"{x!r},{kind},{y}\n" for x, kind, y in zip(*columns.values(), strict=True))
        path.write_text("x,kind,y\n" + rows)


@pytest.fixture(scope="module", params=[".csv", ".parquet"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """A table of 40 rows in chunks of at most 7."""
    path = tmp_path_factory.mktemp("reader") / f"t{request.param}"
    write_table(path, 40)
    with small_chunks(100, 7):
        return open_table(path)


@given(first=st.integers(0, 40), n=st.integers(0, 40))
def test_a_reader_reads_any_rows(table: Table, first: int, n: int) -> None:
    columns = Columns.fit(table, 30, targets=["y"], categorical=["kind"])
    reader: Reader = TableReader(table, columns)
    n = min(n, 40 - first)
    assert (reader.n_rows, reader.n_inputs, reader.n_targets, reader.classes) == (40, 4, 1, ())
    assert reader.block_rows == np.diff(table.starts).max() <= 7
    assert reader.where == f"{table.path}, y"
    k = np.arange(first, first + n)
    rows = reader.read(first, n)
    assert rows.targets is not None
    assert rows.labels is None
    assert rows.inputs.dtype == rows.targets.dtype == np.float64
    train = np.arange(30)
    inputs = np.column_stack([(k / 7 - (train / 7).mean()) / (train / 7).std(), np.eye(3)[k % 3]])
    np.testing.assert_allclose(rows.inputs, inputs, rtol=1e-12, atol=1e-15)
    squares = train.astype(float) ** 2
    np.testing.assert_allclose(rows.targets[:, 0], (k**2 - squares.mean()) / squares.std(), rtol=1e-12, atol=1e-15)
    labels = TableReader(table, Columns.fit(table, 30, targets=["kind"], categorical=["kind"]))
    assert (labels.classes, labels.n_targets) == (("k0", "k1", "k2"), 1)
    rows = labels.read(first, n)
    assert rows.targets is None
    np.testing.assert_array_equal(rows.labels, k % 3)


def test_a_chunk_is_parsed_once(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in parts that fit no chunk, by several threads at once."""
    columns = Columns.fit(table, 40, targets=["y"], categorical=["kind"])
    asked: list[int] = []
    chunk = table.chunk
    monkeypatch.setattr(table, "chunk", lambda k: asked.append(k) or chunk(k))  # type: ignore[func-returns-value]
    reader = TableReader(table, columns)
    whole = TableReader(table, columns).read(0, 40).inputs
    asked.clear()
    failed: list[int] = []

    def read(first: int) -> None:
        if not np.array_equal(reader.read(first, 3).inputs, whole[first : first + 3]):
            failed.append(first)

    for first in range(0, 37, 2):
        threads = [threading.Thread(target=read, args=(first,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert asked == list(range(len(table.starts) - 1))


@pytest.mark.parametrize("arrow", [True, False])
def test_memory_is_bounded_by_the_chunk(path: Path, arrow: bool) -> None:
    """Opening, fitting and reading a file of 3 MB takes a small multiple of a chunk."""
    n, size = 120_000, 2**15
    path.write_text("x,kind,y\n" + "".join(f"{k / 7!r},k{k % 3},{k}\n" for k in range(n)))
    assert path.stat().st_size > 3e6
    CsvTable(path).chunk(0).numbers("x")  # so that pyarrow is imported
    with small_chunks(size), nullcontext() if arrow else without_pyarrow():
        tracemalloc.start()
        table = open_table(path)
        reader = TableReader(table, Columns.fit(table, n, targets=["y"], categorical=["kind"]))
        for first in range(0, n, 1000):
            reader.read(first, 1000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 40 * size


def test_predict_takes_either_kind(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", 20)
    write_table(tmp_path / "t.parquet", 20)
    table = open_table(tmp_path / "t.csv")
    fitted = Preparation(Task("none"), Columns.fit(table, 15, targets=["y"], categorical=["kind"]))
    expected = fitted.read(tmp_path / "t.csv")
    assert expected.shape == (20, 4)
    np.testing.assert_array_equal(fitted.read(tmp_path / "t.parquet"), expected)
    arrays = Preparation(Task("none"), None, (1.0, 2.0), (3.0, 4.0))
    pq.write_table(pa.table({"x2": [6.0, 2.0], "x1": [1.0, 4.0]}), tmp_path / "x.parquet")
    assert arrays.read(tmp_path / "x.parquet").tolist() == [[0, 1], [1, 0]]


def test_training_data_in_parquet(tmp_path: Path, tiny_config: Any) -> None:
    """The same dataset as from csv."""
    inputs = []
    for kind in (".csv", ".parquet"):
        write_table(tmp_path / f"t{kind}", 20)
        section = {"kind": "table", "path": str(tmp_path / f"t{kind}"), "target_columns": ["y"], "test_rows": 5}
        data = load_data(parse_config({**tiny_config(), "data": {**section, "categorical_columns": ["kind"]}}))
        inputs.append(data.splits["train"].inputs)
    np.testing.assert_allclose(inputs[0], inputs[1], rtol=1e-12)
    assert parquet_table.ParquetTable(tmp_path / "t.parquet").n_rows == 20
