"""Tables from Parquet files: columns of every kind, what is refused and where it says the fault is."""

from __future__ import annotations

import decimal
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpu_bp import UserError
from gpu_bp.data.columns import Columns, Numeric
from gpu_bp.data.table_reader import TableReader, open_table


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
        (pa.array(["1", "x"]).dictionary_encode(), "row 1 (counting from 0), column x: 'x' is not a number"),
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
