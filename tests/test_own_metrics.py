"""Metrics of a user's own: functions that a config names or Python passes, and which way metrics are better."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from test_metrics import LEVELS, TASKS, bias, random_rows

import gpu_bp
from gpu_bp import Config, Task, UserError, dump_config, parse_config
from gpu_bp.cli import main
from gpu_bp.metrics import METRICS, Metrics, find

Tiny = Callable[..., dict[str, Any]]


# one's own -----------------------------------------------------------------------------------------------------------

# Functions as a user would write them; the module notes each time that it is run.
MINE = """
import numpy as np

with open("ran.txt", "a") as file:
    file.write("x")

def hits(y_true, y_pred):
    return np.mean(y_true == y_pred)

def margin(y_true, y_score):
    return np.mean(np.where(y_true == 1, y_score, -y_score))

def weighted(y_true, y_pred, sample_weight):
    return np.average(y_true == y_pred, weights=sample_weight)

def several(y_true, y_pred):
    return np.zeros(2)

def infinite(y_true, y_pred):
    return -np.inf

def failing(y_true, y_pred):
    raise ValueError("two" + chr(10) + "lines")

def writing(y_true, y_pred):
    y_true[:] = 0

def nothing(y_true, y_pred):
    return float("nan")

def accuracy(y_true, y_pred):
    return 0.0

class Scores:
    @staticmethod
    def low(y_true, y_pred):
        return -1

constant = 3
"""


@pytest.fixture
def mine(in_tmp: Path) -> Iterator[Path]:
    """A working folder with mine.py in it; what was imported from it is forgotten afterwards."""
    (in_tmp / "mine.py").write_text(MINE)
    yield in_tmp
    for name in [name for name in sys.modules if name == "mine" or name.startswith(str(in_tmp))]:
        del sys.modules[name]


OWN = ["mine.py:hits", {"kind": "mine:margin", "on": "outputs", "higher_is_better": True}, "mine:Scores.low"]


def test_a_function_in_a_config(mine: Path, tiny_config: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """It is given classes by number, or outputs; and a run that names one is read with trust alone."""
    raw = tiny_config(train={"metrics": OWN})
    jsonschema.validate(raw, Config.model_json_schema())
    config = parse_config(raw)
    assert config.train.metrics[0].kind == f"{mine}/mine.py:hits"
    assert parse_config(tomllib.loads(dump_config(config))) == config
    result = gpu_bp.train(raw, backend="numpy", run="run", pictures=False)
    dataset = gpu_bp.load_data(config)
    for name in ("train", "validation", "test"):
        summary, split = result.summary[name], dataset.rows(name)
        outputs = result.model.network.predict(split.inputs.astype(np.float32)).astype(float)
        assert summary["hits"] == summary["accuracy"]
        assert summary["margin"] == pytest.approx((split.targets * outputs).mean(), rel=1e-9)
        assert summary["low"] == -1
    assert "validation_margin" in json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])

    sys.modules.pop("mine")
    Path("ran.txt").unlink()
    with pytest.raises(UserError, match=r"config\.toml names code, .*mine.py:hits, .* trust_code=True"):
        gpu_bp.evaluate("run", backend="numpy")
    with pytest.raises(SystemExit) as exited:
        main(["evaluate", "run", "--backend", "numpy"])
    assert exited.value.code == 2
    assert "where you trust it, say --trust-code" in capsys.readouterr().err
    assert not Path("ran.txt").exists()
    evaluated = gpu_bp.evaluate("run", backend="numpy", trust_code=True)
    assert evaluated == {name: result.summary[name] for name in evaluated}
    with pytest.raises(SystemExit) as exited:
        main(["evaluate", "run", "--backend", "numpy", "--trust-code"])
    assert exited.value.code == 0
    assert "hits" in capsys.readouterr().out


def test_functions_from_python(mine: Path, tiny_config: Tiny) -> None:
    """One that a module holds is named by it; another has to be passed again."""
    hits: Any = gpu_bp.own.load("mine:hits")
    raw = tiny_config(train={"metrics": [hits, {"kind": lambda d, y: 7, "higher_is_better": False}]})
    config = parse_config(raw)
    assert [section.kind for section in config.train.metrics] == ["mine:hits", "own:lambda"]
    assert parse_config(tiny_config(train={"metrics": partial(bias)})).train.metrics[0].kind == "own:partial"
    made = gpu_bp.train(raw, backend="numpy", run="run", pictures=False)
    assert made.summary["test"]["lambda"] == 7
    passed: list[Any] = [hits, lambda d, y: 8]
    assert gpu_bp.evaluate("run", backend="numpy", own=passed)["test"]["lambda"] == 8
    for own, trust, message in (
        (passed[:0], False, r"names code, mine:hits"),
        (passed[:0], True, r"train.metrics.1: 'own:lambda' is a piece .* pass it again, own=\[lambda\]"),
        (passed[1:], False, r"names code, mine:hits"),
    ):
        with pytest.raises(UserError, match=message):
            gpu_bp.evaluate("run", backend="numpy", own=own, trust_code=trust)
    assert (
        gpu_bp.evaluate("run", backend="numpy", own=passed[1:], trust_code=True)["test"]["hits"]
        == (made.summary["test"]["accuracy"])
    )


@pytest.mark.parametrize(
    ("metrics", "sections", "message"),
    [
        (["acuracy"], {}, "config: train.metrics.0: unknown metric 'acuracy'; did you mean accuracy? known: errors, "),
        ([3], {}, "config: train.metrics.0"),
        ([{"kind": "auc", "on": "outputs"}], {}, "on and higher_is_better are for functions of one's own; leave them"),
        ([{"kind": "mine:hits", "on": "ouputs"}], {}, "train.metrics.0.on: unknown 'ouputs'; did you mean outputs?"),
        ([{"kind": "mine:hits", "onn": 1}], {}, "unknown key train.metrics.0.onn; did you mean train.metrics.0.on?"),
        (["mine:hit"], {}, "train.metrics.0: mine has no object 'hit'; did you mean hits?"),
        (["mine:constant"], {}, "train.metrics.0: mine:constant is an int, a function is needed"),
        (["mse"], {}, "train.metrics: mse is for a regression, and this is a classification, which has errors, accur"),
        (
            ["auc"],
            {"data": {"kind": "linear"}},
            "auc is for a classification, and this is a regression, which has mse, rmse, mae, r2",
        ),
        (
            ["macro_f1"],
            {"data": {"kind": "encoder"}},
            "macro_f1 needs one class a row, and a row has 8 targets here, each of which may be 1; leave it out",
        ),
        (
            ["auc"],
            {"data": {"kind": "gaussian-blobs", "n_inputs": 3, "n_classes": 3}, "loss": {"kind": "cross_entropy"}},
            "auc needs 2 classes, and there are 3; leave it out",
        ),
        (["mine:hits", "mine.py:hits"], {}, "two metrics are called hits; give the function another name"),
        (["mine:accuracy"], {}, "two metrics are called accuracy; give the function another name"),
        (["mine:several"], {}, "metric mine:several must give a finite number, or NaN, not a value of type ndarray"),
        (["mine:infinite"], {}, "metric mine:infinite must give a finite number, or NaN, not -inf"),
        (["mine:failing"], {}, "metric mine:failing: ValueError: two lines"),
        (["mine:writing"], {}, "metric mine:writing: ValueError: assignment destination is read-only"),
    ],
)
def test_metrics_that_are_refused(
    mine: Path, tiny_config: Tiny, metrics: Any, sections: dict[str, Any], message: str
) -> None:
    """In one line, before the training: there is no run folder yet."""
    raw = {**tiny_config(train={"metrics": metrics}), **sections}
    with pytest.raises(UserError) as caught:
        gpu_bp.train(raw, backend="numpy", run="run", pictures=False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("run").exists()


def test_own_functions_and_weights(mine: Path) -> None:
    """One that does not take sample_weight is refused where rows have weights; NaN is a value."""
    task, n = TASKS["two classes"]
    outputs, targets, weights = random_rows("two classes", 20, 0)
    with pytest.raises(UserError, match="metrics: hits must take the keyword sample_weight, since the rows have wei"):
        Metrics(task, n, [find("mine:hits")], weighted=True)
    metrics = Metrics(task, n, [find("mine:weighted")], weighted=True)
    metrics.add(outputs, targets, weights)
    result = metrics.result()
    assert result["weighted"] == pytest.approx(result["accuracy"], rel=1e-12)
    metrics = Metrics(task, n, [find("mine:nothing")])
    metrics.add(outputs, targets)
    assert math.isnan(metrics.result()["nothing"])


# which way is better -------------------------------------------------------------------------------------------------


def test_which_metrics_rise(mine: Path) -> None:
    added = [find("recall"), find("mine:hits", higher_is_better=True), find("mine:Scores.low", higher_is_better=False)]
    metrics = Metrics(*TASKS["three classes"], [*added, find("mine:nothing")])
    assert metrics.keys == (
        *("errors", "accuracy", "recall_ant", "recall_cat", "recall_dog", "hits", "low", "nothing"),
    )
    for key, rises in {"loss": False, "errors": False, "accuracy": True, "recall_cat": True, "hits": True}.items():
        assert metrics.rises(key) is rises
        assert metrics.rises(f"validation_{key}") is rises
        assert metrics.rises(f"train_{key}") is rises
    assert not metrics.rises("validation_low")
    with pytest.raises(UserError, match="whether a larger nothing is better is not known: name it in train.metrics as"):
        metrics.rises("validation_nothing")
    for key in ("validation_recall", "acuracy", "recall_cow", "mse"):
        with pytest.raises(UserError, match=f"unknown metric '{key}'; .*known: loss, errors, accuracy, recall_ant"):
            metrics.rises(key)
    lower = [name for name, metric in METRICS.items() if metric.higher_is_better is False]
    assert lower == ["errors", "mse", "rmse", "mae"]
    assert [name for name, metric in METRICS.items() if metric.higher_is_better is None] == ["coverage"]
    with pytest.raises(UserError, match="no network is selected by its coverage"):
        Metrics(Task("none"), loss=LEVELS).rises("validation_coverage")
