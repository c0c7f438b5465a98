"""Synthetic data: row i of a set is a pure function of (seed, i), the same on every backend.

Each kind of data has one function here, from its section of the config to a `Set`: formulas of the inputs and of the
target. Training, validation and test rows are consecutive ranges of row numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import integrate, optimize, special

from gpu_bp.config_data import (
    Checkerboard,
    DoubleMoon,
    Encoder,
    Friedman1,
    Friedman2,
    Friedman3,
    GaussianBlobs,
    Heteroscedastic,
    Linear,
    Parity,
    Patterns,
    SineMixture,
    Symmetry,
    Synthetic,
    Teacher,
    TwoSpirals,
    Xor,
)
from gpu_bp.formula import Columns, Draws, Formula, Place
from gpu_bp.registry import Purpose, normals, uniforms


@dataclass(frozen=True, eq=False)
class Set:
    """A synthetic set.

    `inputs` has a column an input. `target` has a column a target; with `classes` it has one, the number of the
    class. `binary`: the targets are 0 and 1. `stages` and `tables` are what these formulas refer to.
    `n_rows`: training rows.
    """

    n_rows: int
    inputs: Columns
    target: Columns
    classes: tuple[str, ...] = ()
    binary: bool = False
    stages: Mapping[str, Columns] = field(default_factory=dict)
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)


def _inputs(at: Place) -> Any:
    """Where the inputs are a stage of their own, because the target is a function of them."""
    return at.stage("inputs", at.column)


def _noise(at: Place, sd: float, n_targets: int) -> Any:
    return sd * at.normal(Draws(Purpose.NOISE, n_targets), at.column)


# classes -----------------------------------------------------------------------------------------------------


def double_moon(data: DoubleMoon, seed: int) -> Set:
    """Two half rings facing each other (Haykin, chapter 1): even rows the upper one, odd rows the lower.

    Points are uniform over the area of a ring of that mean radius and width. The lower ring stands `radius`
    to the right, and `distance` below the x axis: a negative distance moves it up, between the horns of the
    upper one.
    """
    draws, inner, outer = Draws(Purpose.INPUTS, 2), data.radius - data.width / 2, data.radius + data.width / 2

    def inputs(at: Place) -> Any:
        r = np.sqrt(inner**2 + (outer**2 - inner**2) * at.uniform(draws, 0))
        angle, upper = at.uniform(draws, 1), at.row % 2 == 0
        x, y = r * at.cospi(angle), r * at.sinpi(angle)
        return np.where(at.column == 0, np.where(upper, x, x + data.radius), np.where(upper, y, -y - data.distance))

    return Set(data.rows, Columns(2, inputs), Columns(1, lambda at: at.row % 2 == 0), ("lower", "upper"))


def two_spirals(data: TwoSpirals, seed: int) -> Set:
    """Two spirals of three turns about each other (Lang and Witbrock, 1988): even rows the first, odd rows the second.

    Point i = 0 .. 96 of the first stands at angle i pi / 16 and radius 6.5 (104 - i) / 104; the second is the first
    turned by pi. With noise, i is uniform on [0, 96], and the points are normal about their places.
    """
    place, noise = Draws(Purpose.INPUTS, 1), Draws(Purpose.NOISE, 2)

    def inputs(at: Place) -> Any:
        i = 96 * at.uniform(place, 0) if data.noise else at.row % 194 // 2
        radius = np.where(at.row % 2 == 0, 6.5, -6.5) * (104 - i) / 104
        point = np.where(at.column == 0, radius * at.sinpi(i / 16), radius * at.cospi(i / 16))
        return point + data.noise * at.normal(noise, at.column) if data.noise else point

    return Set(data.rows, Columns(2, inputs), Columns(1, lambda at: at.row % 2), ("first", "second"))


def gaussian_blobs(data: GaussianBlobs, seed: int) -> Set:
    """Standard normal clouds: that of class k stands at `shift` along axis k, so that all are equally far apart.

    A row's class is that in whose share of [0, 1), as wide as its proportion, one uniform number falls.
    """
    error = 0.1 if data.bayes_error is None else data.bayes_error
    shift = shift_for(error, data.n_classes) if data.distance is None else data.distance / np.sqrt(2)
    points, labels = Draws(Purpose.INPUTS, data.n_inputs), Draws(Purpose.LABELS, 1)
    ends = np.cumsum(data.proportions or [1.0] * data.n_classes)
    even = len(set(data.proportions or [1.0])) == 1

    def label(at: Place) -> Any:
        u = at.uniform(labels, 0)
        return np.floor(data.n_classes * u) if even else sum(u >= end for end in (ends[:-1] / ends[-1]).tolist())

    def inputs(at: Place) -> Any:
        return at.normal(points, at.column) + np.where(at.column == label(at), shift, 0.0)

    names = tuple(str(k) for k in range(data.n_classes))
    return Set(data.rows, Columns(data.n_inputs, inputs), Columns(1, label), names)


def bayes_error(shift: float, n_classes: int) -> float:
    """What the best classifier of `gaussian_blobs` gets wrong: the largest coordinate is not that of the class."""

    def wrong(z: float) -> float:
        others = -np.expm1((n_classes - 1) * special.log_ndtr(z + shift))  # one of them is larger
        return float(np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * others)

    return float(integrate.quad(wrong, -12, 12, epsabs=1e-15, epsrel=1e-9, limit=200)[0])


def shift_for(error: float, n_classes: int) -> float:
    """The shift at which `bayes_error` is that error."""
    return float(optimize.brentq(lambda s: np.log(bayes_error(s, n_classes) / error), 0, 20, xtol=1e-12))


def checkerboard(data: Checkerboard, seed: int) -> Set:
    """Uniform on the unit cube: a point is black where the numbers of its cells along the axes have an odd sum."""
    draws = Draws(Purpose.INPUTS, data.n_inputs)

    def black(at: Place) -> Any:
        return _odd(np.floor(data.cells * at.uniform(draws, j)) for j in range(data.n_inputs))

    inputs = Columns(data.n_inputs, lambda at: at.uniform(draws, at.column))
    return Set(data.rows, inputs, Columns(1, black), ("white", "black"))


def _odd(terms: Iterable[Any]) -> Any:
    """Whether the sum of whole numbers is odd."""
    total: Any = sum(terms)
    return np.floor(total * 0.5) * 2 != total


def _bit(data: Patterns, n: int, at: Place, j: Any) -> Any:
    """Bit j of the pattern of a row: of its number, the first bit the highest, or drawn."""
    if data.patterns == "all":
        return (at.row >> (n - 1 - j)) % 2
    return np.floor(2 * at.uniform(Draws(Purpose.INPUTS, n), j))


def parity(data: Parity, seed: int) -> Set:
    """The sum of the bits, modulo 2. With two inputs it is the exclusive or."""
    n = data.n_inputs

    def odd(at: Place) -> Any:
        return _odd(_bit(data, n, at, j) for j in range(n))

    rows = data.rows or data.n_patterns
    return Set(rows, Columns(n, lambda at: _bit(data, n, at, at.column)), Columns(1, odd), ("even", "odd"))


def symmetry(data: Symmetry, seed: int) -> Set:
    """Whether the bits read the same backwards (Rumelhart, Hinton and Williams, 1986); half of the drawn ones do."""
    n, chosen = data.n_inputs, Draws(Purpose.LABELS, 1)

    def bit(at: Place, j: Any) -> Any:
        own = _bit(data, n, at, j)
        if data.patterns == "all":
            return own
        mirrored = (at.uniform(chosen, 0) < 0.5) & (j >= (n + 1) // 2)
        return np.where(mirrored, _bit(data, n, at, n - 1 - j), own)

    def symmetric(at: Place) -> Any:
        same: Any = True
        for j in range(n // 2):
            same = (bit(at, j) == bit(at, n - 1 - j)) & same
        return same

    rows = data.rows or data.n_patterns
    names = ("asymmetric", "symmetric")
    return Set(rows, Columns(n, lambda at: bit(at, at.column)), Columns(1, symmetric), names)


# binary targets ----------------------------------------------------------------------------------------------


def xor(data: Xor, seed: int) -> Set:
    """The four patterns of exclusive or, again and again."""

    def inputs(at: Place) -> Any:
        return (at.row >> (1 - at.column)) % 2

    target = Columns(1, lambda at: (at.row % 4 + 1) // 2 % 2)
    return Set(data.rows, Columns(2, inputs), target, binary=True)


def encoder(data: Encoder, seed: int) -> Set:
    """The identity on the unit vectors of that size, again and again (Ackley, Hinton and Sejnowski, 1985)."""
    unit = Columns(data.size, lambda at: at.row % data.size == at.column)
    return Set(data.rows or data.size, unit, unit, binary=True)


# regression --------------------------------------------------------------------------------------------------


def _of_variance_1(n_inputs: int, distribution: str) -> Columns:
    """Independent inputs of mean 0 and variance 1."""
    draws = Draws(Purpose.INPUTS, n_inputs)
    if distribution == "normal":
        return Columns(n_inputs, lambda at: at.normal(draws, at.column))
    return Columns(n_inputs, lambda at: np.sqrt(3) * (2 * at.uniform(draws, at.column) - 1))


def _weights(seed: int, start: int, n_out: int, n_in: int) -> np.ndarray:
    """Normal weights of standard deviation 1 / sqrt(n_in)."""
    if n_out * n_in > 2**40:  # NumPy's own error for these is no MemoryError
        raise MemoryError(f"{n_out} x {n_in} weights")
    return np.asarray(normals(seed, Purpose.TEACHER, start, n_out * n_in).reshape(n_out, n_in) / np.sqrt(n_in))


def linear(data: Linear, seed: int) -> Set:
    """A linear function of inputs of variance 1, plus normal noise of standard deviation `noise`.

    The coefficients are standard normals divided by the root of n_inputs, so that a target's variance is
    about 1 plus the noise's.
    """

    def target(at: Place) -> Any:
        return at.dot("inputs", "coefficients") + _noise(at, data.noise, data.n_targets)

    return Set(
        data.rows,
        Columns(data.n_inputs, _inputs),
        Columns(data.n_targets, target),
        stages={"inputs": _of_variance_1(data.n_inputs, data.distribution)},
        tables={"coefficients": _weights(seed, 0, data.n_targets, data.n_inputs)},
    )


def teacher(data: Teacher, seed: int) -> Set:
    """A random tanh network without biases, its weights normal of variance 1 / n_in, plus normal noise."""
    widths = [data.n_inputs, *data.hidden, data.n_targets]
    stages, tables, start = {"inputs": _of_variance_1(data.n_inputs, data.distribution)}, {}, 0
    for layer, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        tables[f"weights{layer}"] = _weights(seed, start, n_out, n_in)
        start += n_out * n_in
    names = ["inputs", *(f"hidden{layer}" for layer in range(len(data.hidden)))]

    def product(layer: int) -> Formula:
        return lambda at: at.dot(names[layer], f"weights{layer}")

    def hidden(layer: int) -> Formula:
        return lambda at: np.tanh(product(layer)(at))

    for layer, width in enumerate(data.hidden):
        stages[names[layer + 1]] = Columns(width, hidden(layer))
    last = product(len(data.hidden))
    target = Columns(data.n_targets, lambda at: last(at) + _noise(at, data.noise, data.n_targets))
    return Set(data.rows, Columns(data.n_inputs, _inputs), target, stages=stages, tables=tables)


def friedman1(data: Friedman1, seed: int) -> Set:
    """Friedman, "Multivariate adaptive regression splines" (1991), equation 61: inputs uniform on [0, 1)."""
    draws = Draws(Purpose.INPUTS, data.n_inputs)

    def target(at: Place) -> Any:
        x = [at.uniform(draws, j) for j in range(5)]
        y = 10 * at.sinpi(x[0] * x[1]) + 20 * (x[2] - 0.5) ** 2 + 10 * x[3] + 5 * x[4]
        return y + _noise(at, data.noise, 1)

    inputs = Columns(data.n_inputs, lambda at: at.uniform(draws, at.column))
    return Set(data.rows, inputs, Columns(1, target))


def _circuit(at: Place) -> Any:
    """Resistance, frequency, inductance and capacitance, uniform; Friedman (1991), equations 63 and 64."""
    low, high = (0, 40 * np.pi, 0, 1), (100, 560 * np.pi, 1, 11)
    draws = Draws(Purpose.INPUTS, 4)
    # from above, so that the resistance, by which the phase divides, is never 0
    return [b - (b - a) * at.uniform(draws, j) for j, (a, b) in enumerate(zip(low, high, strict=True))]


def _circuit_inputs(at: Place) -> Any:
    x = _circuit(at)
    return np.where(at.column < 2, np.where(at.column == 0, x[0], x[1]), np.where(at.column == 2, x[2], x[3]))


def friedman2(data: Friedman2, seed: int) -> Set:
    """The impedance of a circuit."""

    def target(at: Place) -> Any:
        x = _circuit(at)
        return np.sqrt(x[0] ** 2 + (x[1] * x[2] - 1 / (x[1] * x[3])) ** 2) + _noise(at, data.noise, 1)

    return Set(data.rows, Columns(4, _circuit_inputs), Columns(1, target))


def friedman3(data: Friedman3, seed: int) -> Set:
    """The phase of the same circuit."""

    def target(at: Place) -> Any:
        x = _circuit(at)
        return np.arctan((x[1] * x[2] - 1 / (x[1] * x[3])) / x[0]) + _noise(at, data.noise, 1)

    return Set(data.rows, Columns(4, _circuit_inputs), Columns(1, target))


def sine_mixture(data: SineMixture, seed: int) -> Set:
    """The sum over k of sin(pi k x + phase) / k, the phases drawn once from the seed; x uniform on [-1, 1)."""
    draws = Draws(Purpose.INPUTS, 1)
    halfturns = 2 * uniforms(seed, Purpose.TEACHER, 0, data.components)

    def inputs(at: Place) -> Any:
        return 2 * at.uniform(draws, 0) - 1

    def target(at: Place) -> Any:
        x, y = inputs(at), _noise(at, data.noise, 1)
        for k, phase in enumerate(halfturns.tolist(), 1):
            y = y + at.sinpi(k * x + phase) / k
        return y

    return Set(data.rows, Columns(1, inputs), Columns(1, target))


def heteroscedastic(data: Heteroscedastic, seed: int) -> Set:
    """sin(2 pi x) and normal noise of standard deviation noise (0.1 + x), x uniform on [0, 1)."""
    draws = Draws(Purpose.INPUTS, 1)

    def target(at: Place) -> Any:
        x = at.uniform(draws, 0)
        return at.sinpi(2 * x) + (0.1 + x) * _noise(at, data.noise, 1)

    return Set(data.rows, Columns(1, lambda at: at.uniform(draws, 0)), Columns(1, target))


SETS: dict[type, Callable[[Any, int], Set]] = {
    DoubleMoon: double_moon,
    Xor: xor,
    Encoder: encoder,
    Parity: parity,
    Symmetry: symmetry,
    Checkerboard: checkerboard,
    TwoSpirals: two_spirals,
    GaussianBlobs: gaussian_blobs,
    Linear: linear,
    Teacher: teacher,
    Friedman1: friedman1,
    Friedman2: friedman2,
    Friedman3: friedman3,
    SineMixture: sine_mixture,
    Heteroscedastic: heteroscedastic,
}


def make_set(data: Synthetic, seed: int) -> Set:
    """The set of a section of the config."""
    return SETS[type(data)](data, seed)
