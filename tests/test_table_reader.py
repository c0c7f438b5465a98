"""The rows of a table as inputs and targets: any range, each chunk parsed once, in bounded memory."""

from __future__ import annotations

import threading
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tables import small_chunks, without_pyarrow

from gpu_bp import load_data, parse_config
from gpu_bp.data.columns import Columns
from gpu_bp.data.csv_table import CsvTable
from gpu_bp.data.preparation import Preparation
from gpu_bp.data.source import Reader
from gpu_bp.data.table import Table
from gpu_bp.data.table_reader import TableReader, open_table
from gpu_bp.data.task import Task


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
def test_memory_is_bounded_by_the_chunk(tmp_path: Path, arrow: bool) -> None:
    """Opening, fitting and reading a file of 3 MB takes a small multiple of a chunk."""
    path, n, size = tmp_path / "t.csv", 120_000, 2**15
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
    # the target column may be missing, numbers or classes
    (tmp_path / "x.csv").write_text("x\n" + "".join(f"{k / 7!r}\n" for k in range(20)))
    for target, dropped in (("y", "kind"), ("kind", "y")):
        columns = Columns.fit(table, 15, targets=[target], dropped=[dropped], categorical=["kind"])
        np.testing.assert_array_equal(Preparation(Task("none"), columns).read(tmp_path / "x.csv"), expected[:, :1])
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
        inputs.append(data.rows("train").inputs)
    np.testing.assert_allclose(inputs[0], inputs[1], rtol=1e-12)
