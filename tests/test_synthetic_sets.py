"""Synthetic sets against definitions of their own: geometry, published formulas, whole numbers, and statistics."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from variants import section

from gpu_bp.backends import NumpyBackend
from gpu_bp.data.sources import SetReader
from gpu_bp.data.synthetic import Set, bayes_error, make_set, shift_for
from gpu_bp.registry import Purpose, normals, uniforms

SEED = 6


def made(kind: str, **chosen: Any) -> Set:
    return make_set(section(kind, **chosen), SEED)


def rows_of(drawn: Set, n: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and target of n rows: (n, width), and (n,) labels or (n, n_targets) numbers."""
    rows = SetReader(NumpyBackend(), drawn, SEED, "a set", first + n).read(first, n)
    wanted = rows.targets if rows.labels is None else rows.labels
    assert wanted is not None
    return rows.inputs, wanted


# classes -----------------------------------------------------------------------------------------------------


def test_double_moon_lies_on_its_rings() -> None:
    """Each half ring on its side of its middle, filled evenly: the area within a radius grows with its square."""
    radius, width, distance, n = 8.0, 3.0, -2.0, 20_000
    x, upper = rows_of(made("double-moon", radius=radius, width=width, distance=distance), n)
    assert upper.tolist() == [1, 0] * (n // 2)
    for label, middle, side in ((1, (0.0, 0.0), 1), (0, (radius, -distance), -1)):
        points = x[upper == label] - middle
        r = np.hypot(*points.T)
        assert ((r >= radius - width / 2 - 1e-12) & (r <= radius + width / 2 + 1e-12)).all()
        assert (side * points[:, 1] >= -1e-12).all()
        share = (r**2 - (radius - width / 2) ** 2) / (2 * radius * width)
        assert stats.kstest(share, "uniform").pvalue > 1e-4
        assert stats.kstest(np.arctan2(side * points[:, 1], points[:, 0]) / np.pi, "uniform").pvalue > 1e-4


def test_two_spirals_are_lang_and_witbrocks() -> None:
    """Their generator: for i = 0 .. 96, angle = i pi / 16, radius = 6.5 (104 - i) / 104,
    x = radius sin(angle), y = radius cos(angle); a point (x, y) of one class, then (-x, -y) of the other."""
    x, labels = rows_of(made("two-spirals"), 2 * 194)
    wanted = []
    for i in range(97):
        angle, radius = i * math.pi / 16, 6.5 * (104 - i) / 104
        point = [radius * math.sin(angle), radius * math.cos(angle)]
        wanted += [point, [-point[0], -point[1]]]
    np.testing.assert_allclose(x[:194], wanted, atol=1e-13)
    np.testing.assert_array_equal(x[194:], x[:194])
    assert labels.tolist() == [0, 1] * 194


def test_noisy_spirals_are_normal_about_the_spirals() -> None:
    """Less their places, which are drawn evenly along them."""
    x, labels = rows_of(made("two-spirals", noise=0.3, rows=20_000), 20_000)
    i = 96 * uniforms(SEED, Purpose.INPUTS, 0, 20_000)
    radius = 6.5 * (104 - i) / 104 * np.where(labels == 0, 1, -1)
    places = np.stack([radius * np.sin(i * np.pi / 16), radius * np.cos(i * np.pi / 16)], axis=1)
    assert stats.kstest(((x - places) / 0.3).reshape(-1), "norm").pvalue > 1e-4


@pytest.mark.parametrize(("n_classes", "n_inputs", "error"), [(2, 2, 0.1), (3, 5, 0.3), (10, 10, 0.05)])
def test_the_best_classifier_of_blobs_errs_as_asked(n_classes: int, n_inputs: int, error: float) -> None:
    """It takes the nearest middle: as many of the rows are wrong as binomial chance allows; the classes are even."""
    n = 200_000
    x, labels = rows_of(made("gaussian-blobs", n_classes=n_classes, n_inputs=n_inputs, bayes_error=error), n)
    middles = shift_for(error, n_classes) * np.eye(n_classes, n_inputs)
    nearest = (x @ middles.T).argmax(axis=1)  # all middles are equally far from 0
    wrong = (nearest != labels).mean()
    assert abs(wrong - error) < 4 * math.sqrt(error * (1 - error) / n)
    assert stats.chisquare(np.bincount(labels, minlength=n_classes)).pvalue > 1e-4


@pytest.mark.parametrize("error", [1e-12, 1e-3, 0.1, 0.49])
def test_error_of_two_blobs(error: float) -> None:
    """Their middles are sqrt(2) shifts apart: half of that, in standard deviations, is the way to the boundary."""
    shift = shift_for(error, 2)
    assert stats.norm.cdf(-shift / math.sqrt(2)) == pytest.approx(error, rel=1e-6)
    assert bayes_error(shift, 2) == pytest.approx(error, rel=1e-6)


def test_error_without_a_shift_is_guessing() -> None:
    for n_classes in (2, 3, 10, 1000):
        assert bayes_error(0.0, n_classes) == pytest.approx(1 - 1 / n_classes, rel=1e-8)


@pytest.mark.parametrize(("proportions", "distance"), [([50, 1], 2.0), ([1, 50], 0.5), ([0.5, 3, 1, 1e-9], 3.0)])
def test_proportions_and_distance_of_blobs(proportions: list[float], distance: float) -> None:
    """Classes as frequent as asked for, drawn by where one uniform number lies; middles as far apart as asked for."""
    n, n_classes = 50_000, len(proportions)
    chosen: dict[str, Any] = {"n_inputs": n_classes, "n_classes": n_classes, "distance": distance}
    x, labels = rows_of(made("gaussian-blobs", proportions=proportions, **chosen), n)
    shares = [sum(proportions[: k + 1]) / sum(proportions) for k in range(n_classes)]
    drawn = uniforms(SEED, Purpose.LABELS, 0, n)
    assert labels.tolist() == [next(k for k, share in enumerate(shares) if u < share) for u in drawn.tolist()]
    frequent = [k for k, proportion in enumerate(proportions) if proportion > 1e-3]
    counts, expected = (np.array(part)[frequent] for part in (np.bincount(labels, minlength=n_classes), proportions))
    assert stats.chisquare(counts, expected * n / expected.sum()).pvalue > 1e-4
    middles = distance / math.sqrt(2) * np.eye(n_classes)
    assert math.dist(middles[0], middles[1]) == pytest.approx(distance)
    assert stats.kstest((x - middles[labels]).reshape(-1), "norm").pvalue > 1e-4


def test_equal_blobs_keep_their_bits() -> None:
    """Said or not said to be equally frequent; and as far apart as the error asks for, said in either way."""
    shift = shift_for(0.1, 3)
    for other in ({"proportions": [0.3] * 3}, {"bayes_error": 0.1}, {"distance": shift * math.sqrt(2)}):
        one, two = (rows_of(made("gaussian-blobs", n_inputs=3, n_classes=3, **keys), 5000) for keys in ({}, other))
        np.testing.assert_array_equal(one[1], two[1])
        np.testing.assert_allclose(one[0], two[0], rtol=0, atol=0 if "distance" not in other else 1e-14)
    np.testing.assert_array_equal(one[1], np.floor(3 * uniforms(SEED, Purpose.LABELS, 0, 5000)))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"bayes_error": 0.1, "distance": 2.0}, "data.bayes_error and data.distance say the same; give one of them"),
        ({"proportions": [1, 2, 3]}, "data.proportions must be 2 numbers, one a class, not 3"),
        ({"proportions": [1, 0]}, "greater than 0"),
        ({"distance": 0.0}, "greater than 0"),
        ({"bayes_error": 0.5}, "data.bayes_error must be from 1e-12 to less than 0.5, which is guessing, not 0.5"),
        ({"n_classes": 3}, "data.n_inputs must be at least data.n_classes, 3, not 2"),
    ],
)
def test_blobs_that_are_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("gaussian-blobs", **chosen)


@pytest.mark.parametrize(("n_inputs", "cells"), [(1, 2), (2, 4), (3, 5), (7, 3)])
def test_checkerboard(n_inputs: int, cells: int) -> None:
    x, black = rows_of(made("checkerboard", n_inputs=n_inputs, cells=cells), 2000)
    assert black.tolist() == [sum(int(cells * float(u)) for u in row) % 2 for row in x]
    assert stats.kstest(x.reshape(-1), "uniform").pvalue > 1e-4


def bits_of(number: int, n: int) -> list[int]:
    return [int(digit) for digit in f"{number % 2**n:0{n}b}"]


@pytest.mark.parametrize("first", [0, 10**15])
@pytest.mark.parametrize("n", [2, 5, 48])
def test_parity_and_symmetry_of_all_patterns(n: int, first: int) -> None:
    """Row i holds the binary digits of i, again from 0 when all have come."""
    patterns = [bits_of(i, n) for i in range(first, first + 100)]
    for kind, label in (("parity", lambda b: sum(b) % 2), ("symmetry", lambda b: int(b == b[::-1]))):
        x, labels = rows_of(made(kind, n_inputs=n, rows=100), 100, first)
        assert x.tolist() == patterns
        assert labels.tolist() == [label(pattern) for pattern in patterns]


@pytest.mark.parametrize("n", [2, 5, 6, 48])
def test_parity_and_symmetry_of_drawn_patterns(n: int) -> None:
    """The bits are even and say nothing of each other; half the rows are mirrored, beside those that are by chance."""
    x, labels = rows_of(made("parity", n_inputs=n, patterns="random", rows=100), 4000)
    assert labels.tolist() == [int(sum(row)) % 2 for row in x.tolist()]
    assert stats.binomtest(int(x.sum()), x.size).pvalue > 1e-4
    assert np.abs(np.corrcoef(x.T) - np.eye(n)).max() < 5 / math.sqrt(4000)
    x, labels = rows_of(made("symmetry", n_inputs=n, patterns="random", rows=100), 4000)
    assert labels.tolist() == [int(row == row[::-1]) for row in x.tolist()]
    share = 0.5 + 0.5 * 2.0 ** -(n // 2)
    assert stats.binomtest(int(labels.sum()), 4000, share).pvalue > 1e-4


# binary targets ----------------------------------------------------------------------------------------------


def test_xor_and_encoder() -> None:
    for first in (0, 10**15 - 3):
        x, d = rows_of(made("xor"), 9, first)
        assert x.tolist() == [bits_of(i, 2) for i in range(first, first + 9)]
        assert d[:, 0].tolist() == [(int(a) ^ int(b)) for a, b in x.tolist()]
        x, d = rows_of(made("encoder", size=5), 9, first)
        assert x.tolist() == d.tolist() == [[int(j == i % 5) for j in range(5)] for i in range(first, first + 9)]


# regression --------------------------------------------------------------------------------------------------

N = 20_000


def check_noise(residual: np.ndarray, noise: float) -> None:
    """Normal, of that standard deviation, independent from target to target and from row to row."""
    assert stats.kstest(residual.reshape(-1) / noise, "norm").pvalue > 1e-4
    assert abs(residual.var() / noise**2 - 1) < 4 * math.sqrt(2 / residual.size)
    assert abs(stats.pearsonr(residual[1:, 0], residual[:-1, 0]).statistic) < 4 / math.sqrt(len(residual))


def check_of_variance_1(x: np.ndarray, distribution: str) -> None:
    law = stats.norm if distribution == "normal" else stats.uniform(-math.sqrt(3), 2 * math.sqrt(3))
    assert stats.kstest(x.reshape(-1), law.cdf).pvalue > 1e-4
    assert np.abs(np.corrcoef(x.T) - np.eye(x.shape[1])).max() < 5 / math.sqrt(len(x))


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_linear(distribution: str) -> None:
    """A matrix product with the published coefficients; with noise, and without to the last digits."""
    chosen = {"n_inputs": 6, "n_targets": 3, "distribution": distribution}
    noisy, exact = made("linear", noise=0.25, **chosen), made("linear", noise=0.0, **chosen)
    coefficients = noisy.tables["coefficients"]
    (x, d), (same, without) = rows_of(noisy, N), rows_of(exact, N)
    np.testing.assert_array_equal(x, same)
    np.testing.assert_allclose(without, x @ coefficients.T, rtol=0, atol=1e-12)
    check_of_variance_1(x, distribution)
    check_noise(d - x @ coefficients.T, 0.25)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("hidden", [[8], [7, 1, 5]])
def test_teacher(distribution: str, hidden: list[int]) -> None:
    chosen = {"n_inputs": 4, "hidden": hidden, "n_targets": 2, "distribution": distribution}
    noisy, exact = made("teacher", noise=0.1, **chosen), made("teacher", noise=0.0, **chosen)
    (x, d), (_, without) = rows_of(noisy, N), rows_of(exact, N)
    *weights, last = (noisy.tables[f"weights{layer}"] for layer in range(len(hidden) + 1))
    y = x
    for w in weights:
        y = np.tanh(y @ w.T)
    np.testing.assert_allclose(without, y @ last.T, rtol=0, atol=1e-12)
    check_of_variance_1(x, distribution)
    check_noise(d - y @ last.T, 0.1)


def test_coefficients_are_normal() -> None:
    """Of variance 1 / n_in, layer after layer from one stream, none used twice."""
    teacher = made("teacher", n_inputs=60, hidden=[50, 40], n_targets=3)
    scaled = [w * math.sqrt(w.shape[1]) for w in teacher.tables.values()]
    drawn = np.concatenate([w.reshape(-1) for w in scaled])
    np.testing.assert_allclose(drawn, normals(SEED, Purpose.TEACHER, 0, len(drawn)), rtol=1e-14)
    assert stats.kstest(drawn, "norm").pvalue > 1e-4


# Friedman's three functions, as scikit-learn's make_friedman1, 2 and 3 compute them.
FRIEDMAN: dict[str, Any] = {
    "friedman1": lambda x: (
        10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    ),
    "friedman2": lambda x: (x[:, 0] ** 2 + (x[:, 1] * x[:, 2] - 1 / (x[:, 1] * x[:, 3])) ** 2) ** 0.5,
    "friedman3": lambda x: np.arctan((x[:, 1] * x[:, 2] - 1 / (x[:, 1] * x[:, 3])) / x[:, 0]),
}


@pytest.mark.parametrize(("kind", "noise"), [("friedman1", 1.0), ("friedman2", 125.0), ("friedman3", 0.1)])
def test_friedman(kind: str, noise: float) -> None:
    """Uniform inputs on the ranges that he gives, and targets by his formula."""
    (x, without), (_, d) = (rows_of(made(kind, noise=sd), N) for sd in (0.0, noise))
    wanted = FRIEDMAN[kind](x)[:, None]
    np.testing.assert_allclose(without, wanted, rtol=1e-12, atol=1e-12)
    ranges = [(0, 1)] * 10 if kind == "friedman1" else [(0, 100), (40 * np.pi, 560 * np.pi), (0, 1), (1, 11)]
    assert x.shape[1] == len(ranges)
    for column, (low, high) in zip(x.T, ranges, strict=True):
        assert stats.kstest((column - low) / (high - low), "uniform").pvalue > 1e-4
    check_noise(d - wanted, noise)


@pytest.mark.parametrize("components", [1, 3, 9])
def test_sine_mixture(components: int) -> None:
    """The sum of sin(k pi x + phase k) / k, with the phases that the seed draws."""
    (x, without), (_, d) = (rows_of(made("sine-mixture", components=components, noise=sd), N) for sd in (0.0, 0.2))
    phases = 2 * np.pi * uniforms(SEED, Purpose.TEACHER, 0, components)
    wanted = sum(np.sin(k * np.pi * x + phase) / k for k, phase in enumerate(phases, 1))
    np.testing.assert_allclose(without, wanted, rtol=0, atol=1e-12)
    assert stats.kstest((x[:, 0] + 1) / 2, "uniform").pvalue > 1e-4
    check_noise(d - wanted, 0.2)


def test_heteroscedastic() -> None:
    """The residual divided by 0.1 + x is normal noise, independent of x."""
    (x, without), (_, d) = (rows_of(made("heteroscedastic", noise=sd), N) for sd in (0.0, 0.7))
    np.testing.assert_allclose(without, np.sin(2 * np.pi * x), rtol=0, atol=1e-12)
    assert stats.kstest(x[:, 0], "uniform").pvalue > 1e-4
    residual = (d - without) / (0.1 + x)
    check_noise(residual, 0.7)
    assert abs(stats.pearsonr(np.abs(residual[:, 0]), x[:, 0]).statistic) < 4 / math.sqrt(N)


# what sets draw ----------------------------------------------------------------------------------------------


def test_inputs_noise_and_labels_are_independent() -> None:
    """Streams of their own: the noise of a row says nothing of its inputs, nor the class of a blob's noise."""
    (x, without), (_, d) = (rows_of(made("linear", n_inputs=3, noise=sd), N) for sd in (0.0, 1.0))
    noise = (d - without)[:, 0]
    assert all(abs(stats.pearsonr(column, noise).statistic) < 4 / math.sqrt(N) for column in x.T)
    drawn = made("gaussian-blobs", n_classes=2, bayes_error=0.2)
    x, labels = rows_of(drawn, N)
    own = x - shift_for(0.2, 2) * np.eye(2)[labels]
    for part, column in itertools.product((labels == 0, labels == 1), range(2)):
        assert stats.kstest(own[part, column], "norm").pvalue > 1e-4
