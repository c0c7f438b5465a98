"""The step: weighted rows, steps in parts, clipping, max-norm and averaging, against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import random_targets

from gpu_bp import Batch, Network, Objective, Optimizer, Step, registry
from gpu_bp.average import Average
from gpu_bp.backends import Backend
from gpu_bp.noise import Noise
from gpu_bp.spec import FusedLoss

ROWS = 12


def network_of(backend: Backend, loss_name: str = "squared_error") -> Network:
    loss = registry.loss(loss_name)
    output = loss.output_activation if isinstance(loss, FusedLoss) else "identity"
    network = Network(
        [4, 6, 5, loss.n_outputs(3)], ["tanh", "silu", output], normalise=True, backend=backend, dtype="float64"
    )
    rng = np.random.default_rng(0)
    network.load({name: 0.6 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    return network


def data(loss_name: str = "squared_error") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((ROWS, 4)), random_targets(registry.loss(loss_name), ROWS, 3, rng)


def batch_of(b: Backend, x: np.ndarray, d: np.ndarray, weights: np.ndarray | None = None, **places: Any) -> Batch:
    rows = b.to_device(np.arange(len(x)))
    return Batch(b.to_device(x), b.to_device(d), rows, None if weights is None else b.to_device(weights), **places)


def step_of(network: Network, loss_name: str = "squared_error", **options: Any) -> Step:
    of_objective = {name: options.pop(name) for name in ("noise", "class_weights") if name in options}
    objective = Objective(network, registry.loss(loss_name), 40, **of_objective)
    return Step(objective, Optimizer(registry.update("momentum"), network, lambda step: 0.05), **options)


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
@pytest.mark.parametrize("loss_name", registry.LOSSES)
def test_a_row_of_weight_w_counts_as_w_rows(backend: Backend, loss_name: str, clip_norm: float) -> None:
    """And one of weight 0 as absent."""
    x, d = data(loss_name)
    weights = np.array([1.0, 3, 0, 2, 1, 1, 0, 4, 1, 2, 1, 1])
    repeated = np.repeat(np.arange(ROWS), weights.astype(int))
    weighted, plain = network_of(backend, loss_name), network_of(backend, loss_name)
    one, two = (step_of(network, loss_name, clip_norm=clip_norm) for network in (weighted, plain))
    for _ in range(3):
        one(batch_of(backend, x, d, weights))
        two(batch_of(backend, x[repeated], d[repeated]))
    assert one.objective.mean_loss() == pytest.approx(two.objective.mean_loss(), rel=1e-12)
    for name, tensor in weighted.tensors().items():
        np.testing.assert_allclose(tensor, plain.tensors()[name], rtol=1e-12, atol=1e-14)


def test_a_weight_of_zero_hides_what_is_no_number(backend: Backend) -> None:
    losses, delta = (backend.to_device(np.array([[np.nan, 1.0], [2.0, np.inf], [3.0, 4.0]])) for _ in range(2))
    backend.weigh(backend.to_device(np.array([0.0, 0.0, 2.0])), losses, delta)
    for x in (losses, delta):
        np.testing.assert_array_equal(backend.to_host(x), [[0, 0], [0, 0], [6, 8]])


def test_a_step_whose_rows_weigh_nothing_leaves_the_gradient_out(backend: Backend) -> None:
    network = network_of(backend)
    before = backend.to_host(network.parameters)
    step_of(network)(batch_of(backend, *data(), np.zeros(ROWS)))
    np.testing.assert_array_equal(backend.to_host(network.parameters), before)


@pytest.mark.parametrize("weighted", [False, True])
def test_parts_give_what_the_whole_batch_gives(backend: Backend, weighted: bool) -> None:
    """Gradients to 1e-12, with a mask that does not know of the parts."""
    x, d = data()
    weights = np.random.default_rng(2).uniform(0, 3, ROWS) if weighted else None
    noise = Noise(seed=3, dropout=(0.4, 0.2), input_noise=0.3, input_dropout=0.1)
    whole, parts = (step_of(network_of(backend), noise=noise, clip_norm=0.1) for _ in range(2))
    for _ in range(3):
        whole(batch_of(backend, x, d, weights))
        for start, end in ((0, 5), (5, 10), (10, 12)):
            w = None if weights is None else weights[start:end]
            parts(batch_of(backend, x[start:end], d[start:end], w, place=start, last=end == ROWS))
    gradients = [backend.to_host(step.objective.gradients) for step in (whole, parts)]
    np.testing.assert_allclose(*gradients, rtol=1e-12, atol=1e-13)
    parameters = [backend.to_host(step.objective.network.parameters) for step in (whole, parts)]
    np.testing.assert_allclose(*parameters, rtol=1e-12, atol=1e-14)
    assert whole.optimizer.steps == parts.optimizer.steps == 3


@pytest.mark.parametrize("most", [1e-3, 1e3])
def test_clipping_by_norm(backend: Backend, most: float) -> None:
    """w -= rate * g * min(1, most / (|g| + 1e-6)), g the mean gradient of all parameters."""
    network = network_of(backend)
    before = backend.to_host(network.parameters)
    step = step_of(network, clip_norm=most)
    step(batch_of(backend, *data()))
    g = backend.to_host(step.objective.gradients) / ROWS
    clipped = g * min(1, most / (np.sqrt((g**2).sum()) + 1e-6))
    np.testing.assert_allclose(backend.to_host(network.parameters), before - 0.05 * clipped, rtol=1e-12, atol=1e-16)


def test_max_norm(backend: Backend) -> None:
    """Of each hidden unit; those of the output layer are left."""
    free, bound = network_of(backend), network_of(backend)
    step_of(free)(batch_of(backend, *data()))
    step_of(bound, max_norm=1.1)(batch_of(backend, *data()))
    wanted, shrunk = free.tensors(), 0
    for k in range(2):
        w = wanted[f"layers.{k}.weights"]
        length = np.sqrt((w**2).sum(axis=1, keepdims=True))
        shrunk += int((length > 1.1).sum())
        wanted[f"layers.{k}.weights"] = w * np.minimum(1, 1.1 / length)
    assert 0 < shrunk < 11
    for name, tensor in bound.tensors().items():
        np.testing.assert_allclose(tensor, wanted[name], rtol=1e-13)


def test_average(backend: Backend) -> None:
    network = network_of(backend)
    average = Average(network, 0.9)
    step = step_of(network, average=average)
    expected: dict[str, np.ndarray] = {}
    for _ in range(5):
        step(batch_of(backend, *data()))
        now = network.tensors()
        expected = {name: 0.9 * expected.get(name, now[name]) + 0.1 * now[name] for name in now}
    for name, tensor in average.network.tensors().items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-12, atol=1e-15)
    assert not np.allclose(average.network.tensors()["layers.0.weights"], network.tensors()["layers.0.weights"])


@pytest.mark.parametrize("own", [None, np.array([1.0, 0.5, 2.0])])
@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        (np.array([2, 0, 1]), [2, 0, 1]),
        (np.array([[0.0], [1.0], [0.0]]), [0, 1, 0]),
        (np.array([[-1.0], [1.0], [1.0]]), [0, 1, 1]),
        (np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]]), [2, 1, 0]),
        (np.array([[-1.0, -1, 1], [-1, 1, -1], [1, -1, -1]]), [2, 1, 0]),
    ],
)
def test_class_weights(backend: Backend, targets: np.ndarray, classes: list[int], own: np.ndarray | None) -> None:
    table, out = np.array([0.25, 3.0, 10.0]), backend.zeros((3,), np.float64)
    weights = None if own is None else backend.to_device(own)
    backend.class_weights(backend.to_device(targets), backend.to_device(table), weights, out)
    np.testing.assert_array_equal(backend.to_host(out), table[classes] * (1.0 if own is None else own))


def test_a_part_of_a_batch_keeps_its_weights(backend: Backend) -> None:
    weights = np.arange(float(ROWS))
    part = batch_of(backend, *data(), weights).part(3, 7)
    np.testing.assert_array_equal(backend.to_host(part.weights), weights[3:7])


def test_weights_that_do_not_fit_are_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"weights must be \(rows,\) float64"):
        step_of(network_of(backend))(batch_of(backend, *data(), np.ones(ROWS - 1)))
