"""What rows weigh: from a column, a file or a source of one's own, through every residency, to the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gpu_bp
from gpu_bp import Batch, Batches, Dataset, NumpyBackend, Source, Task, UserError, load_data, parse_config
from gpu_bp.backends import Backend
from gpu_bp.data import own_data
from gpu_bp.data.sources import settle

Tiny = Callable[..., dict[str, Any]]
N = 60
WEIGHTS = np.where(np.arange(N) % 5 == 0, 0.0, np.arange(N) / 4)
SPLITS = {"train": slice(0, 45), "validation": slice(45, 53), "test": slice(53, N)}


class Waves(Source):
    """Row i weighs WEIGHTS[i], all but the first `nothing` rows, which weigh nothing."""

    def __init__(self, n_rows: int, first: int = 0, *, nothing: int = 0, weighted: bool = True) -> None:
        super().__init__(n_rows, 2, 1, Task("none"), weighted=weighted, block_rows=8)
        self.first, self.nothing = first, nothing

    def fill(self, rows: Any, batch: Batch) -> None:
        numbers = rows + self.first
        batch.inputs[:] = np.sin(np.multiply.outer(numbers, [1.0, 2.0]))
        batch.targets[:] = np.cos(numbers)[:, None]
        if self.weighted:
            batch.weights[:] = np.where(rows < self.nothing, 0, WEIGHTS[numbers])


def write(folder: Path, kind: str, values: Any = WEIGHTS, /, **keys: Any) -> dict[str, Any]:
    """The same rows as a table or arrays, and the section that reads them."""
    x, y = np.arange(2.0 * N).reshape(N, 2), np.arange(N) / 8
    split = {"validation_rows": 8, "test_rows": 7}
    if kind == "arrays":
        for name, array in (("x", x), ("y", y), ("w", values)):
            np.save(folder / f"{name}.npy", array)
        files = {
            key: str(folder / f"{name}.npy") for key, name in (("inputs", "x"), ("targets", "y"), ("weights", "w"))
        }
        return {"kind": kind, **files, **split, **keys}
    path, columns = folder / f"t.{kind}", {"a": x[:, 0], "w": values, "b": x[:, 1], "y": y}
    if kind == "parquet":
        pq.write_table(pa.table(columns), path, row_group_size=7)
    else:
        rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
        path.write_text("a,w,b,y\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return {"kind": "table", "path": str(path), "target_columns": ["y"], "weight_column": "w", **split, **keys}


def load(tiny_config: Tiny, section: dict[str, Any], **sections: Any) -> Dataset:
    return load_data(parse_config({**tiny_config(**sections), "data": section}))


KINDS = ["csv", "parquet", "arrays"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_files(tiny_config: Tiny, tmp_path: Path, kind: str) -> None:
    """As they stand there, each split's its own; the column is no input, and inputs are what they are without."""
    section = write(tmp_path, kind)
    dataset = load(tiny_config, section)
    key = "weights" if kind == "arrays" else "weight_column"
    without = {**section, key: None} | ({} if kind == "arrays" else {"drop_columns": ["w"]})
    plain = load(tiny_config, without)
    for name, rows in SPLITS.items():
        split, unweighted = dataset.rows(name), plain.rows(name)
        assert split.weights is not None
        np.testing.assert_array_equal(split.weights, WEIGHTS[rows])
        assert unweighted.weights is None
        np.testing.assert_array_equal(split.inputs, unweighted.inputs)
        np.testing.assert_array_equal(split.targets, unweighted.targets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residency", ["device", "host"])
@pytest.mark.parametrize("sampling", ["ordered", "shuffled", "replacement"])
def test_weights_go_with_their_rows(
    backend: Backend, tiny_config: Tiny, tmp_path: Path, kind: str, residency: str, sampling: Any
) -> None:
    """Into the batches, in the network's dtype."""
    dataset = load(tiny_config, write(tmp_path, kind))
    sources, _ = settle(backend, dataset.sources, residency, "float32")
    batches = Batches(backend, sources["train"], 8, sampling, 1, block_rows=7, window_blocks=2)
    for epoch in range(2):
        for batch in batches.epoch(epoch):
            assert batch.weights is not None
            assert (batch.weights.shape, batch.weights.dtype) == ((batch.n,), np.float32)
            rows = backend.to_host(batch.rows)
            np.testing.assert_array_equal(backend.to_host(batch.weights), WEIGHTS[rows].astype(np.float32))


def test_the_file_of_weights_is_found_from_anywhere(tiny_config: Tiny, in_tmp: Path) -> None:
    """Its path is made absolute, as those of the other files are."""
    section = {"kind": "arrays", "inputs": "x.npy", "targets": "y.npy", "weights": "w.npy"}
    data = parse_config({**tiny_config(), "data": section}).data.model_dump()
    assert data["weights"] == str(in_tmp / "w.npy")


def test_weights_of_a_vector_or_a_column(tiny_config: Tiny, tmp_path: Path) -> None:
    for weights in (np.arange(N), np.arange(N)[:, None], np.arange(N).astype(np.float32)):
        split = load(tiny_config, write(tmp_path, "arrays", weights)).rows("test")
        np.testing.assert_array_equal(split.weights, np.arange(N)[SPLITS["test"]])  # type: ignore[arg-type]


@pytest.mark.parametrize("weighted", [False, True])
def test_weights_of_ones_own_sources(backend: Backend, weighted: bool) -> None:
    sources: dict[str, Source] = {"train": Waves(45, weighted=weighted), "test": Waves(7, 53)}
    dataset = own_data(sources, gpu_bp.registry.loss("squared_error"), backend)
    for residency in ("host", "device"):
        settled, line = settle(backend, dataset.sources, residency, "float64")
        assert f"{(45 * (3 + weighted) + 7 * 4) * 8 / 2**20:.3f} MiB" in line
        assert settled["train"].weighted == weighted
        for batch in Batches(backend, settled["train"], 8, "shuffled", 1, dtype="float64").epoch(0):
            if not weighted:
                assert batch.weights is None
                continue
            np.testing.assert_array_equal(backend.to_host(batch.weights), WEIGHTS[backend.to_host(batch.rows)])


def test_where_there_are_no_weights_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arrays a batch from the device, three from a window."""
    backend, gathered = NumpyBackend(), []
    gather = NumpyBackend.gather
    monkeypatch.setattr(NumpyBackend, "gather", lambda self, *arrays: [gathered.append(1), gather(self, *arrays)][1])
    for weighted in (0, 1):
        for residency, arrays in (("device", 2), ("host", 3)):
            settled, _ = settle(backend, {"train": Waves(40, weighted=bool(weighted))}, residency, "float32")
            batches = Batches(backend, settled["train"], 40, "shuffled", 1)
            gathered.clear()
            assert len(list(batches.epoch(0))) == 1
            assert len(gathered) == arrays + weighted


def read_all(dataset: Dataset) -> None:
    for name in dataset.sources:
        dataset.rows(name)


def changed(row: int, value: float) -> np.ndarray:
    weights = np.ones(N)
    weights[row] = value
    return weights


@pytest.mark.parametrize(
    ("kind", "weights", "keys", "message"),
    [
        ("csv", changed(3, -0.5), {}, "t.csv, line 5, column w: the weight is negative, -0.5"),
        ("csv", changed(59, -1), {}, "t.csv, line 61, column w: the weight is negative, -1"),
        ("csv", changed(3, np.nan), {}, "t.csv, line 5, column w: nan is not a finite number"),
        ("csv", ["x"] * N, {}, "t.csv, line 2, column w: 'x' is not a number"),
        ("parquet", changed(8, -2), {}, "t.parquet, row 8 (counting from 0), column w: the weight is negative, -2"),
        ("parquet", changed(8, np.inf), {}, "t.parquet, row 8 (counting from 0), column w: inf is not a finite"),
        ("arrays", changed(50, -2), {}, "w.npy, row 50 (counting from 0): the weight is negative, -2"),
        ("arrays", changed(50, np.nan), {}, "data.weights: "),
        ("arrays", changed(50, np.inf), {}, "w.npy has a NaN or infinity in row 50 (counting from 0)"),
        ("arrays", np.ones(N - 1), {}, "w.npy has the shape (59,); a weight for each of the 60 rows of data.inputs"),
        ("arrays", np.ones((N, 2)), {}, "w.npy has the shape (60, 2); a weight for each of the 60 rows"),
        ("arrays", np.ones(N), {"weights": "none.npy"}, "data.weights: no file "),
        ("csv", np.ones(N), {"weight_column": "ww"}, "t.csv: unknown column 'ww'; did you mean w?"),
        ("csv", np.ones(N), {"weight_column": "y"}, "'y' stands in data.target_columns and in data.weight_column"),
        ("csv", np.ones(N), {"drop_columns": ["w"]}, "'w' stands in data.drop_columns and in data.weight_column; it"),
        (
            "csv",
            np.ones(N),
            {"categorical_columns": ["w"]},
            "'w' stands in data.categorical_columns and in data.weight",
        ),
        ("csv", np.ones(N), {"standardise_columns": ["w"]}, "'w' stands in data.standardise_columns and in data.weig"),
        (
            "csv",
            1.0 * (np.arange(N) < 45),
            {},
            "the weights of the validation rows are all 0; one at least must be larger",
        ),
        (
            "arrays",
            1.0 * (np.arange(N) >= 45),
            {},
            "the weights of the train rows are all 0; one at least must be larger",
        ),
        (
            "parquet",
            1.0 * (np.arange(N) < 53),
            {},
            "the weights of the test rows are all 0; one at least must be larger",
        ),
    ],
)
def test_weights_that_are_refused(
    tiny_config: Tiny, tmp_path: Path, kind: str, weights: Any, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_all(load(tiny_config, write(tmp_path, kind, weights, **keys)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_of_ones_own_that_weigh_nothing() -> None:
    """One row with a weight is enough, however far down."""
    loss, backend = gpu_bp.registry.loss("squared_error"), NumpyBackend()
    own_data({"train": Waves(60, nothing=59)}, loss, backend)
    with pytest.raises(UserError, match="the weights of the train rows are all 0; one at least must be larger"):
        own_data({"train": Waves(60, nothing=60)}, loss, backend)


def test_a_weight_too_large_for_the_precision(tiny_config: Tiny, tmp_path: Path) -> None:
    dataset = load(tiny_config, write(tmp_path, "arrays", changed(20, 1e300)))
    with pytest.raises(UserError, match=r"y.npy, weights, row 20, .* 1e\+300 is too large for float32"):
        settle(NumpyBackend(), dataset.sources, "device", "float32")


def test_predict_needs_no_weights(tiny_config: Tiny, in_tmp: Path) -> None:
    """Neither the column nor the file; evaluate reads the weights of the config again."""
    for kind in ("csv", "arrays"):
        made = {**tiny_config(), "data": write(in_tmp, kind)}
        result = gpu_bp.train(made, backend="numpy", run=in_tmp / kind, pictures=False)
        assert gpu_bp.evaluate(in_tmp / kind, backend="numpy")["test"] == result.summary["test"]
        Path("p.csv").write_text("a,b\n1,2\n")
        assert len(result.model.predict(Path("p.csv"))[1][0]) == 1
        assert "w" not in result.model.preparation.input_names()


def test_weights_of_1_train_as_none(tiny_config: Tiny, tmp_path: Path) -> None:
    """The same rows in the same order."""
    parameters = []
    section = write(tmp_path, "arrays", np.ones(N), scaling="max-abs")
    for weights in (section["weights"], None):
        made = tiny_config(train={"epochs": 3, "batch_size": 8, "precision": "float64"})
        config = parse_config({**made, "data": {**section, "weights": weights}})
        trainer = gpu_bp.Trainer(config, NumpyBackend())
        list(trainer.run())
        parameters.append(trainer.model.network.tensors())
    for name, tensor in parameters[0].items():
        np.testing.assert_allclose(tensor, parameters[1][name], rtol=1e-12)
