"""From a config to rows of numbers: `load_data` gives the training, validation and test rows of any kind of data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpu_bp.config import ArrayData, Config, Data, DataSection, DoubleMoon, Encoder, Linear, TableData, Xor
from gpu_bp.data import synthetic
from gpu_bp.data.arrays import read_pair
from gpu_bp.data.columns import Columns
from gpu_bp.data.preparation import Preparation, code_labels, code_targets, fit_scaling
from gpu_bp.data.synthetic import Rows
from gpu_bp.data.table_reader import TableReader, open_table
from gpu_bp.data.task import Task
from gpu_bp.errors import UserError
from gpu_bp.spec import Loss

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Rows as the network sees them: inputs (n, n_inputs) float64, and targets: (n, n_targets) float64, or
    (n,) int64 for class indices."""

    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """The splits that have rows, by name, what was fitted to the training rows, and the number of targets."""

    splits: dict[str, Split]
    preparation: Preparation
    n_targets: int

    @property
    def task(self) -> Task:
        return self.preparation.task

    @property
    def n_inputs(self) -> int:
        return int(self.splits["train"].inputs.shape[1])


def load_data(config: Config, preparation: Preparation | None = None) -> Dataset:
    """The data of a config, targets coded for its loss.

    The preparation is fitted to the training rows, or is the one given, such as a model's own.

    Raises:
        UserError: a missing or broken file, too few rows, targets that do not fit the loss, or data that do not
            fit the preparation given.
    """
    data, loss = config.data, config.loss.record()
    if preparation and (preparation.columns is not None) != isinstance(data, TableData):
        raise UserError(f"data.kind is {data.kind}, and the model was trained on another kind of data")
    if isinstance(data, TableData):
        return _load_table(data, loss, preparation)
    if isinstance(data, ArrayData):
        rows = _read_arrays(data, loss, preparation)
        return _dataset(rows, _n_train(len(rows.inputs), data, data.inputs), data, loss, data.targets, preparation)
    n_train = (data.rows or data.size) if isinstance(data, Encoder) else data.rows
    rows = _generate(data, config.seed, n_train + data.validation_rows + data.test_rows)
    return _dataset(rows, n_train, data, loss, data.kind, preparation)


def _generate(data: Data, seed: int, n: int) -> Rows:
    """The first n rows of a synthetic set: training, validation and test rows in this order."""
    if n * getattr(data, "n_inputs", 1) * getattr(data, "n_targets", 1) > 2**48:
        raise MemoryError(f"{n:.1e} rows of data")
    match data:
        case DoubleMoon():
            return synthetic.double_moon(seed, 0, n, radius=data.radius, width=data.width, distance=data.distance)
        case Xor():
            return synthetic.xor(0, n)
        case Encoder():
            return synthetic.encoder(0, n, size=data.size)
        case Linear():
            return synthetic.linear(seed, 0, n, n_inputs=data.n_inputs, n_targets=data.n_targets, noise=data.noise)
    raise AssertionError(data)


def _read_arrays(data: ArrayData, loss: Loss, preparation: Preparation | None) -> Rows:
    """A pair of .npy files; a vector of integers is taken as classes unless the loss is one of real numbers."""
    inputs, targets = read_pair(Path(data.inputs), Path(data.targets))
    if targets.ndim == 2:
        return Rows(inputs, targets=targets)
    if loss.targets == "real":
        return Rows(inputs, targets=targets[:, None].astype(np.float64))
    train = targets[: _n_train(len(targets), data, data.targets)]
    n_classes = data.n_classes or max(2, int(train.max()) + 1)
    if preparation:
        n_classes = len(preparation.task.classes)
    elif not data.n_classes and n_classes > max(2, len(train)):
        raise UserError(
            f"{data.targets}: the largest class is {n_classes - 1}, but there are only {len(train)} training rows; "
            "are these classes? If so, set data.n_classes; for regression use a loss such as squared_error"
        )
    outside = (targets < 0) | (targets >= n_classes)
    if outside.any():
        row = int(np.argmax(outside))
        raise UserError(
            f"{data.targets}, row {row} (counting from 0): class {targets[row]} is out of range; there are "
            f"{n_classes} classes, 0 to {n_classes - 1} (data.n_classes sets how many)"
        )
    return Rows(inputs, labels=targets.astype(np.int64), classes=tuple(str(k) for k in range(n_classes)))


def _load_table(data: TableData, loss: Loss, preparation: Preparation | None) -> Dataset:
    table = open_table(Path(data.path))
    n_train = _n_train(table.n_rows, data, data.path)
    columns = preparation.columns if preparation else None
    columns = columns or Columns.fit(
        table,
        n_train,
        targets=data.target_columns,
        dropped=data.drop_columns,
        categorical=data.categorical_columns,
        standardised=data.standardise_columns,
        standardise_targets=loss.targets == "real",
    )
    reader = TableReader(table, columns)
    read = reader.read(0, reader.n_rows)
    rows = Rows(read.inputs, targets=read.targets, labels=read.labels, classes=reader.classes)
    return _dataset(rows, n_train, data, loss, reader.where, preparation, columns)


def _n_train(n_rows: int, data: DataSection, where: str) -> int:
    """How many rows are left for training."""
    n_train = n_rows - data.validation_rows - data.test_rows
    if n_train < 1:
        raise UserError(
            f"{where} has {n_rows} rows; data.validation_rows = {data.validation_rows} and "
            f"data.test_rows = {data.test_rows} leave none to train on"
        )
    return n_train


def _dataset(
    rows: Rows,
    n_train: int,
    data: DataSection,
    loss: Loss,
    where: str,
    preparation: Preparation | None,
    columns: Columns | None = None,
) -> Dataset:
    """Codes the targets, scales the inputs by the training rows, and splits."""
    if rows.labels is not None:
        targets, task = code_labels(rows.labels, rows.classes, loss)
    else:
        assert rows.targets is not None
        targets, task = code_targets(rows.targets, rows.binary, loss, where)
    inputs = rows.inputs
    if preparation is None:
        shift, scale = ((), ()) if columns else fit_scaling(inputs[:n_train], getattr(data, "scaling", "none"))
        preparation = Preparation(task, columns, tuple(shift), tuple(scale))
    elif columns is None and len(preparation.shift) != inputs.shape[1]:
        raise UserError(f"{where}: {inputs.shape[1]} inputs a row, where the network takes {len(preparation.shift)}")
    inputs = preparation.inputs(inputs)
    ends = np.cumsum([0, n_train, data.validation_rows, data.test_rows])
    splits = {
        name: Split(inputs[start:end], targets[start:end])
        for name, start, end in zip(SPLITS, ends[:-1], ends[1:], strict=True)
        if end > start
    }
    return Dataset(splits, preparation, len(rows.classes) if targets.ndim == 1 else targets.shape[1])
