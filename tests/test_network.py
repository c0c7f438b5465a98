"""The network, its step, and the promises that the rest is built on."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from conftest import random_targets
from cuda_on_cpu.samples import other_values
from hypothesis import given
from hypothesis import strategies as st

from gpu_bp import Batch, Layout, Network, Objective, Optimizer, Step, UserError, registry
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.backends.host_scratch import BLOCK
from gpu_bp.network import ALIGNMENT
from gpu_bp.spec import Activation, FusedLoss


def filled(network: Network, seed: int = 0) -> Network:
    rng = np.random.default_rng(seed)
    network.load({name: rng.standard_normal(shape) * 0.5 for name, shape in network.layout.shapes.items()})
    return network


def batch_of(backend: Backend, inputs: np.ndarray, targets: np.ndarray) -> Batch:
    return Batch(*(backend.to_device(a) for a in (inputs, targets, np.arange(len(inputs)))))


def objective_for(
    backend: Backend, loss_name: str, rows: int, dtype: str = "float64", phi: str = "tanh", **parameters: Any
) -> Objective:
    loss = registry.loss(loss_name, **parameters)
    output = loss.output_activation if isinstance(loss, FusedLoss) else "tanh"
    network = filled(Network([4, 6, loss.n_outputs(3)], [phi, output], backend=backend, dtype=dtype))
    return Objective(network, loss, rows)


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=4),
    st.booleans(),
)
def test_layout(shapes: list[tuple[int, int]], biases: bool) -> None:
    """Arrays are aligned, apart from each other, and weights come before what is exempt from decay."""
    weights = {f"w{k}": shape for k, shape in enumerate(shapes)}
    exempt = {f"b{k}": (shape[0],) for k, shape in enumerate(shapes) if biases}
    layout = Layout(weights, exempt)
    flat = np.zeros(layout.size)
    for k, (name, view) in enumerate(layout.views(flat).items()):
        assert layout.offsets[name] % ALIGNMENT == 0
        assert (layout.offsets[name] < layout.n_weights) == (name in weights)
        assert not view.any(), "arrays overlap"
        view[...] = k + 1
        assert view.base is flat or view.base.base is flat
    assert sum((flat == k + 1).sum() for k in range(len(layout.shapes))) == (flat != 0).sum()


@pytest.mark.parametrize("biases", [True, False])
def test_forward(backend: Backend, biases: bool) -> None:
    network = filled(Network([5, 7, 2], ["tanh", "identity"], biases=biases, backend=backend, dtype="float64"))
    tensors = {"layers.0.biases": np.zeros(7), "layers.1.biases": np.zeros(2), **network.tensors()}
    x = np.random.default_rng(1).standard_normal((11, 5))
    hidden = np.tanh(x @ tensors["layers.0.weights"].T + tensors["layers.0.biases"])
    expected = hidden @ tensors["layers.1.weights"].T + tensors["layers.1.biases"]
    np.testing.assert_allclose(network.predict(x, batch_rows=4), expected, rtol=1e-13)


@pytest.mark.parametrize("loss_name", registry.LOSSES)
def test_batch_gradient_is_the_sum_of_the_rows(backend: Backend, loss_name: str) -> None:
    """So the update, which divides by the rows, takes the mean of the per-sample gradients."""
    objective, rng = objective_for(backend, loss_name, 9), np.random.default_rng(2)
    inputs, targets = rng.standard_normal((9, 4)), random_targets(objective.loss, 9, 3, rng)

    def gradient(rows: slice) -> np.ndarray:
        batch = batch_of(backend, inputs[rows], targets[rows])
        objective.forward(batch)
        objective.backward(batch)
        return backend.to_host(objective.gradients).copy()

    whole = gradient(slice(0, 9))
    loss_of_all = objective.mean_loss()
    singles = sum(gradient(slice(k, k + 1)) for k in range(9))
    np.testing.assert_allclose(whole, singles, rtol=1e-12, atol=1e-14)
    assert objective.mean_loss() == pytest.approx(loss_of_all, rel=1e-14)


@pytest.mark.parametrize(
    ("loss_name", "inputs", "targets", "message"),
    [
        ("squared_error", np.ones((4, 5)), np.ones((4, 3)), r"inputs must be \(rows, 4\) float64, not \(4, 5\)"),
        ("squared_error", np.ones((4, 4), np.float32), np.ones((4, 3)), "float64, not .* float32"),
        ("squared_error", np.ones((4, 4)), np.ones((4, 1)), r"targets must be \(rows, 3\) float64, not \(4, 1\)"),
        ("squared_error", np.ones((4, 4)), np.ones(3), r"targets must be .* not \(3,\)"),
        ("squared_error", np.ones((9, 4)), np.ones((9, 3)), "a batch of 9 rows; the arrays were made for 8"),
        ("cross_entropy", np.ones((4, 4)), np.ones(4), r"or \(rows,\) int64, not \(4,\) float64"),
        ("cross_entropy", np.ones((4, 4)), np.ones(2, int), r"not \(2,\) int64"),
    ],
)
def test_batches_that_do_not_fit(
    backend: Backend, loss_name: str, inputs: np.ndarray, targets: np.ndarray, message: str
) -> None:
    """Refused before a kernel, which would broadcast them, or read beyond their end."""
    objective = objective_for(backend, loss_name, 8)
    with pytest.raises(ValueError, match=message):
        objective.forward(batch_of(backend, inputs, targets))


def test_update_takes_the_mean_of_the_rows(backend: Backend) -> None:
    """One step on four rows moves the weights by the mean of what each row alone moves them by."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((4, 4)), rng.standard_normal((4, 3))

    def moved(rows: slice) -> np.ndarray:
        network = filled(Network([4, 3], ["tanh"], backend=backend, dtype="float64"))
        before = backend.to_host(network.parameters).copy()
        optimizer = Optimizer(registry.update("sgd"), network, lambda step: 0.5)
        Step(Objective(network, registry.loss("squared_error"), 4), optimizer)(
            batch_of(backend, inputs[rows], targets[rows])
        )
        return backend.to_host(network.parameters) - before

    singly = np.mean([moved(slice(k, k + 1)) for k in range(4)], axis=0)
    np.testing.assert_allclose(moved(slice(0, 4)), singly, rtol=1e-12, atol=1e-15)


def test_update_of_a_short_batch_is_its_own_mean(backend: Backend) -> None:
    """A last batch of 3 rows moves the weights as a network with batch size 3 would."""
    moved = []
    for size in (8, 3):
        network = filled(Network([4, 3], ["tanh"], backend=backend, dtype="float64"))
        step = Step(
            Objective(network, registry.loss("squared_error"), size),
            Optimizer(registry.update("sgd"), network, lambda step: 0.5),
        )
        rng = np.random.default_rng(0)
        step(batch_of(backend, rng.standard_normal((3, 4)), rng.standard_normal((3, 3))))
        moved.append(backend.to_host(network.parameters))
    np.testing.assert_array_equal(*moved)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("update", registry.UPDATES)
@pytest.mark.parametrize("loss_name", registry.LOSSES)
def test_a_numpy_step_allocates_no_array(loss_name: str, update: str, dtype: str) -> None:
    _assert_no_allocation(loss_name, update, dtype, "tanh")


@pytest.mark.parametrize(
    "phi", [name for name, record in registry.ACTIVATIONS.items() if isinstance(record, Activation)]
)
def test_no_activation_allocates_an_array(phi: str) -> None:
    _assert_no_allocation("squared_error", "sgd", "float32", phi)


@pytest.mark.parametrize("loss_name", [name for name, record in registry.LOSSES.items() if record.parameters])
def test_no_loss_with_parameters_allocates_an_array(loss_name: str) -> None:
    parameters = other_values(registry.LOSSES[loss_name])
    _assert_no_allocation(loss_name, "sgd", "float32", "tanh", **parameters)


def _assert_no_allocation(loss_name: str, update: str, dtype: str, phi: str, **parameters: Any) -> None:
    """The most that a worker holds beside what it began with is the buffer of a ufunc that broadcasts.

    And Python numbers, each of which becomes an array of one element for a moment.
    """
    backend, rows = NumpyBackend(), 2 * BLOCK
    objective = objective_for(backend, loss_name, rows, dtype, phi, **parameters)
    step = Step(objective, Optimizer(registry.update(update), objective.network, lambda step: 1e-3))
    rng = np.random.default_rng(0)
    targets = random_targets(objective.loss, rows, 3, rng)
    batch = batch_of(backend, rng.standard_normal((rows, 4)).astype(dtype), _cast(targets, dtype))
    step(batch)
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    tracemalloc.start()
    try:
        peaks = []
        for _ in range(5):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            step(batch)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
        held = tracemalloc.take_snapshot().filter_traces([domain])
    finally:
        tracemalloc.stop()
    # the least of the steps: the test runner's own threads allocate too, now and then
    each = np.getbufsize() * np.dtype(dtype).itemsize + 4096
    assert min(peaks) < backend.division(objective.network.widths, rows).workers * each, "an array was made"
    assert sum(trace.size for trace in held.traces) < 100


def _cast(targets: np.ndarray, dtype: str) -> np.ndarray:
    return targets if targets.dtype.kind == "i" else targets.astype(dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.biases"), "layers.1.biases is missing"),
        (lambda t: t.update(extra=np.zeros(1)), "extra is not one of"),
        (
            lambda t: t.update({"layers.0.weights": np.zeros((2, 2))}),
            r"has shape \(2, 2\), this network needs \(3, 4\)",
        ),
        (lambda t: t.update({"layers.0.biases": np.full(3, np.nan)}), "finite"),
        (lambda t: t.update({"layers.0.biases": np.zeros(3, int)}), "finite floating-point"),
    ],
)
def test_tensors_that_do_not_fit(change: object, message: str) -> None:
    network = Network([4, 3, 2], ["tanh", "tanh"])
    tensors = network.tensors()
    change(tensors)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        network.load(tensors)


@pytest.mark.parametrize(("widths", "activations"), [([3], []), ([3, 0], ["tanh"]), ([3, 2], ["tanh", "tanh"])])
def test_networks_that_cannot_be(widths: list[int], activations: list[str]) -> None:
    with pytest.raises(UserError):
        Network(widths, activations)
