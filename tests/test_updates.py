"""Update records against the papers, element by element in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from gpu_bp import Network, Optimizer, registry
from gpu_bp.backends import Backend

RATE, STEPS = 0.05, 25
PARAMETERS = {
    "sgd": {},
    "momentum": {"momentum": 0.8},
    "nesterov": {"momentum": 0.8},
    "adam": {"beta1": 0.85, "beta2": 0.97, "epsilon": 1e-6},
    "adamw": {"beta1": 0.85, "beta2": 0.97, "epsilon": 1e-6, "weight_decay": 0.1},
}


def rate_at(step: int) -> float:
    return RATE / (1 + step)


def reference(name: str, w: float, gradients: list[float], decayed: bool, **p: float) -> Iterator[float]:
    """The weight after each step, as the papers have it."""
    change = mean = square = 0.0
    for t, g in enumerate(gradients, start=1):
        eta = rate_at(t - 1)
        if name == "sgd":
            w = w - eta * g
        elif name == "momentum":  # Haykin, eq. 4.41
            change = p["momentum"] * change - eta * g
            w = w + change
        elif name == "nesterov":  # w is the point ahead, theta + momentum * change (Sutskever et al., 2013)
            theta = w - p["momentum"] * change
            change = p["momentum"] * change - eta * g
            theta = theta + change
            w = theta + p["momentum"] * change
        else:  # Kingma and Ba, algorithm 1; Loshchilov and Hutter, algorithm 2
            if name == "adamw" and decayed:
                w = w - eta * p["weight_decay"] * w
            mean = p["beta1"] * mean + (1 - p["beta1"]) * g
            square = p["beta2"] * square + (1 - p["beta2"]) * g * g
            corrected, root = mean / (1 - p["beta1"] ** t), math.sqrt(square / (1 - p["beta2"] ** t))
            w = w - eta * corrected / (root + p["epsilon"])
        yield w


def test_every_record_has_parameters_to_test() -> None:
    assert set(PARAMETERS) == set(registry.UPDATES)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_update(backend: Backend, name: str, dtype: str) -> None:
    """Weights and biases of a layer over some steps of a falling rate, the gradient scaled by 1 / 4."""
    rng = np.random.default_rng(0)
    network = Network([3, 2], ["identity"], backend=backend, dtype=dtype)
    start = {key: rng.standard_normal(shape) for key, shape in network.layout.shapes.items()}
    network.load(start)
    optimizer = Optimizer(registry.update(name, **PARAMETERS[name]), network, rate_at)
    summed = {key: rng.standard_normal((STEPS, *shape)) for key, shape in network.layout.shapes.items()}
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == "float64" else {"rtol": 2e-5, "atol": 2e-6}
    expected = {
        key: np.array(
            [
                list(reference(name, w, list(g), key.endswith("weights"), **PARAMETERS[name]))
                for w, g in zip(start[key].reshape(-1), summed[key].reshape(STEPS, -1).T / 4, strict=True)
            ]
        ).T
        for key in start
    }
    for step in range(STEPS):
        flat = np.zeros(network.layout.size, dtype)
        for key, view in network.layout.views(flat).items():
            view[...] = summed[key][step]
        optimizer.step(backend.to_device(flat), 1 / 4)
        for key, tensor in network.tensors().items():
            np.testing.assert_allclose(tensor.reshape(-1), expected[key][step], **tolerance)
    flat = backend.to_host(network.parameters).copy()
    for view in network.layout.views(flat).values():
        view[...] = 0
    assert not flat.any(), "the padding must stay zero"


@pytest.mark.parametrize("name", PARAMETERS)
def test_large_buffers_are_updated_in_slices(backend: Backend, name: str) -> None:
    """Every element of a large buffer gets what a small one gets; the boundary of the decay is exact."""
    network = Network([300, 200], ["identity"], backend=backend, dtype="float64")
    network.load({key: np.ones(shape) for key, shape in network.layout.shapes.items()})
    optimizer = Optimizer(registry.update(name, **PARAMETERS[name]), network, rate_at)
    for _ in range(3):
        optimizer.step(backend.to_device(np.full(network.layout.size, 2.0)), 0.5)
    for key, tensor in network.tensors().items():
        *_, last = reference(name, 1.0, [1.0] * 3, key.endswith("weights"), **PARAMETERS[name])
        np.testing.assert_allclose(tensor, last, rtol=1e-13)


def test_momentum_without_momentum_is_sgd(backend: Backend) -> None:
    weights = []
    for record in (registry.update("sgd"), registry.update("momentum", momentum=0.0)):
        network = Network([4, 3], ["identity"], backend=backend, dtype="float64")
        optimizer = Optimizer(record, network, rate_at)
        for k in range(5):
            optimizer.step(backend.to_device(np.sin(np.arange(network.layout.size) + k)), 1.0)
        weights.append(backend.to_host(network.parameters))
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize(("name", "bad"), [("momentum", {"momentum": 1.0}), ("adam", {"epsilon": 0.0})])
def test_parameters_out_of_range(name: str, bad: dict[str, float]) -> None:
    with pytest.raises(registry.UserError, match="must be a number in"):
        registry.update(name, **bad)
