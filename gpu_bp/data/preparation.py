"""From what the user has to what the network sees, and back: saved with the model, so that both stay one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpu_bp.data.arrays import read_inputs
from gpu_bp.data.columns import Column, Columns, Numeric
from gpu_bp.data.source import Reader
from gpu_bp.data.table_reader import TableReader, open_table
from gpu_bp.data.task import Task
from gpu_bp.errors import UserError
from gpu_bp.spec import GroupedLoss, Loss


@dataclass(frozen=True)
class Preparation:
    """What was fitted to the training rows.

    Either `columns` (a table), or for arrays: inputs are (x - shift) / scale, per column, and so are targets by their
    own shift and scale where there are any.
    """

    task: Task
    columns: Columns | None = None
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    target_shift: tuple[float, ...] = ()
    target_scale: tuple[float, ...] = ()

    @cached_property
    def scales(self) -> bool:
        """Whether inputs are other than raw ones."""
        return any(self.shift) or any(scale != 1 for scale in self.scale)

    def inputs(self, raw: np.ndarray) -> np.ndarray:
        """Raw inputs (rows, n_inputs) as the network sees them; those of a table are the same."""
        raw = np.asarray(raw)
        return np.asarray(scaled(raw, np.array(self.shift), np.array(self.scale))) if self.scales else raw

    def targets(self, raw: np.ndarray) -> np.ndarray:
        """Raw targets (rows, n_targets) as the network is to give them; those of a table are the same."""
        if not self.target_shift:
            return raw
        return np.asarray(scaled(raw, np.array(self.target_shift), np.array(self.target_scale)))

    def raw_inputs(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs as the network sees them, in raw units: the inverse of `inputs`, and of a table's columns."""
        if self.columns is None:
            return inputs * np.array(self.scale) + np.array(self.shift) if self.scales else inputs
        inputs = inputs.astype(np.float64)
        for k, column in _numeric(self.columns.inputs):
            inputs[:, k] = column.decode(inputs[:, k])
        return inputs

    def input_names(self) -> list[str]:
        """A name for each input of an array; for those of a table, its columns, with the category."""
        if self.columns is None:
            return [f"x{k + 1}" for k in range(len(self.shift))]
        return [name for column in self.columns.inputs for name in column.names()]

    def read(self, path: Path) -> np.ndarray:
        """The network's inputs from a .csv, .parquet or .npy file of raw rows, as `predict` takes them.

        Raises:
            UserError: another kind of file, or one that does not fit what the network was trained on.
        """
        kind = path.suffix.lower()
        if kind not in (".csv", ".parquet", ".npy"):
            raise UserError(f"{path}: a .csv or .npy file is needed, or a .parquet one")
        if kind == ".npy":
            if self.columns is not None:
                raise UserError(
                    f"{path}: this network was trained on a table; give a .csv file (or .parquet) of the same"
                )
            raw = read_inputs(path, "inputs")
        else:
            table, columns = open_table(path), self.columns
            if columns is None:
                wanted = self.input_names()
                names: Iterable[str] = wanted if set(wanted) <= table.names.keys() else table.names  # or in order
                columns = Columns(tuple(map(Numeric, names)), ())
            raw = TableReader(table, columns, targets=False).read(0, table.n_rows).inputs
        if self.columns is None and raw.shape[1] != len(self.shift):
            raise UserError(f"{path} has {raw.shape[1]} columns, this network takes {len(self.shift)} inputs")
        return self.inputs(raw)

    def raw_outputs(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs of a regression, one a target, in raw units: float64 (rows, n)."""
        outputs = outputs.astype(np.float64)
        for k, column in _numeric(self.columns.targets if self.columns else ()):
            outputs[:, k] = column.decode(outputs[:, k])
        if self.target_shift:
            outputs = outputs * np.array(self.target_scale) + np.array(self.target_shift)
        return outputs

    def raw_spread(self, spread: np.ndarray, power: int) -> np.ndarray:
        """Likewise the deviation (power 1) or the variance (power 2) of each target."""
        spread = spread.astype(np.float64)
        for k, column in _numeric(self.columns.targets if self.columns else ()):
            spread[:, k] *= column.sd**power
        return spread * np.array(self.target_scale) ** power if self.target_shift else spread

    def output_names(self, n_outputs: int) -> list[str]:
        """A name for each output: the target columns, the classes, or y1, y2, ..."""
        if self.task.decision == "argmax" and self.task.classes:
            return list(self.task.classes)
        names = [name for column in self.columns.targets for name in column.names()] if self.columns else []
        if len(names) == n_outputs:
            return names
        if self.columns is not None and n_outputs == 1:
            return [self.columns.targets[0].name]
        return ["y"] if n_outputs == 1 else [f"y{k + 1}" for k in range(n_outputs)]

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the model file."""
        plain = {
            "decision": self.task.decision,
            "classes": list(self.task.classes),
            "columns": self.columns.to_json() if self.columns else None,
            "shift": list(self.shift),
            "scale": list(self.scale),
        }
        if self.target_shift:
            plain |= {"target_shift": list(self.target_shift), "target_scale": list(self.target_scale)}
        return plain

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Preparation:
        """The inverse of `to_json`."""
        columns = Columns.from_json(data["columns"]) if data["columns"] else None
        task = Task(data["decision"], tuple(data["classes"]))
        targets = (tuple(data.get(name, ())) for name in ("target_shift", "target_scale"))  # older files have none
        return cls(task, columns, tuple(data["shift"]), tuple(data["scale"]), *targets)


def _numeric(columns: Sequence[Column]) -> Iterator[tuple[int, Numeric]]:
    """The columns that are numbers, and the place of each among the inputs or outputs."""
    k = 0
    for column in columns:
        if isinstance(column, Numeric):
            yield k, column
        k += len(column.names())


def scaled(x: Any, shift: Any, scale: Any) -> Any:
    """x from `shift` on, in units of `scale`. Of symbols too."""
    return (x - shift) / scale


# Training rows that a scaling is fitted to, at most.
FITTED_ROWS = 2**20


def fit_scaling(
    reader: Reader, n_train: int, scaling: str | float, what: Literal["inputs", "targets"] = "inputs"
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale per column of the inputs, or targets, fitted to the first `n_train` rows, or a million of them.

    "standardise": mean and standard deviation. "max-abs": the mean, then the largest absolute value of what
    remains. A column that does not vary keeps scale 1. A number divides, and nothing is fitted.
    """
    width = reader.n_inputs if what == "inputs" else reader.n_targets
    if isinstance(scaling, float | int) or scaling == "none":
        return (0.0,) * width, (1.0 if scaling == "none" else float(scaling),) * width
    n = min(n_train, FITTED_ROWS)

    def blocks() -> Iterator[np.ndarray]:
        step = max(1, 2**20 // reader.n_inputs)
        rows = (reader.read(start, min(step, n - start)) for start in range(0, n, step))
        return (getattr(read, what).astype(np.float64) for read in rows)

    total, low, high = np.zeros(width), np.full(width, np.inf), np.full(width, -np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        for x in blocks():
            total += x.sum(axis=0)
            np.minimum(low, x.min(axis=0), out=low)
            np.maximum(high, x.max(axis=0), out=high)
        constant = low == high  # its computed deviation may be a rounding error, not 0
        shift = np.where(constant, low, total / n)
        scale = np.where(constant, 1.0, np.maximum(high - shift, shift - low))
        if scaling == "standardise":  # as parts of the largest, whose squares neither overflow nor vanish
            square = sum((scaled(x, shift, scale) ** 2).sum(axis=0) for x in blocks())
            scale = np.where(constant, 1.0, scale * np.sqrt(square / n))
    if not np.isfinite(scale).all():
        column = int(np.argmin(np.isfinite(scale)))
        raise UserError(f"{reader.where}: the {what} of column {column} (counting from 0) are too large to be scaled")
    return tuple(shift.tolist()), tuple(scale.tolist())


@dataclass(frozen=True)
class Coding:
    """How what is wanted of a row becomes what a loss wants: the task, and the targets' width (or, with `indexed`,
    how many classes there are, targets being their numbers)."""

    task: Task
    n_targets: int
    indexed: bool = False
    labels: bool = False  # what is wanted are class labels
    signs: bool = False  # which become -1 and 1, not 0 and 1

    def code(self, wanted: Any, column: Any) -> Any:
        """Targets from labels (rows, 1) and `column` (1, n); targets stay what they are. Of symbols too."""
        if not self.labels or self.indexed:
            return wanted
        member = wanted == column if self.task.decision == "argmax" else wanted
        return 2.0 * member - 1.0 if self.signs else member

    @property
    def width(self) -> int:
        """How many columns the targets have."""
        return 1 if self.indexed else self.n_targets


def code_labels(classes: tuple[str, ...], loss: Loss) -> Coding:
    """The coding of class labels: class indices for a loss of classes.

    For a loss of numbers in [0, 1], two classes become 0 and 1; for one of real numbers or signs -1 and 1, and more
    than two one-hot rows, which for signs are of -1 and 1.
    """
    if len(classes) < 2:
        raise UserError(f"the training rows have the single class {classes[0]!r}; a classification needs two or more")
    two = len(classes) == 2
    if loss.targets == "classes":
        return Coding(Task("argmax", classes), len(classes), indexed=True, labels=True)
    if loss.targets == "unit":
        if not two:
            raise UserError(f"{loss.name} takes two classes, the data have {len(classes)}; use loss cross_entropy")
        return Coding(Task("half", classes), 1, labels=True)
    if loss.targets == "counts" or isinstance(loss, GroupedLoss):
        what = "counts" if loss.targets == "counts" else "numbers"
        raise UserError(f"{loss.name} takes {what}, the targets are {len(classes)} classes; use loss cross_entropy")
    if two:
        return Coding(Task("sign", classes), 1, labels=True, signs=True)
    return Coding(Task("argmax", classes), len(classes), labels=True, signs=loss.targets == "signs")


def code_targets(n_targets: int, binary: bool, loss: Loss) -> Coding:
    """The coding of targets that are numbers, which keeps them; `binary`: they are 0 and 1."""
    if loss.targets == "counts" or isinstance(loss, GroupedLoss):
        return Coding(Task("none"), n_targets)
    if loss.targets == "real":
        return Coding(Task("half" if binary else "none"), n_targets)
    if loss.targets == "signs":
        return Coding(Task("sign" if n_targets == 1 else "argmax"), n_targets)
    return Coding(Task("half" if loss.targets == "unit" else "argmax"), n_targets)


# The targets of a loss, in words.
WANTED = {
    "counts": "numbers that are not negative",
    "signs": "-1 and 1, or rows of -1 with a single 1",
    "unit": "numbers from 0 to 1",
    "classes": "classes, or rows of probabilities that sum to 1",
}


def check_targets(targets: np.ndarray, loss: Loss, where: str, first: int) -> None:
    """Raises UserError where targets (rows, n) do not fit the loss (which row; `first` is the first one's number)."""
    if loss.targets == "real":
        return
    several = targets.shape[1] > 1
    if loss.targets == "counts":
        outside = targets < 0
    elif loss.targets == "signs":
        outside = np.abs(targets) != 1
        if several:
            outside |= (targets == 1).sum(axis=1, keepdims=True) != 1
    else:
        outside = (targets < 0) | (targets > 1)
        if loss.targets == "classes" and several:
            outside |= np.abs(targets.sum(axis=1, keepdims=True) - 1) > 1e-6
    if outside.any():
        row = int(np.argwhere(outside)[0][0])
        wanted = WANTED[loss.targets]
        raise UserError(
            f"{where}: the targets do not fit the loss: {loss.name} takes {wanted}, row {first + row} (counting from "
            f"0) is {targets[row].tolist()}; for regression use squared_error, and of a table name a column of classes "
            "in data.categorical_columns"
        )
