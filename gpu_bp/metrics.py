"""Metrics: how well a network does on a split, beside its loss.

    batches -> what is gathered of them (sums in float64, or all rows) -> the value

A `Metric` says what it gathers and what its value is of that. Where rows have weights, one of weight w counts as w
rows, and one of weight 0 is not there. To add a metric, write its record into the table `METRICS`; one of a user's own
is a function, called as scikit-learn calls its metrics.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gpu_bp import own, registry
from gpu_bp.errors import UserError, nearest, unknown
from gpu_bp.gathered import Counts, Covered, Errors, Gathered, Outputs, Predictions, Residuals, Rows
from gpu_bp.spec import Loss

if TYPE_CHECKING:
    from gpu_bp.data.task import Task


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: its key in the metrics.
        kind: the kind of task that it is for, None for any.
        higher_is_better: whether a larger value is better; None where nobody has said it.
        gathers: what it gathers of the rows. value: what it is of that.
        n_classes: where a row must have one class: how many there must be, 0 for any number of them.
        per_class: whether the value is one number a class, whose keys are `name_CLASS`.
        weighable: whether rows may have weights.
        of_interval: whether it is for losses whose outputs are the ends of an interval.
    """

    name: str
    kind: Literal["classification", "regression"] | None
    higher_is_better: bool | None
    gathers: type[Gathered]
    value: Callable[[Any], Any]
    n_classes: int | None = None
    per_class: bool = False
    weighable: bool = True
    of_interval: bool = False


def _recall(counts: Counts) -> np.ndarray:
    """NaN for a class that no row is of."""
    return np.where(counts.wanted > 0, counts.right / np.where(counts.wanted > 0, counts.wanted, 1), np.nan)


def _macro_f1(counts: Counts) -> float:
    """The mean over the classes that occur, among the rows or the decisions, of 2 right / (wanted + decided)."""
    both = counts.wanted + counts.decided
    return float((2 * counts.right[both > 0] / both[both > 0]).mean())


def _auc(gathered: Outputs) -> float:
    """How often a row of the second class has a larger score than one of the first, a tie being half of that.

    The score is the output, or of two outputs the second less the first. Exact, by ranks (Mann and Whitney, 1947).
    """
    targets, outputs, weights = gathered.joined()
    scores = outputs if outputs.ndim == 1 else outputs[:, 1] - outputs[:, 0]
    weights = np.ones(len(targets)) if weights is None else weights
    _, rank = np.unique(scores, return_inverse=True)
    first, second = (np.bincount(rank, weights * (targets == k)) for k in (0, 1))
    pairs = first.sum() * second.sum()
    if not pairs or np.isnan(scores).any():
        return math.nan
    return float((second * (np.cumsum(first) - first / 2)).sum() / pairs)


def _r2(sums: Residuals) -> float:
    """The mean over the outputs of 1 - residual / variation, 0 where the targets do not vary."""
    variation = sums.variation
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(variation > 0, 1 - sums.squared / variation, 0.0).mean())


METRICS = {
    metric.name: metric
    for metric in (
        Metric("errors", "classification", False, Errors, lambda errors: errors.wrong),
        Metric("accuracy", "classification", True, Errors, lambda errors: 1 - errors.wrong / errors.n),
        Metric("balanced_accuracy", "classification", True, Counts, lambda counts: np.nanmean(_recall(counts)), 0),
        Metric("macro_f1", "classification", True, Counts, _macro_f1, 0),
        Metric("recall", "classification", True, Counts, _recall, 0, per_class=True),
        Metric("auc", "classification", True, Outputs, _auc, 2),
        Metric("mse", "regression", False, Residuals, lambda sums: np.mean(sums.squared) / sums.n),
        Metric("rmse", "regression", False, Residuals, lambda sums: np.sqrt(sums.squared / sums.n).mean()),
        Metric("mae", "regression", False, Residuals, lambda sums: np.mean(sums.absolute) / sums.n),
        Metric("r2", "regression", True, Residuals, _r2),
        Metric("coverage", "regression", None, Covered, lambda of: of.inside / of.n, of_interval=True),
    )
}
DEFAULTS = {"classification": ("errors", "accuracy"), "regression": ("mse", "r2")}


# metrics of one's own ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """A user's function as the value of a metric: `function(targets, predictions)`, and `sample_weight` if any."""

    name: str
    function: Callable[..., Any]

    def __call__(self, gathered: Predictions) -> float:
        """Raises UserError where the function fails, or gives something else than one number, finite or NaN."""
        targets, predictions, weights = gathered.joined()
        try:
            value = self.function(targets, predictions, **({} if weights is None else {"sample_weight": weights}))
        except Exception as error:
            raise UserError(f"metric {self.name}: {type(error).__name__}: {' '.join(str(error).split())}") from None
        if not isinstance(value, numbers.Real) or math.isinf(value):
            shown = f"{value}" if isinstance(value, numbers.Real) else f"a value of type {type(value).__name__}"
            raise UserError(f"metric {self.name} must give a finite number, or NaN, not {shown}")
        return float(value)

    @property
    def weighable(self) -> bool:
        """Whether the function takes `sample_weight`."""
        try:
            taken = inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # some functions in C do not say
            return False
        return "sample_weight" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())


def find(
    name: str,
    passed: Sequence[own.Piece] = (),
    on: Literal["predictions", "outputs"] | None = None,
    higher_is_better: bool | None = None,
) -> Metric:
    """The metric of that name: of the table, or `module:object`, a function of one's own.

    Args:
        passed: functions of one's own that were passed from Python.
        on: what one's own is given: "predictions" (by default), or the network's "outputs" as they are.
        higher_is_better: whether a larger value of one's own is better.

    Raises:
        UserError: no such metric or function, or the last two with a metric of the package.
    """
    if ":" in name:
        value = Own(name, own.find_function(name, passed))
        key = name.rpartition(":")[2].rpartition(".")[2]
        gathers = Outputs if on == "outputs" else Predictions
        return Metric(key, None, higher_is_better, gathers, value, weighable=value.weighable)
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    if on is not None or higher_is_better is not None:
        raise UserError(f"on and higher_is_better are for functions of one's own; leave them out beside {name}")
    return METRICS[name]


# all metrics of a split ----------------------------------------------------------------------------------------------


class Metrics:
    """The metrics of a split, gathered batch by batch: those that its kind of task always has, and those added.

    Args:
        task, n_targets, weighted: of the source of the rows.
        loss: which says what the outputs are; by default one a target.
        added: metrics beside the usual ones.

    Raises:
        UserError: a metric that does not go with the task or with weights, or two of one name.
    """

    def __init__(
        self,
        task: Task,
        n_targets: int = 1,
        added: Iterable[Metric] = (),
        *,
        weighted: bool = False,
        loss: Loss | None = None,
    ) -> None:
        self._task = task
        self._loss = loss or registry.loss("squared_error")
        self._classes = task.class_names(n_targets)
        self._metrics = [METRICS[name] for name in DEFAULTS[task.kind]]
        if self._loss.gives_interval:
            self._metrics.append(METRICS["coverage"])
        self._of: dict[str, Metric] = {}
        for metric in added:
            if metric not in self._metrics:
                self._check(metric, n_targets, weighted)
                self._metrics.append(metric)
        for metric in self._metrics:
            for key in self._keys(metric):
                if key in self._of or key in ("loss", "rows"):
                    raise UserError(f"train.metrics: two metrics are called {key}; give the function another name")
                self._of[key] = metric
        self._begin()

    @property
    def has_own(self) -> bool:
        """Whether any of them is a function of a user's own."""
        return any(isinstance(metric.value, Own) for metric in self._metrics)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the result."""
        return tuple(self._of)

    def add(self, outputs: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Host outputs (rows, n), their targets, and weights (rows,) if any."""
        if weights is not None:
            there = weights > 0
            outputs, targets, weights = outputs[there], targets[there], weights[there].astype(np.float64)
        if len(outputs):
            rows = Rows(self._task, self._loss, outputs, targets, weights)
            for gathered in self._gathered.values():
                gathered.add(rows)
            self._any = True

    def result(self) -> dict[str, float]:
        """The metrics of the rows since it was last asked, by key; all NaN where there were none, or of weight 0."""
        result: dict[str, float] = {}
        for metric in self._metrics:
            value = metric.value(self._gathered[metric.gathers]) if self._any else math.nan
            keys = self._keys(metric)
            values = np.broadcast_to(value, len(keys)).tolist() if metric.per_class else [value]
            result |= {key: v if isinstance(v, int) else float(v) for key, v in zip(keys, values, strict=True)}
        self._begin()
        return result

    def rises(self, key: str) -> bool:
        """Whether a larger value is better of a key of a line of metrics: of `loss`, `accuracy`, `validation_mse`, ...

        Raises:
            UserError: there is no such key, or it is a function's that does not say `higher_is_better`.
        """
        name = next((key.removeprefix(p) for p in ("train_", "validation_", "test_") if key.startswith(p)), key)
        name = key if key in self._of else name
        if name == "loss":
            return False
        if name not in self._of:
            raise UserError(f"unknown metric {key!r}; {nearest(name, ('loss', *self._of))}")
        rises = self._of[name].higher_is_better
        if rises is None and name in METRICS:
            raise UserError(f"no network is selected by its {name}: neither more of it nor less is better")
        if rises is None:
            raise UserError(
                f"whether a larger {name} is better is not known: name it in train.metrics as a table with "
                "higher_is_better = true, or false"
            )
        return rises

    def _begin(self) -> None:
        self._gathered = {metric.gathers: metric.gathers(len(self._classes)) for metric in self._metrics}
        self._any = False

    def _keys(self, metric: Metric) -> list[str]:
        return [f"{metric.name}_{name}" for name in self._classes] if metric.per_class else [metric.name]

    def _check(self, metric: Metric, n_targets: int, weighted: bool) -> None:
        task, wanted = self._task, metric.n_classes
        if metric.kind not in (None, task.kind):
            known = ", ".join(name for name, other in METRICS.items() if other.kind == task.kind)
            why = f"is for a {metric.kind}, and this is a {task.kind}, which has {known}"
        elif wanted is not None and not self._classes:
            why = f"needs one class a row, and a row has {n_targets} targets here, each of which may be 1; leave it out"
        elif wanted and wanted != len(self._classes):
            why = f"needs {wanted} classes, and there are {len(self._classes)}; leave it out"
        elif metric.of_interval:
            why = "is of the ends of an interval, as loss quantile with two levels or more gives them; leave it out"
        elif weighted and not metric.weighable:
            why = "must take the keyword sample_weight, since the rows have weights"
        else:
            return
        raise UserError(f"train.metrics: {metric.name} {why}")
