"""Data: synthetic sets, arrays and tables; how targets are coded; what is refused, and where it says the fault is."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_bp import Batch, Batches, Config, Dataset, ResidentSource, Source, UserError, load_data, parse_config
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.data.arrays import ArrayReader, NpyFile
from gpu_bp.data.order import Order
from gpu_bp.data.preparation import Preparation, fit_scaling
from gpu_bp.data.task import Task

Tiny = Callable[..., dict[str, Any]]
TABLE = """id,colour,size,weight,price
1,red,1.0,10,100
2,blue,2.0,10,200
3,red,3.0,10,300
4,green,4.0,10,400
5,blue,5.0,10,500
6,red,6.0,10,600
"""


def load_all(config: Config, preparation: Preparation | None = None) -> Dataset:
    """The data of a config, every row read once: files are looked at where rows are asked for."""
    dataset = load_data(config, preparation)
    for name in dataset.sources:
        dataset.rows(name)
    return dataset


def load_table(
    tiny_config: Tiny, path: Path, text: str | bytes = TABLE, loss: str = "squared_error", **data: Any
) -> Dataset:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    section = {"kind": "table", "path": str(path), "target_columns": ["price"], "drop_columns": ["id"]}
    section |= {"categorical_columns": ["colour"], **data}
    config = tiny_config(loss={"kind": loss})
    return load_all(parse_config({**config, "data": section}))


# synthetic ---------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_rows(tiny_config: Tiny) -> None:
    dataset = load_all(parse_config(tiny_config()))
    assert {name: source.n_rows for name, source in dataset.sources.items()} == {
        "train": 50,
        "validation": 20,
        "test": 30,
    }
    every = np.concatenate([dataset.rows(name).inputs for name in dataset.sources])
    assert len(np.unique(every, axis=0)) == 100
    train = dataset.rows("train").inputs
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.abs(train).max(axis=0), 1)


@pytest.mark.parametrize(
    ("kind", "loss", "decision", "targets"),
    [
        ("double-moon", "squared_error", "sign", [[1], [-1]]),
        ("double-moon", "binary_cross_entropy", "half", [[1], [0]]),
        ("double-moon", "cross_entropy", "argmax", [1, 0]),
        ("double-moon", "squared_hinge", "sign", [[1], [-1]]),
        ("xor", "squared_error", "half", [[0], [1]]),
        ("xor", "binary_cross_entropy", "half", [[0], [1]]),
        ("encoder", "cross_entropy", "argmax", [[1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]),
        ("linear", "squared_error", "none", None),
    ],
)
def test_targets_are_coded_for_the_loss(
    tiny_config: Tiny, kind: str, loss: str, decision: str, targets: list[Any] | None
) -> None:
    dataset = load_all(parse_config({**tiny_config(loss={"kind": loss}), "data": {"kind": kind}}))
    assert dataset.task.decision == decision
    if targets is not None:
        np.testing.assert_array_equal(dataset.rows("train").targets[:2], targets)


# tasks and metrics -------------------------------------------------------------------------------------------


def test_decisions() -> None:
    sign = Task("sign").wrong(np.array([[0.1], [-0.1], [0.0]]), np.array([[1.0], [1.0], [1.0]]))
    assert sign.tolist() == [False, True, True]
    half = Task("half").wrong(np.array([[0.4, 0.9], [0.5, 0.9], [np.nan, 1]]), np.array([[0, 1.0]] * 3))
    assert half.tolist() == [False, True, True]
    argmax = Task("argmax").wrong(np.array([[0.2, 0.8], [0.8, 0.2]]), np.array([1, 1]))
    assert argmax.tolist() == [False, True]
    assert Task("argmax", ("a", "b")).decide(np.array([[0.2, 0.8]])).tolist() == ["b"]


@pytest.mark.parametrize("loss", ["quantile", "gaussian_nll"])
def test_classes_are_no_numbers(tiny_config: Tiny, loss: str) -> None:
    with pytest.raises(UserError, match=f"{loss} takes numbers, the targets are 2 classes; use loss cross_entropy"):
        load_data(parse_config(tiny_config(loss={"kind": loss})))


# order and batches -------------------------------------------------------------------------------------------


class Numbers(Source):
    """Row i is (2 i, 2 i + 1), and its target 20 i."""

    def __init__(self, n_rows: int) -> None:
        super().__init__(n_rows, 2, 1, Task("none"))

    def fill(self, rows: Any, batch: Batch) -> None:
        batch.inputs[:] = 2 * rows[:, None] + [0, 1]
        batch.targets[:] = 20 * rows[:, None]


def rows_of(sampling: Any, seed: int, epoch: int, n_rows: int, size: int) -> list[int]:
    length = -(-n_rows // size) * size if sampling == "replacement" else n_rows
    order: list[int] = Order(NumpyBackend(), sampling, seed, n_rows, length, size).rows(epoch, 0, length).tolist()
    return order


@pytest.mark.parametrize("sampling", ["shuffled", "ordered", "replacement"])
@pytest.mark.parametrize(("rows", "size"), [(10, 3), (12, 4), (5, 5), (5, 50), (1, 1)])
def test_batches(backend: Backend, sampling: Any, rows: int, size: int) -> None:
    """Every row once (or drawn), inputs and targets of the same row, the last batch shorter."""
    inputs = np.arange(rows * 2.0).reshape(rows, 2)
    source = ResidentSource(backend, Numbers(rows), "float32")
    batches = Batches(backend, source, size, sampling, seed=4)
    seen = []
    for batch in batches.epoch(1):
        numbers = backend.to_host(batch.rows)
        np.testing.assert_array_equal(backend.to_host(batch.inputs), inputs[numbers])
        np.testing.assert_array_equal(backend.to_host(batch.targets)[:, 0], inputs[numbers, 0] * 10)
        seen.append(numbers)
    assert len(seen) == batches.per_epoch == -(-rows // min(size, rows))
    everything = np.concatenate(seen)
    if sampling == "replacement":
        assert {len(numbers) for numbers in seen} == {min(size, rows)}
        assert ((everything >= 0) & (everything < rows)).all()
    else:
        np.testing.assert_array_equal(np.sort(everything), np.arange(rows))


@pytest.mark.parametrize("sampling", ["shuffled", "replacement"])
def test_every_epoch_has_an_order_of_its_own(sampling: Any) -> None:
    epochs = [rows_of(sampling, 0, epoch, 50, 8) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert rows_of(sampling, 1, 0, 50, 8) != epochs[0]
    assert rows_of(sampling, 0, 0, 50, 8) == epochs[0]


def test_replacement_draws_all_rows_alike() -> None:
    order = Order(NumpyBackend(), "replacement", 0, 10, 12, 3)
    counts = np.bincount(np.concatenate([order.rows(epoch, 0, 12).copy() for epoch in range(1000)]), minlength=10)
    assert np.abs(counts / counts.mean() - 1).max() < 0.1


# tables ------------------------------------------------------------------------------------------------------


def test_table(tiny_config: Tiny, tmp_path: Path) -> None:
    """Statistics and categories come from the training rows alone, here the first four."""
    dataset = load_table(tiny_config, tmp_path / "t.csv", validation_rows=1, test_rows=1)
    train, test = dataset.rows("train"), dataset.rows("test")
    sd = np.std([1, 2, 3, 4])
    sizes = (np.array([1, 2, 3, 4]) - 2.5) / sd
    # blue, green, red, then size; weight is constant and so 0
    np.testing.assert_allclose(train.inputs[:, :3], [[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]])
    np.testing.assert_allclose(train.inputs[:, 3], sizes)
    np.testing.assert_allclose(train.inputs[:, 4], 0)
    np.testing.assert_allclose(train.targets[:, 0], sizes)
    np.testing.assert_allclose(test.inputs[0, 3], (6 - 2.5) / sd)
    np.testing.assert_allclose(dataset.preparation.raw_outputs(test.targets), [[600]])
    np.testing.assert_allclose(dataset.preparation.raw_inputs(train.inputs)[1:3], [[1, 0, 0, 2, 10], [0, 0, 1, 3, 10]])
    assert Preparation.from_json(dataset.preparation.to_json()) == dataset.preparation


@pytest.mark.parametrize("constant", ["0.1", "0.7", "1e-9", "123456.789"])
def test_constant_columns_stay_zero(tiny_config: Tiny, tmp_path: Path, constant: str) -> None:
    """Their computed standard deviation may be a rounding error, which must not blow up the rows that differ."""
    text = "k,x,price\n" + "".join(f"{constant},{k},{k}\n" for k in range(99)) + f"{float(constant) * 2},1,2\n"
    dataset = load_table(tiny_config, tmp_path / "t.csv", text, drop_columns=[], categorical_columns=[], test_rows=1)
    np.testing.assert_array_equal(dataset.rows("train").inputs[:, 0], 0)
    np.testing.assert_allclose(dataset.rows("test").inputs[0, 0], float(constant), rtol=1e-12)
    np.save(tmp_path / "x.npy", np.full((7, 1), float(constant)))
    x = NpyFile(tmp_path / "x.npy", "x")
    for scaling in ("standardise", "max-abs"):
        assert fit_scaling(ArrayReader(x, x), 7, scaling) == ((float(constant),), (1.0,))


def test_a_categorical_and_a_numeric_target(tiny_config: Tiny, tmp_path: Path) -> None:
    """Each output has its own name and unit."""
    dataset = load_table(tiny_config, tmp_path / "t.csv", target_columns=["colour", "price"])
    assert dataset.preparation.output_names(4) == ["colour=blue", "colour=green", "colour=red", "price"]
    raw = dataset.preparation.raw_outputs(dataset.rows("train").targets)
    np.testing.assert_allclose(raw[:2], [[0, 0, 1, 100], [1, 0, 0, 200]])


def test_data_of_a_given_preparation(tiny_config: Tiny, tmp_path: Path) -> None:
    """A model's own preparation is used as it is, whatever the file now holds and in which order."""
    dataset = load_table(tiny_config, tmp_path / "t.csv")
    section = {"kind": "table", "path": str(tmp_path / "t.csv"), "target_columns": ["price"]}
    config = parse_config({**tiny_config(), "data": section})
    lines = [line.split(",") for line in TABLE.split()]
    (tmp_path / "t.csv").write_text("\n".join(",".join(reversed(line)) for line in lines[:4]) + "\n")
    again = load_all(config, dataset.preparation)
    np.testing.assert_array_equal(again.rows("train").inputs, dataset.rows("train").inputs[:3])
    (tmp_path / "t.csv").write_text("price,size\n1,2\n")
    with pytest.raises(UserError, match="unknown column 'colour'"):
        load_all(config, dataset.preparation)


def test_standardise_columns(tiny_config: Tiny, tmp_path: Path) -> None:
    dataset = load_table(tiny_config, tmp_path / "t.csv", standardise_columns=["size"])
    np.testing.assert_array_equal(dataset.rows("train").targets[:, 0], [100, 200, 300, 400, 500, 600])
    np.testing.assert_array_equal(dataset.rows("train").inputs[:, 4], 10)


def test_table_of_classes(tiny_config: Tiny, tmp_path: Path) -> None:
    data = {"target_columns": ["colour"], "drop_columns": ["id"], "categorical_columns": ["colour"]}
    dataset = load_table(tiny_config, tmp_path / "t.csv", loss="cross_entropy", **data)
    assert dataset.task == Task("argmax", ("blue", "green", "red"))
    assert dataset.n_targets == 3
    np.testing.assert_array_equal(dataset.rows("train").targets, [2, 0, 2, 1, 0, 2])
    one_hot = load_table(tiny_config, tmp_path / "t.csv", **data)
    np.testing.assert_array_equal(one_hot.rows("train").targets, np.eye(3)[[2, 0, 2, 1, 0, 2]])
    signs = load_table(tiny_config, tmp_path / "t.csv", loss="squared_hinge", **data)
    assert signs.task == Task("argmax", ("blue", "green", "red"))
    np.testing.assert_array_equal(signs.rows("train").targets, 2 * np.eye(3)[[2, 0, 2, 1, 0, 2]] - 1)
    with pytest.raises(UserError, match="poisson takes counts, the targets are 3 classes; use loss cross_entropy"):
        load_table(tiny_config, tmp_path / "t.csv", loss="poisson", **data)


def test_counts_are_not_standardised(tiny_config: Tiny, tmp_path: Path) -> None:
    data = {"target_columns": ["n"], "drop_columns": [], "categorical_columns": []}
    dataset = load_table(tiny_config, tmp_path / "t.csv", "x,n\n1,3\n2,0\n4,7\n", "poisson", **data)
    assert dataset.task == Task("none")
    np.testing.assert_array_equal(dataset.rows("train").targets, [[3], [0], [7]])


def test_targets_that_no_standardising_suits(tiny_config: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="standardise_columns: loss poisson takes the target price as it is; leave it"):
        load_table(tiny_config, tmp_path / "t.csv", loss="poisson", standardise_columns=["size", "price"])


def test_numeric_categories_stand_in_their_order(tiny_config: Tiny, tmp_path: Path) -> None:
    text = "hour,price\n10,1\n9,2\n2,3\n"
    dataset = load_table(tiny_config, tmp_path / "t.csv", text, drop_columns=[], categorical_columns=["hour"])
    assert dataset.preparation.input_names() == ["hour=2", "hour=9", "hour=10"]
    text = "hour,price\n1,1\n1.0,2\n01,3\nnan,4\n"  # no order as numbers: then as text, in every process alike
    dataset = load_table(tiny_config, tmp_path / "t.csv", text, drop_columns=[], categorical_columns=["hour"])
    assert dataset.preparation.input_names() == ["hour=01", "hour=1", "hour=1.0", "hour=nan"]


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        ("", {}, "t.csv is empty"),
        ("id,colour,price\n", {}, "t.csv has a header and no rows"),
        ("1,2\n3,4\n", {}, "t.csv, line 1: a header with the names of the columns is needed, not numbers"),
        (TABLE + "7,red,7.0,10\n", {}, "t.csv, line 8: 4 fields, the header has 5"),
        (TABLE.replace("3.0", "three"), {}, "t.csv, line 4, column size: 'three' is not a number"),
        (TABLE.replace("3.0", ""), {}, "t.csv, line 4, column size: the field is empty"),
        (TABLE.replace("3.0", "nan"), {}, "t.csv, line 4, column size: nan is not a finite number"),
        (TABLE.replace("300", "-inf"), {}, "t.csv, line 4, column price: -inf is not a finite number"),
        (TABLE.replace("id,colour", "id,size"), {}, "line 1: the column 'size' is there twice"),
        (TABLE, {"target_columns": ["prise"]}, "unknown column 'prise'; did you mean price?"),
        (TABLE, {"drop_columns": ["idd"]}, "unknown column 'idd'; did you mean id?"),
        (TABLE, {"drop_columns": ["id", "colour", "size", "weight"]}, "no column is left for the inputs"),
        (TABLE, {"test_rows": 6}, "t.csv has 6 rows; data.validation_rows = 0 and data.test_rows = 6 leave none"),
        (
            TABLE.replace("6,red", "6,pink"),
            {"test_rows": 1},
            "line 7, column colour: 'pink' does not occur in the training",
        ),
        (b"a,b\n\xff,1\n", {}, "t.csv, after line 1: not text in UTF-8"),
        ('a,b\n"x,1\n', {}, "t.csv, after line 1: unexpected end of data"),
        (TABLE, {"target_columns": ["price", "id"]}, "'id' stands in data.target_columns and in data.drop_columns"),
        (TABLE, {"target_columns": ["price", "price"]}, "data.target_columns names 'price' twice"),
        (
            TABLE,
            {"standardise_columns": ["colour"]},
            "'colour' stands in data.categorical_columns and in data.standard",
        ),
        (TABLE.replace("3.0", "1_000"), {}, "line 4, column size: '1_000' is not a number"),
        (TABLE.replace("3.0", "1e300"), {}, "line 4, column size: the number is too large to standardise"),
        (TABLE.replace("id,", ","), {}, "line 1: column 1 has no name"),
        (TABLE.replace(",", ";"), {}, "the separator must be a comma"),
        (
            TABLE.replace("blue", "red").replace("green", "red"),
            {"target_columns": ["colour"]},
            "single class 'red'; a classification needs two or more",
        ),
    ],
)
def test_tables_that_are_refused(
    tiny_config: Tiny, tmp_path: Path, text: str | bytes, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_table(tiny_config, tmp_path / "t.csv", text, **data)
    assert message in str(caught.value)


def test_a_missing_table(tiny_config: Tiny, tmp_path: Path) -> None:
    section = {"kind": "table", "path": str(tmp_path / "none.csv"), "target_columns": ["y"]}
    with pytest.raises(UserError, match=r"no file .*none\.csv"):
        load_all(parse_config({**tiny_config(), "data": section}))


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "cross_entropy"])
def test_targets_that_do_not_fit_the_loss(tiny_config: Tiny, tmp_path: Path, loss: str) -> None:
    with pytest.raises(UserError, match=r"do not fit the loss: .* row 0 .* is \[100.0\]"):
        load_table(tiny_config, tmp_path / "t.csv", loss=loss)


# arrays ------------------------------------------------------------------------------------------------------


def load_arrays(tiny_config: Tiny, folder: Path, x: Any, d: Any, loss: str = "squared_error", **data: Any) -> Dataset:
    np.save(folder / "x.npy", x)
    np.save(folder / "d.npy", d)
    section = {"kind": "arrays", "inputs": str(folder / "x.npy"), "targets": str(folder / "d.npy"), **data}
    return load_all(parse_config({**tiny_config(loss={"kind": loss}), "data": section}))


def test_arrays(tiny_config: Tiny, tmp_path: Path) -> None:
    x, d = np.arange(12.0).reshape(6, 2), np.arange(6.0)
    dataset = load_arrays(tiny_config, tmp_path, x, d, validation_rows=1, test_rows=2, scaling="standardise")
    assert (dataset.n_inputs, dataset.n_targets, dataset.task.kind) == (2, 1, "regression")
    np.testing.assert_allclose(dataset.rows("train").inputs.std(axis=0), 1)
    np.testing.assert_allclose(dataset.preparation.raw_inputs(dataset.rows("test").inputs), x[4:])
    np.testing.assert_array_equal(dataset.rows("validation").targets, [[3.0]])
    divided = load_arrays(tiny_config, tmp_path, x, d, scaling=4)
    np.testing.assert_array_equal(divided.rows("train").inputs, x / 4)
    classes = load_arrays(tiny_config, tmp_path, x, np.array([0, 1, 2, 0, 1, 2]), "cross_entropy")
    assert (classes.n_targets, classes.task.decision) == (3, "argmax")
    assert load_arrays(tiny_config, tmp_path, x, np.array([0, 1] * 3), "cross_entropy", n_classes=5).n_targets == 5


X = np.ones((4, 2))


@pytest.mark.parametrize(
    ("x", "d", "loss", "data", "message"),
    [
        (X, np.ones(3), "squared_error", {}, "data.inputs has 4 rows and data.targets has 3"),
        (np.array([[1, np.nan]] * 4), np.ones(4), "squared_error", {}, "x.npy has a NaN or infinity in row 0"),
        (X, np.array([1, 1, np.inf, 1]), "squared_error", {}, "d.npy has a NaN or infinity in row 2"),
        (
            X,
            np.array(["a"] * 4),
            "squared_error",
            {},
            "must hold one array of real numbers with 1 or 2 dimensions, not <U1 of",
        ),
        (
            X,
            np.array([0, 2**64 - 1, 0, 1], np.uint64),
            "cross_entropy",
            {"n_classes": 3},
            "class 18446744073709551615 is out",
        ),
        (X, np.array([0, 10**12, 0, 1]), "cross_entropy", {}, "there are only 4 training rows; are these classes?"),
        (np.ones((4, 2, 2)), np.ones(4), "squared_error", {}, "with 1 or 2 dimensions"),
        (np.ones((0, 2)), np.ones(0), "squared_error", {}, "x.npy is empty"),
        (
            X,
            np.array([0, 1, 0, 2]),
            "cross_entropy",
            {"test_rows": 1},
            "row 3 (counting from 0): class 2 is out of range",
        ),
        (X, np.array([0, -1, 0, 1]), "cross_entropy", {}, "row 1 (counting from 0): class -1 is out of range"),
        (X, np.array([0, 3, 0, 1]), "cross_entropy", {"n_classes": 3}, "there are 3 classes, 0 to 2"),
        (X, np.full((4, 3), 0.5), "cross_entropy", {}, "rows of probabilities that sum to 1, row 0"),
        (X, np.full(4, 1.5), "binary_cross_entropy", {}, "numbers from 0 to 1, row 0"),
        (X, np.array([0, 1, 2, 1]), "binary_cross_entropy", {}, "takes two classes, the data have 3"),
        (X, np.array([3, 0, -1, 2]), "poisson", {}, "poisson takes numbers that are not negative, row 2"),
        (X, np.array([1, -1, 0, 1]), "squared_hinge", {}, "squared_hinge takes -1 and 1, or rows of -1 with"),
        (
            X,
            np.array([[1, -1], [-1, 1], [1, 1], [1, -1]]),
            "squared_hinge",
            {},
            "row 2 (counting from 0) is [1",
        ),
    ],
)
def test_arrays_that_are_refused(
    tiny_config: Tiny, tmp_path: Path, x: Any, d: Any, loss: str, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_arrays(tiny_config, tmp_path, x, d, loss, **data)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not numpy", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_arrays(tiny_config: Tiny, tmp_path: Path, content: bytes | None) -> None:
    np.save(tmp_path / "d.npy", np.ones(3))
    if content is not None:
        (tmp_path / "x.npy").write_bytes(content)
    section = {"kind": "arrays", "inputs": str(tmp_path / "x.npy"), "targets": str(tmp_path / "d.npy")}
    with pytest.raises(UserError, match=r"data.inputs: .*x\.npy"):
        load_all(parse_config({**tiny_config(), "data": section}))


def test_no_pickle(tiny_config: Tiny, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}] * 3), allow_pickle=True)
    np.save(tmp_path / "d.npy", np.ones(3))
    section = {"kind": "arrays", "inputs": str(tmp_path / "x.npy"), "targets": str(tmp_path / "d.npy")}
    with pytest.raises(UserError, match="one array of real numbers"):
        load_all(parse_config({**tiny_config(), "data": section}))


def test_gather_writes_into_its_output() -> None:
    """And makes no array on the way, as NumPy's take does unless it is told to clip."""
    backend, rows = NumpyBackend(), np.arange(9999, -1, -1)
    table, out = np.arange(30_000, dtype=np.float32).reshape(-1, 3), np.zeros((10_000, 3), np.float32)
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        backend.gather(table, rows, out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    np.testing.assert_array_equal(out, table[::-1])
    assert min(peaks) < 10_000  # the least: the test runner's own threads allocate too, now and then
