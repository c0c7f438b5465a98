"""Loss records against mpmath and hand-worked cases: value and output delta together."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
from conftest import random_targets
from cuda_on_cpu.samples import other_values

from gpu_bp import Batch, Network, Objective, UserError, registry
from gpu_bp.backends import Backend
from gpu_bp.spec import FusedLoss, GroupedLoss, Loss


def value_and_delta(
    backend: Backend, loss: Loss, v: np.ndarray, d: np.ndarray, phi: str = "identity"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs, losses and deltas for net inputs v, as a training step computes them."""
    net_input, target = backend.to_device(v), backend.to_device(d)
    output, delta = backend.to_device(np.full_like(v, np.nan)), backend.to_device(np.full_like(v, np.nan))
    losses = backend.to_device(np.full((len(v), loss.losses_width(v.shape[1])), np.nan, v.dtype))
    activation = registry.activation(loss.output_activation if isinstance(loss, FusedLoss) else phi)
    if not isinstance(loss, FusedLoss):
        backend.activate(activation, net_input, None, output)
    backend.output_delta(loss, activation, net_input, target, output, losses, delta)
    return backend.to_host(output), backend.to_host(losses), backend.to_host(delta)


def row_loss(loss: Loss, v: list[float], d: list[float]) -> mpmath.mpf:
    """A row's loss from its definition, in mpmath; v are net inputs, and the output layer is linear or fused."""
    x, t = [mpmath.mpf(a) for a in v], [mpmath.mpf(a) for a in d]
    name, p = loss.name, loss.values
    if name == "squared_error":
        return sum((a - b) ** 2 for a, b in zip(x, t, strict=True)) / 2
    if name == "mean_absolute_error":
        return sum(abs(a - b) for a, b in zip(x, t, strict=True))
    if name == "huber":
        errors = [abs(a - b) for a, b in zip(x, t, strict=True)]
        return sum(r * r / 2 if r <= p["threshold"] else p["threshold"] * (r - p["threshold"] / 2) for r in errors)
    if name == "log_cosh":
        return sum(mpmath.log(mpmath.cosh(a - b)) for a, b in zip(x, t, strict=True))
    if name == "squared_hinge":
        return sum(max(0, 1 - a * b) ** 2 for a, b in zip(x, t, strict=True))
    if name == "poisson":
        return sum(mpmath.exp(a) - b * a for a, b in zip(x, t, strict=True))
    if name == "quantile":
        errors = [b - a for q in range(len(p["levels"])) for a, b in zip(x[q * len(t) :], t, strict=False)]
        levels = [level for level in p["levels"] for _ in t]
        return sum(max(level * r, (level - 1) * r) for level, r in zip(levels, errors, strict=True))
    if name == "gaussian_nll":
        variances = [mpmath.log(1 + mpmath.exp(a)) + p["eps"] for a in x[len(t) :]]
        parts = zip(x[: len(t)], t, variances, strict=True)
        return sum(mpmath.log(variance) + (a - b) ** 2 / variance for a, b, variance in parts) / 2
    smoothing, n = mpmath.mpf(p["label_smoothing"]), 2 if name == "binary_cross_entropy" else len(t)
    t = [(1 - smoothing) * a + smoothing / n for a in t]
    if name == "binary_cross_entropy":
        y = [1 / (1 + mpmath.exp(-a)) for a in x]
        return -sum(b * mpmath.log(a) + (1 - b) * mpmath.log(1 - a) for a, b in zip(y, t, strict=True))
    assert name == "cross_entropy"
    total = sum(mpmath.exp(a) for a in x)
    return -sum(b * mpmath.log(mpmath.exp(a) / total) for a, b in zip(x, t, strict=True))


def with_other_parameters() -> list[Any]:
    """Every loss, and those that have parameters once more with others."""
    other = [r.with_parameters(**other_values(r)) for r in registry.LOSSES.values() if r.parameters]
    return [pytest.param(r, id=r.name) for r in registry.LOSSES.values()] + [
        pytest.param(r, id=f"{r.name} changed") for r in other
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", with_other_parameters())
def test_value_and_delta(backend: Backend, loss: Loss, dtype: str) -> None:
    rng, n = np.random.default_rng(0), loss.n_outputs(5)
    v = (rng.standard_normal((40, n)) * np.geomspace(0.1, 30, 40)[:, None]).astype(dtype)
    d = rng.dirichlet(np.ones(5), 40) if loss.targets == "classes" else random_targets(loss, 40, 5, rng)
    d = d.astype(dtype)
    _, losses, delta = value_and_delta(backend, loss, v, d)
    epsilon = float(np.finfo(dtype).eps)
    with mpmath.workdps(60):
        for row in range(40):
            x, t = [float(a) for a in v[row]], [float(a) for a in d[row]]
            exact = row_loss(loss, x, t)
            assert abs(losses[row].astype(float).sum() - exact) <= 64 * epsilon * max(abs(exact), 1)
            for j in range(n):
                slope = mpmath.diff(lambda a, j=j, x=x, t=t: row_loss(loss, [*x[:j], a, *x[j + 1 :]], t), x[j], h=1e-25)
                assert abs(delta[row, j] - slope) <= 64 * epsilon * max(abs(slope), 1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_classes_are_one_hot_rows(backend: Backend, label_smoothing: float) -> None:
    """Class indices and one-hot rows are the same target."""
    loss, rng = registry.loss("cross_entropy", label_smoothing=label_smoothing), np.random.default_rng(0)
    v, classes = rng.standard_normal((70, 37)) * 5, rng.integers(0, 37, 70)
    by_index, one_hot = (
        value_and_delta(backend, loss, v, classes),
        value_and_delta(backend, loss, v, np.eye(37)[classes]),
    )
    for a, b in zip(by_index, one_hot, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)


def test_cross_entropy_by_hand(backend: Backend) -> None:
    """softmax(0, log 2, log 5) is 1/8, 2/8, 5/8."""
    v = np.log([[1.0, 2.0, 5.0]])
    output, losses, delta = value_and_delta(backend, registry.loss("cross_entropy"), v, np.array([1]))
    np.testing.assert_allclose(output, [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-15)
    np.testing.assert_allclose(losses, [[math.log(4)]], rtol=1e-15)
    np.testing.assert_allclose(delta, [[1 / 8, -6 / 8, 5 / 8]], rtol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropies_of_certain_networks(backend: Backend, dtype: str) -> None:
    """Net inputs so large that exp(v) overflows or y rounds to 1: the loss stays exact, right or wrong."""
    v = np.array([[900.0, 0.0], [0.0, 900.0]], dtype)
    _, losses, delta = value_and_delta(backend, registry.loss("cross_entropy"), v, np.array([0, 0]))
    np.testing.assert_array_equal(losses, [[0], [900]])
    np.testing.assert_array_equal(delta, [[0, 0], [-1, 1]])
    v = np.array([[900.0], [-900.0], [30.0]], dtype)
    _, losses, delta = value_and_delta(
        backend, registry.loss("binary_cross_entropy"), v, np.array([[1], [1], [1]], dtype)
    )
    np.testing.assert_allclose(losses, [[0], [900], [math.exp(-30)]], rtol=1e-5)
    np.testing.assert_allclose(delta, [[0], [-1], [-math.exp(-30)]], rtol=1e-5, atol=1e-7)


def test_free_losses_meet_any_activation(backend: Backend) -> None:
    """1/2 (d - tanh v)^2 at v = atanh(1/2), d = 1: loss 1/8, delta (1/2 - 1)(1 - 1/4)."""
    v, d = np.array([[math.atanh(0.5)]]), np.array([[1.0]])
    _, losses, delta = value_and_delta(backend, registry.loss("squared_error"), v, d, "tanh")
    np.testing.assert_allclose([losses[0, 0], delta[0, 0]], [1 / 8, -3 / 8], rtol=1e-15)


def test_huber_threshold(backend: Backend) -> None:
    loss = registry.loss("huber", threshold=0.5)
    _, losses, delta = value_and_delta(backend, loss, np.array([[0.25, 2.0, -2.0]]), np.zeros((1, 3)))
    np.testing.assert_allclose(losses, [[0.03125, 0.875, 0.875]])
    np.testing.assert_allclose(delta, [[0.25, 0.5, -0.5]])


def test_log_cosh_of_small_and_large_errors(backend: Backend) -> None:
    """r^2 / 2 near 0, |r| - log 2 far out, and nothing cancels or overflows."""
    v = np.array([[1e-9, -1e-4, 800.0, -1e300]])
    _, losses, delta = value_and_delta(backend, registry.loss("log_cosh"), v, np.zeros((1, 4)))
    np.testing.assert_allclose(losses, [[5e-19, 5e-9, 800 - math.log(2), 1e300]], rtol=1e-8)
    np.testing.assert_allclose(delta, [[1e-9, -1e-4, 1, -1]], rtol=1e-8)


def test_squared_hinge_and_poisson_by_hand(backend: Backend) -> None:
    """max(0, 1 - d y)^2 right by far, right by little, wrong; exp(v) - d v at v = log 3, d = 2."""
    v, d = np.array([[2.0, 0.5, -1.0]]), np.array([[1.0, 1.0, 1.0]])
    _, losses, delta = value_and_delta(backend, registry.loss("squared_hinge"), v, d)
    np.testing.assert_array_equal(losses, [[0, 0.25, 4]])
    np.testing.assert_array_equal(delta, [[0, -1, -4]])
    v, d = np.array([[math.log(3)]]), np.array([[2.0]])
    output, losses, delta = value_and_delta(backend, registry.loss("poisson"), v, d)
    np.testing.assert_allclose([output[0, 0], losses[0, 0], delta[0, 0]], [3, 3 - 2 * math.log(3), 1], rtol=1e-15)


def test_label_smoothing_by_hand(backend: Backend) -> None:
    """Of softmax(0, log 2, log 5) = 1/8, 2/8, 5/8 with a share of 0.3 over all: the targets are 0.1, 0.8, 0.1."""
    loss = registry.loss("cross_entropy", label_smoothing=0.3)
    _, losses, delta = value_and_delta(backend, loss, np.log([[1.0, 2.0, 5.0]]), np.array([1]))
    np.testing.assert_allclose(losses, [[0.8 * math.log(4) + 0.1 * math.log(8) + 0.1 * math.log(8 / 5)]], rtol=1e-14)
    np.testing.assert_allclose(delta, [[1 / 8 - 0.1, 2 / 8 - 0.8, 5 / 8 - 0.1]], rtol=1e-14)
    loss = registry.loss("binary_cross_entropy", label_smoothing=0.2)
    _, losses, delta = value_and_delta(backend, loss, np.array([[math.log(3)]]), np.array([[1.0]]))
    np.testing.assert_allclose(losses, [[0.9 * math.log(4 / 3) + 0.1 * math.log(4)]], rtol=1e-14)
    np.testing.assert_allclose(delta, [[-0.15]], rtol=1e-14)


def test_quantile_by_hand(backend: Backend) -> None:
    """Two targets and two levels: outputs are those of the first level for both targets, then of the second."""
    loss = registry.loss("quantile", levels=[0.25, 0.75])
    v, d = np.array([[1.0, 1.0, 3.0, 4.0]]), np.array([[2.0, 4.0]])
    _, losses, delta = value_and_delta(backend, loss, v, d)
    np.testing.assert_array_equal(losses, [[0.25 * 1 + 0.25 * 1, 0.25 * 3]])
    np.testing.assert_array_equal(delta, [[-0.25, -0.25, 0.25, 0]])


def test_gaussian_by_hand(backend: Backend) -> None:
    """Variance 1 (less eps, raw being log(e - 1)), 2 off: loss 2; variance log 2 with raw 0, and exact: no pull."""
    v, d = np.array([[3.0, 5.0, math.log(math.e - 1), 0.0]]), np.array([[1.0, 5.0]])
    _, losses, delta = value_and_delta(backend, registry.loss("gaussian_nll", eps=1e-14), v, d)
    np.testing.assert_allclose(losses, [[2, math.log(math.log(2)) / 2]], rtol=1e-12)
    slopes = [0.5 * (1 - 1 / math.e) * (1 - 4), 0.25 / math.log(2)]
    np.testing.assert_allclose(delta, [[2, 0, *slopes]], rtol=1e-12)


def test_gaussian_of_certain_networks(backend: Backend) -> None:
    """Raw variances of which exp over- or underflows: nothing is lost, and eps bounds the loss."""
    v, d = np.array([[0.0, 0.0, 800.0, -800.0]]), np.array([[1.0, 1.0]])
    _, losses, delta = value_and_delta(backend, registry.loss("gaussian_nll", eps=1e-4), v, d)
    np.testing.assert_allclose(losses, [[(math.log(800) + 1 / 800) / 2, (math.log(1e-4) + 1e4) / 2]], rtol=1e-6)
    np.testing.assert_allclose(delta, [[-1 / 800, -1e4, (1 - 1 / 800) / 1600, 0]], rtol=1e-6)


def test_the_best_constants_are_the_quantiles(backend: Backend) -> None:
    """The gradient of the sum over many targets vanishes where the levels' shares of them lie below the outputs."""
    d = np.arange(1000.0).reshape(-1, 1)
    levels = (0.1, 0.5, 0.9)
    v = np.repeat([[99.5, 499.5, 899.5]], 1000, axis=0)
    _, _, delta = value_and_delta(backend, registry.loss("quantile", levels=levels), v, d)
    np.testing.assert_allclose(delta.sum(axis=0), 0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("quantile", {"levels": [0.9, 0.1]}, r"levels of quantile must be .* each larger than the one before"),
        ("quantile", {"levels": [0.5, 0.5]}, r"each larger than the one before, not \[0.5, 0.5\]"),
        ("quantile", {"levels": [0.0, 0.5]}, r"in \(0, 1\), .* not \[0.0, 0.5\]"),
        ("quantile", {"levels": []}, r"a number, or a list of numbers"),
        ("gaussian_nll", {"eps": 0.0}, r"eps of gaussian_nll must be a number in \(0, inf\)"),
        ("cross_entropy", {"label_smoothing": 1.0}, r"label_smoothing of cross_entropy must be a number in \[0, 1\)"),
        ("squared_error", {"label_smoothing": 0.1}, "squared_error takes no label_smoothing, which is for class"),
        ("gaussian_nll", {"label_smoothing": 0.1}, "gaussian_nll takes no label_smoothing, which is for class"),
    ],
)
def test_parameters_that_cannot_be(kind: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.loss(kind, **parameters)


def test_outputs_of_several_a_target() -> None:
    """Their labels, the best single guess among them, and what they say."""
    quantile = registry.loss("quantile", levels=[0.025, 0.4, 0.9])
    assert quantile.labels == ("q2.5", "q40", "q90")
    assert registry.loss("quantile", levels=0.05).labels == ("q05",)
    assert (quantile.groups, quantile.n_outputs(2), quantile.losses_width(6)) == (3, 6, 2)
    outputs = np.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(quantile.point_prediction(outputs), [[2, 3], [8, 9]])
    gaussian = registry.loss("gaussian_nll")
    assert isinstance(gaussian, GroupedLoss)
    assert gaussian.labels == ("", "variance")
    np.testing.assert_array_equal(gaussian.point_prediction(outputs), outputs[:, :3])
    predicted = gaussian.predictions(gaussian.grouped(outputs), **gaussian.values)
    np.testing.assert_array_equal(predicted[:, 0], outputs[:, :3])
    np.testing.assert_allclose(predicted[:, 1], np.log1p(np.exp(outputs[:, 3:])) + 1e-6, rtol=1e-14)


def test_a_network_of_another_width_is_refused() -> None:
    objective = Objective(Network([2, 3], ["identity"]), registry.loss("gaussian_nll"), 4)
    x = np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match="gaussian_nll has 2 outputs a target, the network has 3 in all"):
        objective.forward(Batch(x, x[:, :1], np.arange(4)))


def test_a_single_output_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 outputs"):
        registry.loss("cross_entropy").n_outputs(1)
    assert registry.loss("cross_entropy").n_outputs(3) == 3
    assert registry.loss("squared_error").n_outputs(1) == 1


@pytest.mark.parametrize(
    ("levels", "best", "labels"),
    [
        ((0.05, 0.95), (0, 1), ("q05", "q95")),
        ((0.1, 0.9), (0, 1), ("q10", "q90")),
        ((0.3, 0.7), (0, 1), ("q30", "q70")),
        ((0.1, 0.4, 0.6), (1, 2), ("q10", "q40", "q60")),
        ((0.025, 0.5, 0.975), (1,), ("q2.5", "q50", "q97.5")),
        ((0.999999, 0.9999999), (0,), ("q99.9999", "q99.99999")),
    ],
)
def test_the_middle_of_quantiles(levels: tuple[float, ...], best: tuple[int, ...], labels: tuple[str, ...]) -> None:
    """The level nearest to 1/2, or the two that are as near; every level has a name of its own."""
    loss = registry.loss("quantile", levels=levels)
    assert isinstance(loss, GroupedLoss)
    assert (loss.best(**loss.values), loss.labels) == (best, labels)
    outputs = np.arange(2.0 * 3 * len(levels)).reshape(2, -1) ** 2
    middle = loss.grouped(outputs)[:, list(best)].mean(axis=1)
    np.testing.assert_array_equal(loss.point_prediction(outputs), middle)
