"""Metrics: worked by hand, weights as repeated rows, and functions of one's own from a config to a run and back.

That every metric of the table is scikit-learn's is tested in test_reference_metrics.py.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_bp
from gpu_bp import Batch, Config, Objective, Source, Task, UserError, dump_config, parse_config, registry
from gpu_bp.backends import Backend
from gpu_bp.build import build_network
from gpu_bp.evaluation import EVALUATION_ROWS, Evaluator
from gpu_bp.metrics import METRICS, Metric, Metrics, find
from gpu_bp.progress import describe

Tiny = Callable[..., dict[str, Any]]

# Tasks with how many targets a row has, or how many classes there are.
TASKS: dict[str, tuple[Task, int]] = {
    "three classes": (Task("argmax", ("ant", "cat", "dog")), 3),
    "one-hot rows": (Task("argmax"), 3),
    "two classes": (Task("argmax"), 2),
    "signs": (Task("sign", ("left", "right")), 1),
    "0 and 1": (Task("half"), 1),
    "many 0 and 1": (Task("half"), 3),
    "one target": (Task("none"), 1),
    "two targets": (Task("none"), 2),
}


def random_rows(label: str, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs, some of them equal, with targets, and weights, some of them 0. Every class occurs."""
    task, n = TASKS[label]
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 8, rows) / 4
    if task.decision == "none":
        targets = rng.standard_normal((rows, n)) + 3
        return targets + rng.standard_normal((rows, n)), targets, weights
    if task.decision == "argmax":
        numbers = rng.permutation(np.arange(rows) % n)
        outputs = np.eye(n)[numbers] * 0.3 + rng.integers(1, 10, (rows, n)) / 10
        targets = np.where(np.eye(n)[numbers] == 1, 0.8, 0.1) if label == "one-hot rows" else numbers
        weights[:9] = 1  # so that every class weighs something
        return outputs, targets, weights
    targets = (rng.permutation(np.arange(rows * n) % 2)).reshape(rows, n) * 1.0
    outputs = np.clip(targets * 0.4 + rng.integers(0, 6, (rows, n)) / 10, 0, 0.9) + 0.05  # never just between the two
    return (outputs, targets, weights) if task.decision == "half" else (2 * outputs - 1, 2 * targets - 1, weights)


def of(task: Task, values: np.ndarray) -> np.ndarray:
    """Classes as numbers by the task's rule written out, or the numbers of a regression; a single column as (rows,)."""
    if task.decision == "argmax":
        return values if values.ndim == 1 else values.argmax(axis=1)
    rule = {"none": lambda v: v, "sign": lambda v: (v > 0).astype(int), "half": lambda v: (v >= 0.5).astype(int)}
    return OUTPUTS(rule[task.decision](values))


def OUTPUTS(outputs: np.ndarray) -> np.ndarray:
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs


def suited(label: str) -> list[Metric]:
    """The metrics of the table that go with a task."""
    task, n = TASKS[label]
    n_classes = len(task.class_names(n))
    return [
        metric
        for metric in METRICS.values()
        if metric.kind == task.kind
        and not metric.of_interval
        and (metric.n_classes is None or (n_classes > 0 and metric.n_classes in (0, n_classes)))
    ]


def bias(targets: Any, predictions: Any, sample_weight: Any = None) -> float:
    """A function of a user's."""
    return float(np.average(predictions - targets, weights=sample_weight, axis=0).sum())


BIAS = find("own:bias", [bias])


def measure(label: str, outputs: Any, targets: Any, weights: Any = None, sizes: Any = ()) -> dict[str, float]:
    """All metrics of a task, and one's own on predictions, of rows in batches of such sizes."""
    task, n = TASKS[label]
    metrics = Metrics(task, n, [*suited(label), BIAS], weighted=weights is not None)
    start = 0
    for size in [*sizes, len(targets)]:
        part = [None if array is None else array[start : start + size].copy() for array in (outputs, targets, weights)]
        metrics.add(*part)
        for array in part:  # as the next batch does
            if array is not None:
                array.fill(0)
        start += size
    return metrics.result()


def agree(a: dict[str, float], b: dict[str, float], tolerance: float = 1e-12) -> None:
    assert list(a) == list(b)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=tolerance, atol=tolerance)


# values ----------------------------------------------------------------------------------------------------------


def test_classes_by_hand() -> None:
    """ant, ant, cat, cat, dog are taken for ant, cat, cat, cat, ant."""
    metrics = Metrics(*TASKS["three classes"], [METRICS[name] for name in ("recall", "balanced_accuracy", "macro_f1")])
    metrics.add(np.eye(3)[[0, 1, 1, 1, 0]], np.array([0, 0, 1, 1, 2]))
    assert metrics.result() == {
        "errors": 2,
        "accuracy": 0.6,
        "recall_ant": 0.5,
        "recall_cat": 1.0,
        "recall_dog": 0.0,
        "balanced_accuracy": 0.5,
        "macro_f1": pytest.approx((0.5 + 0.8 + 0) / 3),
    }
    metrics.add(np.eye(3)[[0, 1, 1]], np.array([0, 0, 1]))  # no dog, and none is seen
    assert metrics.result()["macro_f1"] == pytest.approx(2 / 3)


def test_numbers_by_hand() -> None:
    """Residuals 3, -1 and 1, 1 of targets 0, 2 and 5, 5; then the first column weighted 1 to 3."""
    d, y = np.array([[0.0, 5.0], [2.0, 5.0]]), np.array([[3.0, 6.0], [1.0, 6.0]])
    metrics = Metrics(Task("none"), 2, suited("two targets"))
    metrics.add(y, d)
    rmse = (math.sqrt(5) + 1) / 2
    assert metrics.result() == pytest.approx({"mse": 3, "r2": (1 - 10 / 2 + 0) / 2, "rmse": rmse, "mae": 1.5})
    metrics = Metrics(Task("none"), 1, suited("one target"), weighted=True)
    metrics.add(y[:, :1], d[:, :1], np.array([1.0, 3.0]))
    assert metrics.result() == pytest.approx({"mse": 3, "r2": 1 - 12 / 3, "rmse": math.sqrt(3), "mae": 1.5})


@settings(max_examples=40)
@given(st.integers(0, 99), st.booleans())
def test_auc_by_pairs(seed: int, weighted: bool) -> None:
    """Every pair of a row of each class looked at, and the two-output form of the same."""
    outputs, targets, weights = random_rows("0 and 1", 12, seed)
    y, d, w = outputs[:, 0], targets[:, 0], weights if weighted else np.ones(12)
    won = all_pairs = 0.0
    for i in np.flatnonzero(d == 1):
        for j in np.flatnonzero(d == 0):
            won += w[i] * w[j] * (1.0 if y[i] > y[j] else 0.5 if y[i] == y[j] else 0.0)
            all_pairs += w[i] * w[j]
    some = weights if weighted else None
    auc = measure("0 and 1", outputs, targets, some)["auc"]
    np.testing.assert_allclose(auc, won / all_pairs if all_pairs else np.nan, rtol=1e-12)
    two = measure("two classes", np.hstack([-outputs, outputs]), d.astype(int), some)["auc"]
    np.testing.assert_allclose(two, auc, rtol=1e-12)


def test_what_has_no_value_is_nan() -> None:
    """A class that does not occur, an auc of one class or of no numbers, and rows that all weigh 0."""
    metrics = Metrics(*TASKS["three classes"], [METRICS["recall"], METRICS["balanced_accuracy"]])
    metrics.add(np.eye(3)[[0, 2]], np.array([0, 1]))
    result = metrics.result()
    assert math.isnan(result.pop("recall_dog"))
    assert result == {"errors": 1, "accuracy": 0.5, "recall_ant": 1.0, "recall_cat": 0.0, "balanced_accuracy": 0.5}
    for y, d in (([[0.2], [0.7]], [[1.0], [1.0]]), ([[math.nan], [0.7]], [[0.0], [1.0]])):
        assert math.isnan(measure("0 and 1", np.array(y), np.array(d))["auc"])
    for label in TASKS:
        outputs, targets, _ = random_rows(label, 9, 0)
        assert all(map(math.isnan, measure(label, outputs, targets, np.zeros(9)).values()))


@settings(max_examples=60)
@given(st.sampled_from(list(TASKS)), st.integers(9, 40), st.integers(0, 99), st.lists(st.integers(0, 12), max_size=5))
def test_batches_of_any_size_give_the_same(label: str, rows: int, seed: int, sizes: list[int]) -> None:
    """Those that are asked twice too; and counts are whole numbers, to the bit."""
    outputs, targets, weights = random_rows(label, rows, seed)
    for some in (None, weights):
        if some is None or some.any():
            agree(measure(label, outputs, targets, some, sizes), measure(label, outputs, targets, some))
    result = measure(label, outputs, targets)
    assert all(isinstance(value, int) == (key == "errors") for key, value in result.items())


@settings(max_examples=60)
@given(st.sampled_from(list(TASKS)), st.integers(9, 30), st.integers(0, 99), st.lists(st.integers(0, 12), max_size=3))
def test_weights_are_repeated_rows(label: str, rows: int, seed: int, sizes: list[int]) -> None:
    """A row of weight w counts as w rows, and whatever stands in one of weight 0 is not looked at."""
    outputs, targets, _ = random_rows(label, rows, seed)
    times = np.random.default_rng(seed).integers(0, 4, rows)
    times[0] = 1
    repeated = measure(label, np.repeat(outputs, times, axis=0), np.repeat(targets, times, axis=0))
    outputs[times == 0] = np.nan
    agree(measure(label, outputs, targets, times.astype(np.float32), sizes), repeated)
    scaled = measure(label, outputs, targets, times / 7)
    agree({**scaled, "errors": 0}, {**repeated, "errors": 0})


def test_every_call_begins_anew() -> None:
    task, n = TASKS["two classes"]
    metrics = Metrics(task, n, suited("two classes"))
    results = []
    for seed in (1, 2, 1):
        metrics.add(*random_rows("two classes", 20, seed)[:2])
        results.append(metrics.result())
    assert results[0] == results[2] != results[1]


def test_decisions_as_numbers() -> None:
    """Of outputs and of targets, in every coding, as `decide` names them."""
    for label, (task, n) in TASKS.items():
        if task.kind == "classification":
            outputs, targets, _ = random_rows(label, 20, 3)
            for values in (outputs, targets):
                numbers = task.numbers(values)
                assert numbers.dtype == np.int64
                np.testing.assert_array_equal(numbers, of(task, values))
            decided, names = task.decide(outputs), task.class_names(n)
            if names:
                wanted = [str(name) for name in decided.ravel()]
                numbers = task.numbers(outputs)
                named = Task(task.decision).class_names(n) if task.decision == "sign" else names
                assert [named[k] for k in numbers] == wanted
            else:
                np.testing.assert_array_equal(task.numbers(outputs), decided)


# on a network ------------------------------------------------------------------------------------------------------


class Clouds(Source):
    """Three classes about three points; row i weighs i mod 5."""

    def __init__(self, n_rows: int, *, weighted: bool = True) -> None:
        super().__init__(n_rows, 2, 3, Task("argmax"), indexed=True, weighted=weighted)

    def fill(self, rows: Any, batch: Batch) -> None:
        batch.targets[:] = rows % 3
        batch.inputs[:] = np.sin(np.multiply.outer(rows, [1.0, 2.0])) + np.stack([rows % 3, rows % 2], axis=1)
        if batch.weights is not None:
            batch.weights[:] = rows % 5


@pytest.mark.parametrize("weighted", [False, True])
def test_an_evaluator_gives_them(backend: Backend, tiny_config: Tiny, weighted: bool) -> None:
    """On all rows, in several batches, with the rows' weights."""
    rows = EVALUATION_ROWS + 99
    raw = {**tiny_config(loss={"kind": "cross_entropy"}), "data": {"kind": "own"}}
    source = Clouds(rows, weighted=weighted)
    dataset = gpu_bp.data.own_data({"train": source}, gpu_bp.registry.loss("cross_entropy"), backend)
    config = parse_config(raw)
    network = build_network(config, dataset, backend)
    names = ["recall", "balanced_accuracy", "macro_f1"]
    share = find("own:lambda", [lambda d, y, sample_weight=None: np.average(d == y, weights=sample_weight)])
    objective = Objective(network, config.loss.record(), EVALUATION_ROWS, backward=False)
    evaluator = Evaluator(objective, source, None, [*map(find, names), share])
    split = dataset.rows("train")
    decided = network.predict(split.inputs.astype(np.float32)).argmax(axis=1)
    weights = np.ones(rows) if split.weights is None else split.weights
    table = np.zeros((3, 3))
    np.add.at(table, (split.targets, decided), weights)
    recall = table.diagonal() / table.sum(axis=1)
    for _ in range(2):
        result = evaluator()
        assert result["errors"] == table.sum() - table.trace()
        assert result["accuracy"] == pytest.approx(table.trace() / table.sum(), rel=1e-12)
        assert result["lambda"] == pytest.approx(table.trace() / table.sum(), rel=1e-12)
        assert [result[f"recall_{k}"] for k in range(3)] == pytest.approx(recall.tolist(), rel=1e-12)
        assert result["balanced_accuracy"] == pytest.approx(recall.mean(), rel=1e-12)
        f1 = 2 * table.diagonal() / (table.sum(axis=0) + table.sum(axis=1))
        assert result["macro_f1"] == pytest.approx(f1.mean(), rel=1e-12)


def test_metrics_in_a_config(in_tmp: Path, tiny_config: Tiny) -> None:
    """In the lines, the summary, and again from the run; those of the task stand first, and once."""
    raw = tiny_config(train={"metrics": ["auc", "accuracy", {"kind": "recall"}]})
    jsonschema.validate(raw, Config.model_json_schema())
    config = parse_config(raw)
    assert parse_config(tomllib.loads(dump_config(config))) == config
    result = gpu_bp.train(config, backend="numpy", run="run", pictures=False)
    keys = ["loss", "errors", "accuracy", "auc", "recall_lower", "recall_upper"]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [key for key in lines[-1] if key.startswith("validation_")] == [f"validation_{key}" for key in keys]
    evaluated = gpu_bp.evaluate("run", backend="numpy")
    for name in ("train", "validation", "test"):
        assert list(result.summary[name]) == ["rows", *keys]
        assert evaluated[name] == result.summary[name]


def test_one_metric_stands_for_a_list_of_one(tiny_config: Tiny) -> None:
    config = parse_config(tiny_config(train={"metrics": "auc"}))
    assert config.train.metric_records() == [METRICS["auc"]]
    assert parse_config(tiny_config()).train.metric_records() == []


# losses of several outputs a target ----------------------------------------------------------------------------------

LEVELS = registry.loss("quantile", levels=[0.1, 0.6, 0.9])


@given(st.integers(0, 99), st.integers(1, 8))
def test_coverage(seed: int, size: int) -> None:
    """The weighted share of the targets within the first and the last level; other metrics are of the middle one."""
    rng = np.random.default_rng(seed)
    d, y, weights = rng.standard_normal((8, 2)), rng.standard_normal((8, 6)), rng.integers(0, 4, 8) / 2
    weights[0] = 1
    metrics = Metrics(Task("none"), 2, [METRICS["mae"], find("own:bias", [bias])], weighted=True, loss=LEVELS)
    for start in range(0, 8, size):
        metrics.add(*(array[start : start + size] for array in (y, d, weights)))
    inside = (y[:, :2] <= d) & (d <= y[:, 4:])
    result = metrics.result()
    assert result["coverage"] == pytest.approx(np.average(inside, axis=0, weights=weights).mean())
    assert result["mae"] == pytest.approx(np.average(abs(y[:, 2:4] - d), axis=0, weights=weights).mean())
    assert result["bias"] == pytest.approx(np.average(y[:, 2:4] - d, axis=0, weights=weights).sum())
    with pytest.raises(UserError, match="train.metrics: coverage is of the ends of an interval"):
        Metrics(Task("none"), 2, [METRICS["coverage"]])


@given(st.integers(2, 60), st.integers(1, 3), st.floats(-1e6, 1e6))
def test_regression_metrics(rows: int, outputs: int, offset: float) -> None:
    """Against their definitions, whatever the batches; far from zero too."""
    rng = np.random.default_rng(rows)
    d = rng.standard_normal((rows, outputs)) + offset
    y = d + rng.standard_normal((rows, outputs)) * 0.1
    metrics = Metrics(Task("none"), loss=registry.loss("squared_error"))
    for start in range(0, rows, 7):
        metrics.add(y[start : start + 7], d[start : start + 7])
    result = metrics.result()
    assert result["mse"] == pytest.approx(((y - d) ** 2).mean(), rel=1e-9)
    r2 = 1 - ((y - d) ** 2).sum(axis=0) / ((d - d.mean(axis=0)) ** 2).sum(axis=0)
    assert result["r2"] == pytest.approx(r2.mean(), rel=1e-6, abs=1e-9)


def test_metrics_of_several_outputs_a_target() -> None:
    """Those of the level nearest to 0.5 and of the mean; the share of the targets within the levels, ends included."""
    d = np.array([[0.0, 10.0], [1.0, 20.0]])
    y = np.array([[0.0, 11.0, 0.5, 12.0, 1.0, 13.0], [-1.0, 19.0, 1.0, 20.0, 0.5, 21.0]])
    metrics = Metrics(Task("none"), loss=registry.loss("quantile", levels=[0.1, 0.6, 0.9]))
    for row in (0, 1):
        metrics.add(y[row : row + 1], d[row : row + 1])
    assert metrics.result() == {"mse": (0.25 + 4) / 4, "r2": pytest.approx((0.5 + 0.92) / 2), "coverage": 0.5}
    gaussian, one = (Metrics(Task("none"), loss=registry.loss(name)) for name in ("gaussian_nll", "quantile"))
    gaussian.add(y[:, 2:], d)
    one.add(y[:, 2:4], d)
    assert gaussian.result() == one.result() == {"mse": (0.25 + 4) / 4, "r2": pytest.approx((0.5 + 0.92) / 2)}


def test_progress_shows_the_usual_metrics_and_the_selected_one() -> None:
    line = {
        "epoch": 2,
        "step": 9,
        "train_loss": 0.5,
        "validation_loss": 0.25,
        "validation_r2": 0.75,
        "validation_mae": 1.0,
    }
    usual = "epoch 2  step 9  loss 0.5  validation loss 0.25  validation r2 0.75"
    assert describe(line) == describe(line, "train_loss") == describe(line, "validation_loss") == usual
    assert describe(line, "validation_mae") == f"{usual}  validation mae 1"
