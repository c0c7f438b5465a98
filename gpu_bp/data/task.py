"""What a network is asked to do with its outputs, and how well it does: `Task` and `Metrics`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from gpu_bp.spec import GroupedLoss, Loss

Decision = Literal["none", "sign", "half", "argmax"]


@dataclass(frozen=True)
class Task:
    """Regression, or classification with the rule that decides an output.

    `decision`: "none" is regression. "sign": targets are -1 and 1, decided by the sign. "half": targets are
    0 and 1, an output is right within 0.5 of its target. "argmax": the largest output names the class.
    `classes` names the classes, in the order of the outputs, where the task has names for them.
    """

    decision: Decision
    classes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "regression" if self.decision == "none" else "classification"

    def wrong(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Which rows have any output wrong: (rows,) bool, for outputs (rows, n) and their targets."""
        if self.decision == "argmax":
            wanted = targets if targets.ndim == 1 else targets.argmax(axis=1)
            return np.asarray(outputs.argmax(axis=1) != wanted)
        if self.decision == "sign":
            return np.asarray((np.sign(outputs) != np.sign(targets)).any(axis=1))
        return np.asarray((~(np.abs(outputs - targets) < 0.5)).any(axis=1))  # a NaN is wrong

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        """The classes decided: (rows,) of class names or numbers for argmax, else (rows, n) of -1/1 or 0/1."""
        if self.decision == "argmax":
            index = outputs.argmax(axis=1)
            return np.array(self.classes)[index] if self.classes else np.asarray(index)
        return np.where(outputs > 0, 1, -1) if self.decision == "sign" else (outputs >= 0.5).astype(int)


class Metrics:
    """The task's metrics, gathered batch by batch in float64.

    Classification: `errors` (rows with any output wrong) and `accuracy`. Regression: `mse` (the mean square
    over all targets, in training units) and `r2` (the mean over the targets of 1 - residual / variance), of the loss's
    point predictions; and where its outputs are an interval, `coverage` (the share of the targets that lie in it).
    """

    def __init__(self, task: Task, loss: Loss) -> None:
        self._task = task
        self._loss = loss
        self._interval = loss if isinstance(loss, GroupedLoss) and loss.interval and loss.groups > 1 else None
        self._rows = self._errors = self._covered = 0
        self._residual: np.ndarray | float = 0.0
        self._sum: np.ndarray | float = 0.0
        self._square: np.ndarray | float = 0.0
        self._origin: np.ndarray | None = None

    def add(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        """Host outputs (rows, n) and their targets."""
        self._rows += len(outputs)
        if self._task.kind == "classification":
            self._errors += int(self._task.wrong(outputs, targets).sum())
            return
        d = targets.astype(np.float64)
        if self._interval:
            grouped = self._interval.grouped(outputs)
            self._covered += int(((grouped[:, 0] <= d) & (d <= grouped[:, -1])).sum())
        outputs = self._loss.point_prediction(outputs)
        if self._origin is None:
            self._origin = d[0].copy()  # sums about a value of the data itself do not cancel
        self._residual += ((outputs - d) ** 2).sum(axis=0)
        self._sum += (d - self._origin).sum(axis=0)
        self._square += ((d - self._origin) ** 2).sum(axis=0)

    def result(self) -> dict[str, float | int]:
        """The metrics by name."""
        if self._task.kind == "classification":
            return {"errors": self._errors, "accuracy": 1 - self._errors / self._rows}
        variation = np.asarray(self._square) - np.asarray(self._sum) ** 2 / self._rows
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = np.where(variation > 0, 1 - self._residual / variation, 0.0)
        coverage = {"coverage": self._covered / (self._rows * explained.size)} if self._interval else {}
        return {"mse": float(np.mean(self._residual) / self._rows), "r2": float(explained.mean()), **coverage}
