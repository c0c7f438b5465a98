"""Loss records against mpmath and hand-worked cases: value and output delta together."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from conftest import random_targets

from gpu_bp import registry
from gpu_bp.backends import Backend
from gpu_bp.spec import FusedLoss, Loss


def value_and_delta(
    backend: Backend, loss: Loss, v: np.ndarray, d: np.ndarray, phi: str = "identity"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs, losses and deltas for net inputs v, as a training step computes them."""
    net_input, target = backend.to_device(v), backend.to_device(d)
    output, delta = backend.to_device(np.full_like(v, np.nan)), backend.to_device(np.full_like(v, np.nan))
    reduced = isinstance(loss, FusedLoss) and loss.per_row
    losses = backend.to_device(np.full((len(v), 1 if reduced else v.shape[1]), np.nan, v.dtype))
    activation = registry.activation(loss.output_activation if isinstance(loss, FusedLoss) else phi)
    if not isinstance(loss, FusedLoss):
        backend.activate(activation, net_input, None, output)
    backend.output_delta(loss, activation, net_input, target, output, losses, delta)
    return backend.to_host(output), backend.to_host(losses), backend.to_host(delta)


def row_loss(name: str, v: list[float], d: list[float]) -> mpmath.mpf:
    """A row's loss from its definition, in mpmath; v are net inputs, and the output layer is linear or fused."""
    x, t = [mpmath.mpf(a) for a in v], [mpmath.mpf(a) for a in d]
    if name == "squared_error":
        return sum((a - b) ** 2 for a, b in zip(x, t, strict=True)) / 2
    if name == "mean_absolute_error":
        return sum(abs(a - b) for a, b in zip(x, t, strict=True))
    if name == "huber":
        errors = [abs(a - b) for a, b in zip(x, t, strict=True)]
        return sum(r * r / 2 if r <= 1 else r - mpmath.mpf(1) / 2 for r in errors)
    if name == "log_cosh":
        return sum(mpmath.log(mpmath.cosh(a - b)) for a, b in zip(x, t, strict=True))
    if name == "squared_hinge":
        return sum(max(0, 1 - a * b) ** 2 for a, b in zip(x, t, strict=True))
    if name == "poisson":
        return sum(mpmath.exp(a) - b * a for a, b in zip(x, t, strict=True))
    if name == "binary_cross_entropy":
        y = [1 / (1 + mpmath.exp(-a)) for a in x]
        return -sum(b * mpmath.log(a) + (1 - b) * mpmath.log(1 - a) for a, b in zip(y, t, strict=True))
    assert name == "cross_entropy"
    total = sum(mpmath.exp(a) for a in x)
    return -sum(b * mpmath.log(mpmath.exp(a) / total) for a, b in zip(x, t, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", registry.LOSSES)
def test_value_and_delta(backend: Backend, name: str, dtype: str) -> None:
    loss, rng = registry.loss(name), np.random.default_rng(0)
    v = (rng.standard_normal((40, 5)) * np.geomspace(0.1, 30, 40)[:, None]).astype(dtype)
    d = rng.dirichlet(np.ones(5), 40) if loss.targets == "classes" else random_targets(loss, 40, 5, rng)
    d = d.astype(dtype)
    _, losses, delta = value_and_delta(backend, loss, v, d)
    epsilon = float(np.finfo(dtype).eps)
    with mpmath.workdps(60):
        for row in range(40):
            x, t = [float(a) for a in v[row]], [float(a) for a in d[row]]
            exact = row_loss(name, x, t)
            assert abs(losses[row].astype(float).sum() - exact) <= 64 * epsilon * max(abs(exact), 1)
            for j in range(5):
                slope = mpmath.diff(lambda a, j=j, x=x, t=t: row_loss(name, [*x[:j], a, *x[j + 1 :]], t), x[j], h=1e-25)
                assert abs(delta[row, j] - slope) <= 64 * epsilon * max(abs(slope), 1)


def test_classes_are_one_hot_rows(backend: Backend) -> None:
    """Class indices and one-hot rows are the same target."""
    loss, rng = registry.loss("cross_entropy"), np.random.default_rng(0)
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


def test_a_single_output_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 outputs"):
        registry.loss("cross_entropy").n_outputs(1)
    assert registry.loss("cross_entropy").n_outputs(3) == 3
    assert registry.loss("squared_error").n_outputs(1) == 1
