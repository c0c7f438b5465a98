"""Normalised layers, residual connections, dropout and input noise: values by hand, gradients by differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_targets

from gpu_bp import Batch, Model, Network, Objective, Task, UserError, check_gradients, registry
from gpu_bp.backends import Backend
from gpu_bp.data.preparation import Preparation
from gpu_bp.gradcheck import TOLERANCE
from gpu_bp.noise import Noise
from gpu_bp.registry import Purpose, element_of_step, normals, uniforms
from gpu_bp.spec import FusedLoss

NOISE = Noise(seed=3, dropout=(0.3, 0.0, 0.5), input_dropout=0.2, input_noise=0.1)
OPTIONS = [
    pytest.param({"normalise": True}, None, id="normalise"),
    pytest.param({"normalise": True, "biases": False}, None, id="normalise without biases"),
    pytest.param({"residual": True}, None, id="residual"),
    pytest.param({}, NOISE, id="noise"),
    pytest.param({"normalise": True, "residual": True}, NOISE, id="all"),
]


def network_of(
    backend: Backend, options: dict[str, Any], phi: str = "tanh", output: str = "identity", n_outputs: int = 2
) -> Network:
    """4-4-4-3-2: with residual connections in the first two hidden layers."""
    network = Network([4, 4, 4, 3, n_outputs], [phi] * 3 + [output], backend=backend, dtype="float64", **options)
    rng = np.random.default_rng(0)
    network.load({name: 0.8 * rng.standard_normal(shape) + 0.1 for name, shape in network.layout.shapes.items()})
    return network


@pytest.mark.parametrize(("options", "noise"), OPTIONS)
@pytest.mark.parametrize("loss_name", registry.LOSSES)
@pytest.mark.parametrize("phi", ["tanh", "silu", "elu"])
def test_gradients(backend: Backend, phi: str, loss_name: str, options: dict[str, Any], noise: Noise | None) -> None:
    """Derivatives from the output and from the net input, of weighted rows, with the mask of a draw."""
    loss, rng = registry.loss(loss_name), np.random.default_rng(1)
    output = loss.output_activation if isinstance(loss, FusedLoss) else "identity"
    network = network_of(backend, options, phi, output, loss.n_outputs(2))
    inputs, weights = rng.standard_normal((5, 4)), np.array([1.0, 0.5, 0.0, 2.0, 1.5])
    results = check_gradients(network, loss, inputs, random_targets(loss, 5, 2, rng), weights, noise=noise)
    assert len(results) == len(network.layout.shapes)
    for worst in results:
        assert worst.error <= TOLERANCE, worst
        assert worst.checked, worst


def forward(network: Network, inputs: np.ndarray, noise: Noise | None = None, step: int = 0, place: int = 0) -> Any:
    """The signals of all layers, on the host, after a training step's forward pass."""
    b = network.backend
    objective = Objective(network, registry.loss("squared_error"), len(inputs), noise=noise)
    targets = np.zeros((len(inputs), network.widths[-1]))
    batch = Batch(b.to_device(inputs), b.to_device(targets), b.to_device(np.arange(len(inputs))), place=place)
    objective.forward(batch, step)
    return objective.signals


def test_normalised_and_residual_layers_by_definition(backend: Backend) -> None:
    network = network_of(backend, {"normalise": True, "residual": True})
    t, y = network.tensors(), np.random.default_rng(2).standard_normal((6, 4))
    signals = forward(network, y)
    for k in range(3):
        u = y @ t[f"layers.{k}.weights"].T
        x = (u - u.mean(axis=1, keepdims=True)) / np.sqrt(u.var(axis=1, keepdims=True) + 1e-5)
        phi = np.tanh(x * t[f"layers.{k}.gains"] + t[f"layers.{k}.biases"])
        y = phi + y if k < 2 else phi  # the third is narrower than its inputs
        np.testing.assert_allclose(backend.to_host(signals[k].output), y, rtol=1e-12)
    outputs = y @ t["layers.3.weights"].T + t["layers.3.biases"]
    np.testing.assert_allclose(backend.to_host(signals[3].output), outputs, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wide_normalised_layer_far_from_zero(backend: Backend, dtype: str) -> None:
    """A row of 1000 numbers about 1000 with deviation 1: the variance is taken about the mean, so nothing cancels."""
    u = (1000 + np.random.default_rng(0).standard_normal((40, 1000))).astype(dtype)
    x, v = backend.to_device(u), backend.zeros(u.shape, dtype)
    gains, scale = backend.to_device(np.ones(1000, dtype)), backend.zeros((40, 1), dtype)
    backend.normalise(x, gains, None, scale, v)
    exact = u.astype(np.longdouble)
    exact = (exact - exact.mean(axis=1, keepdims=True)) / np.sqrt(exact.var(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(backend.to_host(v), exact, atol=1e-12 if dtype == "float64" else 2e-3)
    assert abs(backend.to_host(v).astype(float).std(axis=1) - 1).max() < 1e-4


def test_dropout_is_a_function_of_seed_step_layer_and_place(backend: Backend) -> None:
    """Which outputs go, from the uniforms of their own; what stays is scaled by 1 / (1 - rate)."""
    network, noise = network_of(backend, {}), Noise(seed=5, dropout=(0.25, 0.5, 0.0))
    inputs = np.random.default_rng(3).standard_normal((7, 4))
    for step, place in ((0, 0), (3, 0), (3, 2)):
        signals = forward(network, inputs, noise, step, place)
        for k, rate in enumerate(noise.dropout[:2]):
            n = network.widths[k + 1]
            start = element_of_step(step, k + 1, place * n)
            kept = uniforms(5, Purpose.DROPOUT, start, 7 * n).reshape(7, n) >= rate
            value = backend.to_host(signals[k].value)
            np.testing.assert_allclose(
                backend.to_host(signals[k].output), np.where(kept, value / (1 - rate), 0), rtol=1e-15
            )
        assert signals[2].output is signals[2].value


def test_the_share_that_is_left_out(backend: Backend) -> None:
    x = backend.to_device(np.ones((300, 1000)))
    backend.dropout(1, backend.to_device(np.array([7])), element_of_step(0, 2, 12), 0.3, x, x)
    kept = backend.to_host(x)
    np.testing.assert_allclose(np.unique(kept), [0, 1 / 0.7], rtol=1e-15)
    deviation = np.sqrt(0.3 * 0.7 / 300_000)
    assert abs((kept == 0).mean() - 0.3) < 5 * deviation
    assert abs((kept == 0).mean(axis=0) - 0.3).max() < 6 * np.sqrt(0.3 * 0.7 / 300)


def test_input_noise(backend: Backend) -> None:
    inputs = np.random.default_rng(3).standard_normal((9, 5))
    x, out = backend.to_device(inputs), backend.zeros((9, 5), np.float64)
    backend.input_noise(8, backend.to_device(np.array([2])), 15, 0.5, x, out)
    expected = inputs + 0.5 * normals(8, Purpose.INPUT_NOISE, element_of_step(2, 0, 15), 45).reshape(9, 5)
    np.testing.assert_allclose(backend.to_host(out), expected, rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(backend.to_host(x), inputs)


def test_steps_and_layers_have_streams_of_their_own() -> None:
    starts = [element_of_step(step, layer, 0) for step in (0, 1, 2**40) for layer in (0, 1, 50)]
    drawn = [uniforms(0, Purpose.DROPOUT, start, 50).tobytes() for start in starts]
    assert len(set(drawn)) == len(starts)


def test_prediction_leaves_nothing_out(backend: Backend) -> None:
    network = network_of(backend, {"normalise": True, "residual": True})
    inputs = np.random.default_rng(4).standard_normal((6, 4))
    signals = forward(network, inputs, NOISE)
    predicted = network.predict(inputs, batch_rows=4)
    assert not np.allclose(backend.to_host(signals[-1].output), predicted)
    np.testing.assert_allclose(backend.to_host(forward(network, inputs)[-1].output), predicted, rtol=1e-13)


def test_a_saved_network_is_the_same(backend: Backend, tmp_path: Path) -> None:
    network = network_of(backend, {"normalise": True, "residual": True})
    Model(network, Preparation(Task("none"), None, (0.0,) * 4, (1.0,) * 4)).save(tmp_path / "model.safetensors")
    loaded = Model.load(tmp_path / "model.safetensors", backend).network
    inputs = np.random.default_rng(5).standard_normal((6, 4))
    np.testing.assert_array_equal(loaded.predict(inputs), network.predict(inputs))


@pytest.mark.parametrize(
    "options", [{"dropout": (0.1, 1.0, 0.0)}, {"input_dropout": 1.0}, {"dropout": (-0.1,)}, {"input_noise": -1.0}]
)
def test_noise_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        Noise(seed=0, **options)


@pytest.mark.parametrize("rates", [(0.5,), (0.5,) * 4])
def test_dropout_is_given_for_each_hidden_layer(backend: Backend, rates: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=f"{len(rates)} dropout rates for 3 hidden layers"):
        Objective(network_of(backend, {}), registry.loss("squared_error"), 4, noise=Noise(seed=0, dropout=rates))


def test_a_single_unit_is_not_normalised() -> None:
    with pytest.raises(UserError, match="single unit"):
        Network([2, 1, 1], ["tanh", "identity"], normalise=True)
    Network([2, 2, 1], ["tanh", "identity"], normalise=True)


def test_options_that_are_off_make_no_arrays(backend: Backend) -> None:
    network = network_of(backend, {})
    for signal in network.signals(5, registry.loss("squared_error"), noise=Noise(seed=0)):
        assert signal.output is signal.value
        assert (signal.error, signal.normalised, signal.scale) == (None, None, None)
