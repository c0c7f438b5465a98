"""Synthetic data: row i of a set is a pure function of (seed, i). Each class gives inputs and labels or targets.

Training, validation and test rows are disjoint ranges of row numbers. Draw j of row i of a set with k draws a
row is element i*k + j of its stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_bp.registry import Purpose, normals, uniforms


@dataclass(frozen=True)
class Rows:
    """Rows of a set: inputs (n, n_inputs) float64, and what is wanted of them.

    Either `labels`, (n,) int64 numbers of `classes`, whose coding is the loss's affair; or `targets`,
    (n, n_targets) float64, which are 0 and 1 where they are `binary`.
    """

    inputs: np.ndarray
    targets: np.ndarray | None = None
    binary: bool = False
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()


def double_moon(seed: int, start: int, n: int, *, radius: float, width: float, distance: float) -> Rows:
    """Two half rings facing each other (Haykin, chapter 1): even rows the upper one, odd rows the lower.

    Points are uniform over the area of a ring of that mean radius and width. The lower ring stands `radius`
    to the right, and `distance` below the x axis: a negative distance moves it up, between the horns of the
    upper one.
    """
    u = uniforms(seed, Purpose.INPUTS, 2 * start, 2 * n).reshape(n, 2)
    inner, outer = radius - width / 2, radius + width / 2
    r = np.sqrt(inner**2 + (outer**2 - inner**2) * u[:, 0])
    x, y = r * np.cos(np.pi * u[:, 1]), r * np.sin(np.pi * u[:, 1])
    upper = (start + np.arange(n)) % 2 == 0
    inputs = np.stack([np.where(upper, x, x + radius), np.where(upper, y, -y - distance)], axis=1)
    return Rows(inputs, labels=upper.astype(np.int64), classes=("lower", "upper"))


def xor(start: int, n: int) -> Rows:
    """The four patterns of exclusive or, again and again."""
    pattern = (start + np.arange(n)) % 4
    inputs = np.stack([pattern // 2, pattern % 2], axis=1).astype(np.float64)
    return Rows(inputs, targets=inputs.sum(axis=1, keepdims=True) % 2, binary=True)


def encoder(start: int, n: int, *, size: int) -> Rows:
    """The identity on the unit vectors of that size, again and again (Ackley, Hinton and Sejnowski, 1985)."""
    inputs = np.eye(size)[(start + np.arange(n)) % size]
    return Rows(inputs, targets=inputs, binary=True)


def linear(seed: int, start: int, n: int, *, n_inputs: int, n_targets: int, noise: float) -> Rows:
    """A linear function of standard normal inputs, plus normal noise of standard deviation `noise`.

    The coefficients are standard normals divided by the root of n_inputs, so that a target's variance is
    about 1 plus the noise's.
    """
    inputs = normals(seed, Purpose.INPUTS, start * n_inputs, n * n_inputs).reshape(n, n_inputs)
    coefficients = normals(seed, Purpose.TEACHER, 0, n_targets * n_inputs).reshape(n_targets, n_inputs)
    error = normals(seed, Purpose.NOISE, start * n_targets, n * n_targets).reshape(n, n_targets)
    return Rows(inputs, targets=inputs @ coefficients.T / np.sqrt(n_inputs) + noise * error)
