"""Every metric of the table is scikit-learn's, with weights and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_metrics import OUTPUTS, TASKS, of, random_rows, suited

from gpu_bp.metrics import METRICS, Metrics, find

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference of these tests")
pytestmark = pytest.mark.reference

# Each called with classes or targets, and decisions or outputs, as (rows,) or (rows, n), and sample_weight.
REFERENCE: dict[str, Callable[..., Any]] = {
    "errors": lambda d, y, **w: sklearn.zero_one_loss(d, y, normalize=False, **w),
    "accuracy": sklearn.accuracy_score,
    "balanced_accuracy": sklearn.balanced_accuracy_score,
    "macro_f1": lambda d, y, **w: sklearn.f1_score(d, y, average="macro", zero_division=0, **w),
    "recall": lambda d, y, **w: sklearn.recall_score(
        d, y, labels=range(max(d.max(), y.max()) + 1), average=None, zero_division=np.nan, **w
    ),
    "auc": lambda d, y, **w: sklearn.roc_auc_score(d, y if y.ndim == 1 else y[:, 1] - y[:, 0], **w),
    "mse": sklearn.mean_squared_error,
    "rmse": sklearn.root_mean_squared_error,
    "mae": sklearn.mean_absolute_error,
    "r2": sklearn.r2_score,
}


def test_every_metric_has_its_reference() -> None:
    assert list(REFERENCE) == [name for name, metric in METRICS.items() if not metric.of_interval]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label", TASKS)
def test_as_scikit_learn(label: str, weighted: bool) -> None:
    task, n_targets = TASKS[label]
    for seed in range(5):
        outputs, targets, weights = random_rows(label, 40, seed)
        given = {"sample_weight": weights} if weighted else {}
        metrics = Metrics(task, n_targets, suited(label), weighted=weighted)
        for rows in np.array_split(np.arange(40), 3):
            metrics.add(outputs[rows], targets[rows], weights[rows] if weighted else None)
        result = metrics.result()
        wanted, decided, raw = of(task, targets), of(task, outputs), OUTPUTS(outputs)
        for metric in suited(label):
            expected = REFERENCE[metric.name](wanted, raw if metric.name == "auc" else decided, **given)
            mine = [value for key, value in result.items() if key == metric.name or key.startswith(f"{metric.name}_")]
            np.testing.assert_allclose(mine, np.ravel(expected), rtol=1e-11, err_msg=metric.name)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("label", "name", "on"),
    [
        ("two classes", "f1_score", "predictions"),
        ("signs", "matthews_corrcoef", "predictions"),
        ("three classes", "cohen_kappa_score", "predictions"),
        ("three classes", "log_loss", "outputs"),
        ("0 and 1", "brier_score_loss", "outputs"),
        ("0 and 1", "average_precision_score", "outputs"),
        ("many 0 and 1", "hamming_loss", "predictions"),
        ("one target", "d2_absolute_error_score", "predictions"),
        ("two targets", "mean_squared_error", "outputs"),
    ],
)
def test_functions_of_scikit_learn_are_called_as_they_are(label: str, name: str, on: Any, weighted: bool) -> None:
    """Named in a config, on decisions and on outputs."""
    task, n_targets = TASKS[label]
    outputs, targets, weights = random_rows(label, 40, 1)
    if name == "log_loss":  # of a softmax
        outputs = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    given = {"sample_weight": weights} if weighted else {}
    metrics = Metrics(task, n_targets, [find(f"sklearn.metrics:{name}", on=on)], weighted=weighted)
    metrics.add(outputs, targets, weights if weighted else None)
    predictions = OUTPUTS(outputs) if on == "outputs" else of(task, outputs)
    expected = getattr(sklearn, name)(of(task, targets), predictions, **given)
    assert metrics.result()[name] == pytest.approx(expected, rel=1e-12)
