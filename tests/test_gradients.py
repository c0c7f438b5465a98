"""Backpropagation against central differences, for every activation and every loss in the tables."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_targets
from cuda_on_cpu.samples import other_values

from gpu_bp import Network, UserError, check_gradients, registry
from gpu_bp.backends import Backend
from gpu_bp.gradcheck import TOLERANCE
from gpu_bp.spec import Activation, FusedLoss, Loss

PHI = [name for name, record in registry.ACTIVATIONS.items() if isinstance(record, Activation)]
ROWS = 6


def random_network(
    backend: Backend, hidden: list[int], n_outputs: int, phi: str, output: str, biases: bool, seed: int = 0
) -> Network:
    widths = [3, *hidden, n_outputs]
    network = Network(widths, [phi] * len(hidden) + [output], biases=biases, backend=backend, dtype="float64")
    rng = np.random.default_rng(seed)
    scale = 0.1 if phi == "exponential" else 0.7  # layers of exponentials soon overflow
    network.load({name: rng.standard_normal(shape) * scale for name, shape in network.layout.shapes.items()})
    return network


def check(network: Network, loss: Loss, n_targets: int) -> None:
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((ROWS, 3))
    results = check_gradients(network, loss, inputs, random_targets(loss, ROWS, n_targets, rng))
    assert len(results) == len(network.layout.shapes)
    for worst in results:
        assert worst.error <= TOLERANCE, worst
        assert worst.skipped == 0, worst


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("n_targets", [1, 3])
@pytest.mark.parametrize("loss_name", registry.LOSSES)
@pytest.mark.parametrize("phi", PHI)
def test_gradient(backend: Backend, phi: str, loss_name: str, n_targets: int, depth: int, biases: bool) -> None:
    loss = registry.loss(loss_name)
    if n_targets < loss.least_outputs:
        with pytest.raises(ValueError, match="binary_cross_entropy"):
            loss.n_outputs(n_targets)
        return
    output = loss.output_activation if isinstance(loss, FusedLoss) else phi
    network = random_network(backend, [4, 3, 5][:depth], loss.n_outputs(n_targets), phi, output, biases)
    check(network, loss, n_targets)


@pytest.mark.parametrize("phi", ["tanh", "leaky_relu", "softplus"])
@pytest.mark.parametrize("loss_name", [name for name, record in registry.LOSSES.items() if record.parameters])
def test_gradient_of_losses_with_parameters(backend: Backend, loss_name: str, phi: str) -> None:
    loss = registry.loss(loss_name)
    loss = loss.with_parameters(**other_values(loss))
    output = loss.output_activation if isinstance(loss, FusedLoss) else phi
    check(random_network(backend, [4, 5], loss.n_outputs(3), phi, output, biases=True), loss, 3)


@pytest.mark.parametrize(
    ("phi", "parameters"),
    [("leaky_relu", {"slope": -0.3}), ("elu", {"alpha": 2.5}), ("scaled_tanh", {"a": 0.7, "b": 2.0})],
)
def test_gradient_with_parameters(backend: Backend, phi: str, parameters: dict[str, float]) -> None:
    record = registry.activation(phi, **parameters)
    network = Network([3, 4, 2], [record, record], backend=backend, dtype="float64")
    rng = np.random.default_rng(3)
    network.load({name: rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    check(network, registry.loss("huber", threshold=0.3), 2)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_class_probabilities_as_targets(backend: Backend, label_smoothing: float) -> None:
    network = random_network(backend, [4], 3, "tanh", "softmax", True)
    rng = np.random.default_rng(2)
    targets = rng.dirichlet(np.ones(3), ROWS)
    loss = registry.loss("cross_entropy", label_smoothing=label_smoothing)
    for worst in check_gradients(network, loss, rng.standard_normal((ROWS, 3)), targets):
        assert worst.error <= TOLERANCE, worst


def test_a_wrong_gradient_is_found(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: a backward pass that forgets one layer's phi' must not pass."""
    network = random_network(backend, [4], 2, "tanh", "identity", True)
    monkeypatch.setattr(backend, "hidden_delta", lambda *arguments: None)
    rng = np.random.default_rng(0)
    loss = registry.loss("squared_error")
    results = check_gradients(network, loss, rng.standard_normal((ROWS, 3)), rng.standard_normal((ROWS, 2)))
    assert [worst.passed for worst in results] == [False, False, True, True]


def test_kinks_are_stepped_around(backend: Backend) -> None:
    """A net input of exactly 0 lies on relu's kink: its weights are left out and counted, nothing fails."""
    network = Network([2, 2], ["relu"], biases=False, backend=backend, dtype="float64")
    network.load({"layers.0.weights": np.array([[1.0, -1.0], [0.5, 0.25]])})
    (worst,) = check_gradients(network, registry.loss("squared_error"), np.ones((1, 2)), np.zeros((1, 2)))
    assert (worst.checked, worst.skipped) == (2, 2)
    assert worst.passed


def test_what_was_not_compared_did_not_pass(backend: Backend) -> None:
    network = Network([2, 2], ["relu"], biases=False, backend=backend, dtype="float64")
    (worst,) = check_gradients(network, registry.loss("squared_error"), np.ones((1, 2)), np.zeros((1, 2)))
    assert (worst.checked, worst.skipped, worst.passed) == (0, 4, False)


def test_float32_is_refused(backend: Backend) -> None:
    network = Network([2, 1], ["tanh"], backend=backend)
    with pytest.raises(ValueError, match="float64"):
        check_gradients(network, registry.loss("squared_error"), np.ones((1, 2)), np.ones((1, 1)))


def test_softmax_stays_at_the_output() -> None:
    with pytest.raises(UserError, match="output layer"):
        Network([2, 3, 2], ["softmax", "identity"])
