"""What the rows of a class weigh: so much by name, or as much as makes all classes weigh the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from gpu_bp.data import Dataset
from gpu_bp.data.preparation import FITTED_ROWS
from gpu_bp.errors import UserError, unknown


def class_names(dataset: Dataset) -> tuple[str, ...]:
    """The names of the classes, or their numbers where they have none, as text.

    Raises:
        UserError: the targets are not one class a row.
    """
    task, n_targets = dataset.task, dataset.n_targets
    if task.decision == "none":
        raise UserError("loss.class_weight needs a classification, and this is a regression; leave it out")
    if task.decision != "argmax" and n_targets > 1:
        raise UserError(
            f"loss.class_weight needs one class a row, and a row has {n_targets} targets here, each of which may be 1; "
            "leave it out"
        )
    return task.class_names(n_targets)


def class_counts(dataset: Dataset) -> np.ndarray:
    """How many of the first `FITTED_ROWS` training rows each class has, or what these weigh: (n_classes,) float64.

    Raises:
        UserError: the targets are not one class a row, or a file is broken.
    """
    counts = np.zeros(len(class_names(dataset)))
    source = dataset.sources["train"]
    n, step = min(source.n_rows, FITTED_ROWS), source.read_rows
    for start in range(0, n, step):
        split = dataset.rows("train", start, min(step, n - start))
        counts += np.bincount(dataset.task.numbers(split.targets), split.weights, minlength=len(counts))
    return counts


def class_weights(setting: Literal["balanced"] | Mapping[str, float], dataset: Dataset) -> np.ndarray:
    """What a row of each class weighs: (n_classes,) float64, in the order of the classes.

    Args:
        setting: "balanced", n / (n_classes * count) of the class's count among n training rows (King and Zeng,
            "Logistic regression in rare events data", 2001); or numbers by the name of the class, others being 1.

    Raises:
        UserError: the targets are not one class a row; a class that does not occur cannot be balanced; an unknown
            class (the nearest is named); a number that is negative or not finite, or all of them 0.
    """
    names = class_names(dataset)
    if setting == "balanced":
        counts = class_counts(dataset)
        if not counts.all():
            more = dataset.sources["train"].n_rows > FITTED_ROWS
            among = f"the first {FITTED_ROWS:,} training rows" if more else "the training rows"
            missing = names[int(np.argmin(counts))]
            raise UserError(
                f"loss.class_weight = 'balanced': class {missing!r} does not occur among {among}; name the weights of "
                "the classes instead"
            )
        return np.asarray(counts.sum() / (len(counts) * counts))
    weights = np.ones(len(names))
    for name, weight in setting.items():
        if name not in names:
            raise UserError(f"loss.class_weight: {unknown('class', name, names)}")
        if not 0 <= weight < math.inf:
            raise UserError(f"loss.class_weight.{name} must be a finite number that is not negative, not {weight:g}")
        weights[names.index(name)] = weight
    if not weights.any():
        raise UserError("loss.class_weight: all classes weigh 0; one at least must weigh more")
    return weights
