"""From a config to rows of numbers: `load_data` gives the training, validation and test rows of any kind of data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gpu_bp import own
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.config import Config
from gpu_bp.config_data import ArrayData, DataSection, OwnData, ShardData, SourceChoice, Synthetic, TableData
from gpu_bp.data.arrays import ArrayReader, NpyFile
from gpu_bp.data.columns import Columns
from gpu_bp.data.preparation import Coding, Preparation, check_targets, code_labels, code_targets, fit_scaling
from gpu_bp.data.shards import ShardReader
from gpu_bp.data.source import Reader, Source
from gpu_bp.data.sources import CheckedSource, FileSource, GeneratedSource, SetReader, empty
from gpu_bp.data.synthetic import make_set
from gpu_bp.data.table import Table
from gpu_bp.data.table_reader import TableReader, open_table
from gpu_bp.data.task import Task
from gpu_bp.errors import UserError
from gpu_bp.spec import GroupedLoss, Loss

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Rows as the network sees them: inputs (n, n_inputs) float64, targets (n, n_targets) float64, or (n,) int64 for
    class indices, and weights (n,) float64 where the rows have some."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Dataset:
    """The sources of the splits that have rows, by name, and what was fitted to the training rows."""

    sources: Mapping[str, Source]
    preparation: Preparation

    @property
    def task(self) -> Task:
        return self.preparation.task

    @property
    def n_inputs(self) -> int:
        return self.sources["train"].n_inputs

    @property
    def n_targets(self) -> int:
        return self.sources["train"].n_targets

    def rows(self, name: str = "train", first: int = 0, n: int | None = None) -> Split:
        """Rows first to first + n of a split, by default all, on the host.

        Raises:
            UserError: a file is broken there.
        """
        source = self.sources[name]
        backend = source.backend or NumpyBackend()
        n = source.n_rows - first if n is None else min(n, source.n_rows - first)
        batch = empty(backend, source, n, np.float64)
        backend.count(first, batch.rows)
        source.fill(batch.rows, batch)
        return Split(*map(backend.to_host, batch.filled))


def load_data(config: Config, preparation: Preparation | None = None, *, backend: Backend | None = None) -> Dataset:
    """The data of a config, targets coded for its loss.

    The preparation is fitted to the training rows, or is the one given, such as a model's own. Generated rows are
    made on the backend, by default NumPy's. Rows of files are read when they are needed.

    Raises:
        UserError: a missing or broken file, too few rows, targets that do not fit the loss, or data that do not
            fit the preparation given.
    """
    data, loss = config.data, config.loss.record()
    if preparation and (preparation.columns is not None) != isinstance(data, TableData):
        raise UserError(f"data.kind is {data.kind}, and the model was trained on another kind of data")
    if isinstance(data, get_args(Synthetic)):
        return _generated(data, config.seed, loss, preparation, backend or NumpyBackend())
    if isinstance(data, ArrayData):
        return _from_files(_arrays(data, loss, preparation), data, loss, preparation)
    if isinstance(data, ShardData):
        return _from_files(ShardReader(Path(data.path)), data, loss, preparation)
    if isinstance(data, TableData):
        table = open_table(Path(data.path))
        columns = preparation.columns if preparation else None
        columns = columns or _fit_columns(table, data, loss)
        return _from_files(TableReader(table, columns, weight=data.weight_column), data, loss, preparation, columns)
    assert isinstance(data, OwnData)
    if data.sources is None:
        raise UserError(
            'data.kind is own: sources are needed: name them, data.sources.train = "module:object", or give them from '
            "Python, gpu_bp.train(config, sources=...), gpu_bp.evaluate(run, sources=...)"
        )
    backend = backend or NumpyBackend()
    choices = {name: getattr(data.sources, name) for name in SPLITS}
    named = {name: _source(name, choice, config.seed, backend) for name, choice in choices.items() if choice}
    return own_data(named, loss, backend)


def own_data(sources: Mapping[str, Source], loss: Loss, backend: Backend) -> Dataset:
    """The data of sources of one's own, by the name of the split: "train", and perhaps "validation" and "test".

    Raises:
        UserError: other names, sources that do not go together, or that do not fit the loss or the backend.
    """
    if "train" not in sources or set(sources) - set(SPLITS):
        given = ", ".join(map(str, sources)) or "none at all"
        raise UserError(f"sources must be named train, and perhaps validation and test, not {given}")
    train = sources["train"]
    for name, source in sources.items():
        if not isinstance(source, Source):
            raise UserError(f"the {name} source must be a gpu_bp.Source, not {type(source).__name__}")
        if not isinstance(source.n_rows, int) or source.n_rows < 1:
            raise UserError(f"the {name} source must have a row or more, not n_rows = {source.n_rows}")
        if source.backend not in (None, backend):
            raise UserError(f"the {name} source is of another backend than the network's; give both the same")
        if _of(source) != _of(train):
            raise UserError(f"the {name} source has {_of(source)}, and the train source {_of(train)}")
    if train.indexed and loss.targets != "classes":
        raise UserError(f"the sources' targets are class indices, which loss {loss.name} does not take")
    if isinstance(loss, GroupedLoss) and train.task.kind == "classification":
        raise UserError(f"the sources' task is a classification, and loss {loss.name} is for regressions")
    if loss.values.get("label_smoothing") and train.task.kind == "regression":
        raise UserError("the sources' task is a regression, and label_smoothing is for classifications; leave it out")
    preparation = Preparation(train.task, None, (0.0,) * train.n_inputs, (1.0,) * train.n_inputs)
    checked = {name: CheckedSource(source, name) for name, source in sources.items()}
    return _with_weight(Dataset(checked, preparation))


def _source(split: str, choice: SourceChoice, seed: int, backend: Backend) -> Any:
    """The source that a config names, or what its class or function makes of the arguments.

    A function that takes a `seed` or a `backend` is given the config's and the network's.
    """
    arguments, where = choice.arguments, f"data.sources.{split}: {choice.kind}"
    try:
        found: Any = own.load(choice.kind)
    except UserError as error:
        raise UserError(f"data.sources.{split}: {error}") from None
    if isinstance(found, Source) or not callable(found):
        if arguments:
            raise UserError(f"{where} is no class or function, so it takes no {', '.join(arguments)}")
        return found
    signature = inspect.signature(found)
    offered = {"seed": seed, "backend": backend}
    arguments = {name: value for name, value in offered.items() if name in signature.parameters} | arguments
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"{where} takes {signature}: {error}") from None
    return found(**arguments)


def _of(source: Source) -> str:
    """What the rows of a source are, in words."""
    targets = f"{source.n_targets} classes" if source.indexed else f"{source.n_targets} targets"
    return f"{source.n_inputs} inputs and {targets} a row, task {source.task.decision}"


def _generated(data: Any, seed: int, loss: Loss, preparation: Preparation | None, backend: Backend) -> Dataset:
    made = make_set(data, seed)
    coding = code_labels(made.classes, loss) if made.classes else code_targets(made.target.width, made.binary, loss)
    reader = SetReader(NumpyBackend(), made, seed, data.kind, made.n_rows)
    if not made.classes:  # targets of one set are all alike, so a few rows tell
        check_targets(reader.read(0, min(100, made.n_rows)).wanted, loss, data.kind, 0)
    if preparation is None:
        preparation = _fit_arrays(reader, made.n_rows, data, coding, loss)
    _check_width(preparation, made.inputs.width, data.kind)
    ranges = _ranges(made.n_rows, data)
    sources = {name: GeneratedSource(backend, made, seed, first, n, preparation, coding) for name, first, n in ranges}
    return Dataset(sources, preparation)


def _from_files(
    reader: Reader, data: Any, loss: Loss, preparation: Preparation | None, columns: Columns | None = None
) -> Dataset:
    n_train = _n_train(reader.n_rows, data, reader.where)
    coding = (
        code_labels(reader.classes, loss) if reader.classes else code_targets(reader.n_targets, reader.binary, loss)
    )
    if preparation is None and columns:
        preparation = Preparation(coding.task, columns)
    elif preparation is None:
        preparation = _fit_arrays(reader, n_train, data, coding, loss)
    if columns is None:
        _check_width(preparation, reader.n_inputs, reader.where)
    ranges = _ranges(n_train, data)
    sources = {name: FileSource(reader, first, n, preparation, coding, loss) for name, first, n in ranges}
    return _with_weight(Dataset(sources, preparation))


def _with_weight(dataset: Dataset) -> Dataset:
    """The dataset; one that has a split whose rows all weigh 0 is refused, since a mean over them has no meaning."""
    for name, source in dataset.sources.items():
        starts = range(0, source.n_rows, source.read_rows) if source.weighted else ()
        if starts and not any(np.any(dataset.rows(name, start, source.read_rows).weights) for start in starts):
            raise UserError(f"the weights of the {name} rows are all 0; one at least must be larger")
    return dataset


def _fit_arrays(reader: Reader, n_train: int, data: Any, coding: Coding, loss: Loss) -> Preparation:
    """The preparation of rows that are no table's."""
    inputs = fit_scaling(reader, n_train, getattr(data, "scaling", "none"))
    target_scaling = getattr(data, "target_scaling", "none")
    if target_scaling == "none":
        return Preparation(coding.task, None, *inputs)
    if coding.task.kind != "regression" or loss.targets != "real":
        why = f"loss {loss.name} takes others" if loss.targets != "real" else "these are classes"
        raise UserError(f"data.target_scaling = {target_scaling!r} is for targets that are real numbers, and {why}")
    return Preparation(coding.task, None, *inputs, *fit_scaling(reader, n_train, target_scaling, "targets"))


def _arrays(data: ArrayData, loss: Loss, preparation: Preparation | None) -> ArrayReader:
    """A pair of .npy files; a vector of integers is taken as classes unless the loss takes numbers outside [0, 1]."""
    inputs, targets = NpyFile(Path(data.inputs), "data.inputs"), NpyFile(Path(data.targets), "data.targets")
    if len(inputs) != len(targets):
        raise UserError(f"data.inputs has {len(inputs)} rows and data.targets has {len(targets)}; they must be equal")
    weights = NpyFile(Path(data.weights), "data.weights") if data.weights else None
    if weights and (len(weights), weights.width) != (len(inputs), 1):
        raise UserError(
            f"data.weights: {weights.path} has the shape {weights.shape}; a weight for each of the {len(inputs)} rows "
            "of data.inputs is needed"
        )
    if len(targets.shape) == 2 or targets.dtype.kind not in "iu" or loss.targets in ("real", "counts", "signs"):
        return ArrayReader(inputs, targets, weights=weights)
    if preparation:
        return ArrayReader(inputs, targets, len(preparation.task.classes), weights)
    if data.n_classes:
        return ArrayReader(inputs, targets, data.n_classes, weights)
    n_train = _n_train(len(targets), data, data.targets)
    largest = max(int(targets.read(first, min(2**20, n_train - first)).max()) for first in range(0, n_train, 2**20))
    n_classes = max(2, largest + 1)
    if n_classes > max(2, n_train):
        raise UserError(
            f"{data.targets}: the largest class is {n_classes - 1}, but there are only {n_train} training rows; "
            "are these classes? If so, set data.n_classes; for regression use a loss such as squared_error"
        )
    return ArrayReader(inputs, targets, n_classes, weights)


def _fit_columns(table: Table, data: TableData, loss: Loss) -> Columns:
    both = [name for name in data.target_columns if name in (data.standardise_columns or ())]
    if both and loss.targets != "real":
        raise UserError(f"data.standardise_columns: loss {loss.name} takes the target {both[0]} as it is; leave it out")
    return Columns.fit(
        table,
        _n_train(table.n_rows, data, data.path),
        targets=data.target_columns,
        dropped=data.drop_columns,
        categorical=data.categorical_columns,
        standardised=data.standardise_columns,
        weight=data.weight_column,
        standardise_targets=loss.targets == "real",
    )


def _n_train(n_rows: int, data: DataSection, where: str) -> int:
    """How many rows are left for training."""
    n_train = n_rows - data.validation_rows - data.test_rows
    if n_train < 1:
        raise UserError(
            f"{where} has {n_rows} rows; data.validation_rows = {data.validation_rows} and "
            f"data.test_rows = {data.test_rows} leave none to train on"
        )
    return n_train


def _ranges(n_train: int, data: DataSection) -> list[tuple[str, int, int]]:
    """The splits that have rows: name, first row, how many."""
    counts = (n_train, data.validation_rows, data.test_rows)
    firsts = (0, n_train, n_train + data.validation_rows)
    return [(name, first, n) for name, first, n in zip(SPLITS, firsts, counts, strict=True) if n]


def _check_width(preparation: Preparation, n_inputs: int, where: str) -> None:
    if len(preparation.shift) != n_inputs:
        raise UserError(f"{where}: {n_inputs} inputs a row, where the network takes {len(preparation.shift)}")
