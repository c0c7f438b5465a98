"""How often classes occur, and what their rows weigh: for every coding of classes, against counts by hand."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_bp import Dataset, UserError, dump_config, load_data, parse_config
from gpu_bp.data import classes
from gpu_bp.data.classes import class_counts, class_names, class_weights

Tiny = Callable[..., dict[str, Any]]
LABELS = ["cat"] * 5 + ["dog"] * 2 + ["ant"] * 3 + ["dog", "dog"]  # the last two are no training rows
ROW_WEIGHTS = [1, 0.5, 0, 2, 1, 4, 4, 0.25, 0.25, 0.5, 9, 9]


def animals(tiny_config: Tiny, folder: Path, loss: str, labels: list[str] = LABELS, weighted: bool = False) -> Dataset:
    """A table of classes: ten training rows and two others."""
    rows = zip(range(12), ROW_WEIGHTS, labels, strict=True)
    (folder / "t.csv").write_text("x,w,animal\n" + "".join(f"{x},{w},{label}\n" for x, w, label in rows))
    section = {"kind": "table", "path": str(folder / "t.csv"), "target_columns": ["animal"], "test_rows": 2}
    section |= {"categorical_columns": ["animal"], **({"weight_column": "w"} if weighted else {"drop_columns": ["w"]})}
    return load_data(parse_config({**tiny_config(loss={"kind": loss}), "data": section}))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error", "squared_hinge"])
def test_counts_of_three_classes(tiny_config: Tiny, tmp_path: Path, loss: str) -> None:
    """As class indices, and as rows of 0 and 1, or -1 and 1; those of the training rows alone."""
    dataset = animals(tiny_config, tmp_path, loss)
    assert class_names(dataset) == ("ant", "cat", "dog")
    assert class_counts(dataset).tolist() == [3, 5, 2]
    np.testing.assert_allclose(class_weights("balanced", dataset), [10 / 9, 10 / 15, 10 / 6])
    weighted = animals(tiny_config, tmp_path, loss, weighted=True)
    assert class_counts(weighted).tolist() == [1, 4.5, 8]
    np.testing.assert_allclose(class_weights("balanced", weighted), [13.5 / 3, 13.5 / 13.5, 13.5 / 24])


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "squared_error", "squared_hinge"])
def test_counts_of_two_classes(tiny_config: Tiny, tmp_path: Path, loss: str) -> None:
    """As class indices, as 0 and 1, and as -1 and 1."""
    two = ["dog" if label == "ant" else label for label in LABELS]
    for weighted, counts in ((False, [5, 5]), (True, [4.5, 9])):
        dataset = animals(tiny_config, tmp_path, loss, two, weighted)
        assert class_names(dataset) == ("cat", "dog")
        assert class_counts(dataset).tolist() == counts
        np.testing.assert_allclose(class_weights("balanced", dataset), sum(counts) / (2 * np.array(counts)))
        assert class_weights({"dog": 3}, dataset).tolist() == [1, 3]


def arrays(tiny_config: Tiny, folder: Path, targets: Any, loss: str, **keys: Any) -> Dataset:
    np.save(folder / "x.npy", np.arange(len(targets)) * 1.0)
    np.save(folder / "d.npy", np.asarray(targets))
    section = {"kind": "arrays", "inputs": str(folder / "x.npy"), "targets": str(folder / "d.npy"), **keys}
    return load_data(parse_config({**tiny_config(loss={"kind": loss}), "data": section}))


@pytest.mark.parametrize(
    ("targets", "loss", "names", "counts"),
    [
        ([0, 2, 2, 1, 2], "cross_entropy", ("0", "1", "2"), [1, 1, 3]),
        ([[1, 0, 0], [0, 0, 1], [0, 0, 1]], "cross_entropy", ("0", "1", "2"), [1, 0, 2]),
        ([-1.0, 1.0, 1.0], "squared_hinge", ("-1", "1"), [1, 2]),
        ([[-1, 1], [1, -1], [-1, 1]], "squared_hinge", ("0", "1"), [1, 2]),
        ([0.0, 1.0, 1.0, 1.0], "binary_cross_entropy", ("0", "1"), [1, 3]),
        ([0.1, 0.9, 0.8, 0.4], "binary_cross_entropy", ("0", "1"), [2, 2]),
    ],
)
def test_classes_without_names(
    tiny_config: Tiny, tmp_path: Path, targets: Any, loss: str, names: tuple[str, ...], counts: list[int]
) -> None:
    """They are called by their numbers."""
    dataset = arrays(tiny_config, tmp_path, targets, loss)
    assert class_names(dataset) == names
    assert class_counts(dataset).tolist() == counts
    assert class_weights({names[-1]: 2.5, names[0]: 0}, dataset).tolist() == [0, *[1] * (len(names) - 2), 2.5]


def test_the_first_rows_are_counted(tiny_config: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of generated rows too, and block by block."""
    data = {"kind": "double-moon", "rows": 5000, "scaling": "none", "validation_rows": 0, "test_rows": 0}
    dataset = load_data(parse_config({**tiny_config(), "data": data}))
    assert class_counts(dataset).tolist() == [2500, 2500]
    monkeypatch.setattr(classes, "FITTED_ROWS", 3001)
    monkeypatch.setattr("gpu_bp.data.source.READ_NUMBERS", 1)
    assert class_counts(dataset).tolist() == [1500, 1501]
    monkeypatch.setattr(classes, "FITTED_ROWS", 1)  # even rows are of the upper ring
    with pytest.raises(
        UserError, match="'balanced': class 'lower' does not occur among the first 1 training rows; name"
    ):
        class_weights("balanced", dataset)


@pytest.mark.parametrize(
    ("targets", "loss", "setting", "message"),
    [
        ([0.5, 1.5], "squared_error", "balanced", "needs a classification, and this is a regression; leave it out"),
        ([[1, 1], [0, 1]], "binary_cross_entropy", "balanced", "needs one class a row, and a row has 2 targets here"),
        ([0, 2, 0], "cross_entropy", "balanced", "class '1' does not occur among the training rows; name the weights"),
        ([0, 10, 0], "cross_entropy", {"11": 2.0}, "loss.class_weight: unknown class '11'; did you mean 1"),
        (
            [0, 1],
            "cross_entropy",
            {"1": -2.0},
            "loss.class_weight.1 must be a finite number that is not negative, not -2",
        ),
        (
            [0, 1],
            "cross_entropy",
            {"1": np.inf},
            "loss.class_weight.1 must be a finite number that is not negative, not",
        ),
        (
            [0, 1],
            "cross_entropy",
            {"1": np.nan},
            "loss.class_weight.1 must be a finite number that is not negative, not",
        ),
        (
            [0, 1],
            "cross_entropy",
            {"1": 0.0, "0": 0},
            "loss.class_weight: all classes weigh 0; one at least must weigh",
        ),
    ],
)
def test_class_weights_that_are_refused(
    tiny_config: Tiny, tmp_path: Path, targets: Any, loss: str, setting: Any, message: str
) -> None:
    dataset = arrays(tiny_config, tmp_path, targets, loss, **({"n_classes": 11} if 10 in np.ravel(targets) else {}))
    with pytest.raises(UserError) as caught:
        class_weights(setting, dataset)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["balanced", {"lower": 2.0}, {"lower": 0.5, "upper": 3.0}, None])
def test_class_weight_in_a_config(tiny_config: Tiny, setting: Any) -> None:
    """It is no parameter of the loss, and is written down again."""
    config = parse_config(tiny_config(loss={"kind": "huber", "threshold": 2.0, "class_weight": setting}))
    assert config.loss.class_weight == setting
    assert config.loss.record().values == {"threshold": 2.0}
    assert parse_config(tomllib.loads(dump_config(config))) == config


@pytest.mark.parametrize("setting", ["balance", 2.0, [1.0, 2.0], {"lower": "2"}, {"lower": True}])
def test_class_weight_that_no_config_has(tiny_config: Tiny, setting: Any) -> None:
    with pytest.raises(UserError, match='^config: loss.class_weight: must be "balanced", or a number a class such as'):
        parse_config(tiny_config(loss={"class_weight": setting}))
