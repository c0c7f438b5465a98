"""What a network is asked to do with its outputs: `Task`. How well it does is said by `gpu_bp.metrics`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

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
        """Which rows have any output wrong: (rows,) bool, for outputs (rows, n) and their targets; a NaN is."""
        if self.decision == "argmax":
            return np.asarray((self.numbers(outputs) != self.numbers(targets)) | np.isnan(outputs).any(axis=1))
        if self.decision == "sign":
            return np.asarray((np.sign(outputs) != np.sign(targets)).any(axis=1))
        return np.asarray((~(np.abs(outputs - targets) < 0.5)).any(axis=1))

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        """The classes decided: (rows,) of class names or numbers for argmax, else (rows, n) of -1/1 or 0/1."""
        if self.decision == "argmax":
            index = self.numbers(outputs)
            return np.array(self.classes)[index] if self.classes else index
        positive = self._positive(outputs).astype(int)
        return 2 * positive - 1 if self.decision == "sign" else positive

    def numbers(self, values: np.ndarray) -> np.ndarray:
        """The classes that outputs decide, or that targets name, as numbers from 0 on.

        (rows,) of int64; (rows, n) of 0 and 1 where each of several outputs is a class of its own.
        """
        if self.decision == "argmax":
            return np.asarray(values if values.ndim == 1 else values.argmax(axis=1), np.int64)
        positive = self._positive(values).astype(np.int64)
        return positive[:, 0] if positive.shape[1] == 1 else positive

    def class_names(self, n_targets: int) -> tuple[str, ...]:
        """The names of the classes, or their numbers where they have none, as text; none where a row has not one."""
        if self.decision == "none" or (self.decision != "argmax" and n_targets > 1):
            return ()
        numbers = {"sign": ("-1", "1"), "half": ("0", "1")}
        return self.classes or numbers.get(self.decision) or tuple(map(str, range(n_targets)))

    def _positive(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values > 0 if self.decision == "sign" else values >= 0.5)
