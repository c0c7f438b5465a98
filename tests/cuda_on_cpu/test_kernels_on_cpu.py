"""Every kernel of the element-by-element records, as CuPy writes it, against the definition and the NumPy twin.

The reference is for finite inputs, and for infinite ones where a limit exists. Elsewhere (an infinite error signal
times a derivative of 0, infinity less infinity) no value is right; there the kernel must do what the twin does.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import mpmath
import numpy as np
import pytest

from cuda_on_cpu import references, samples
from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.fake_cupy import FakeCupy
from cuda_on_cpu.references import assert_near, assert_same_kind, evaluate
from gpu_bp import registry
from gpu_bp.backends import NumpyBackend
from gpu_bp.spec import Activation, FreeLoss, FusedLoss, GroupedLoss, Record, RowActivation, Twin

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

ACTIVATIONS = {r.name: r for r in registry.ACTIVATIONS.values() if isinstance(r, Activation)}
FREE_LOSSES = {r.name: r for r in registry.LOSSES.values() if isinstance(r, FreeLoss)}
GROUPED_LOSSES = {r.name: r for r in registry.LOSSES.values() if isinstance(r, GroupedLoss)}
# One of each sort: derivative from y or v, with and without parameters.
COMPOSED = ("identity", "tanh", "elu", "leaky_relu", "silu")

Long = np.longdouble
dtypes = pytest.mark.parametrize("dtype", samples.DTYPES)
orders = pytest.mark.parametrize("order", ["forward", "reverse", "random"])


def backend(order: Any = "forward") -> Any:
    return cupy_backend_module(FakeCupy(order)).CupyBackend()


def variants(record: Record) -> list[Record]:
    """The record with its defaults, and with other parameters where it has any."""
    return [record, record.with_parameters(**samples.other_values(record))] if record.parameters else [record]


def twins(record: Record) -> dict[str, Twin]:
    """The formulas of a record by the name of their field."""
    held = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {name: value for name, value in held.items() if isinstance(value, Twin)}


def lacking(record: Record) -> list[str]:
    """The formulas that a record lacks in CUDA or in NumPy."""
    found = twins(record)
    assert found, f"{record.name} has no formula"
    return [name for name, twin in found.items() if not twin.cuda.strip() or not callable(twin.numpy)]


def test_every_record_has_both_formulas_and_a_reference() -> None:
    """So that nothing new goes untested: the tests walk the tables, and these are what they compare with."""
    for record in (
        *registry.ACTIVATIONS.values(),
        *registry.LOSSES.values(),
        *registry.UPDATES.values(),
        *registry.PENALTIES.values(),
    ):
        assert lacking(record) == []
    for table in (references.VALUES, references.DERIVATIVES, references.VALUE_LIMITS):
        assert set(table) == set(ACTIVATIONS)
    assert set(references.LOSSES) == set(FREE_LOSSES)
    assert set(references.GROUPED_LOSSES) == set(GROUPED_LOSSES)
    from_net_input = {name for name, r in ACTIVATIONS.items() if r.derivative_from == "net_input"}
    assert set(references.DERIVATIVE_LIMITS) == from_net_input
    fused = {r.name for r in registry.LOSSES.values() if isinstance(r, FusedLoss)}
    assert fused == {"binary_cross_entropy", "cross_entropy", "poisson"}, "a fused loss needs a test of its own here"
    rows = {r.name for r in registry.ACTIVATIONS.values() if isinstance(r, RowActivation)}
    assert rows == {"softmax"}, "a row activation needs a test of its own in test_other_kernels_on_cpu.py"


def with_limits(values: np.ndarray, xs: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return np.where(np.isneginf(xs), limits[0], np.where(np.isposinf(xs), limits[1], values))


def activate(b: Any, record: Activation, v: np.ndarray, biases: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """What a backend makes of the net input: v with the biases added, and y."""
    net_input, output = b.to_device(v), b.to_device(np.full_like(v, np.nan))
    b.activate(record, net_input, None if biases is None else b.to_device(biases), output)
    return b.to_host(net_input), b.to_host(output)


def hidden_delta(b: Any, record: Activation, e: np.ndarray, x: np.ndarray) -> np.ndarray:
    delta, array, nothing = b.to_device(e), b.to_device(x), b.to_device(np.full_like(x, np.nan))
    from_output = record.derivative_from == "output"
    b.hidden_delta(record, delta, nothing if from_output else array, array if from_output else nothing, delta)
    host: np.ndarray = b.to_host(delta)
    return host


@dtypes
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_value(name: str, dtype: str) -> None:
    """phi(v), without biases: the kernel's y, the twin's, and the definition's."""
    check_value(ACTIVATIONS[name], dtype)


def check_value(activation: Activation, dtype: str) -> None:
    v, name = samples.numbers(dtype), activation.name
    for record in variants(activation):
        parameters = samples.rounded(record, dtype)
        phi = partial(references.VALUES[name], **{k: mpmath.mpf(p) for k, p in parameters.items()})
        wanted, condition = (a.reshape(v.shape) for a in evaluate(phi, v.reshape(-1)))
        wanted = with_limits(wanted, v, references.VALUE_LIMITS[name](**parameters))
        for b in (backend(), NumpyBackend()):
            net_input, y = activate(b, record, v, None)
            np.testing.assert_array_equal(net_input, v)
            assert_near(y, wanted, np.where(np.isinf(v), 1, condition))


@dtypes
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_with_biases(name: str, dtype: str) -> None:
    """The biases are added once, to every row; y may stand where v stood."""
    v = samples.numbers(dtype)
    biases = samples.like(v[0], 1)
    record = ACTIVATIONS[name]
    b = backend()
    net_input, y = activate(b, record, v, biases)
    np.testing.assert_array_equal(net_input, v + biases)
    np.testing.assert_array_equal(y, activate(b, record, v + biases, None)[1])
    in_place = b.to_device(v)
    b.activate(record, in_place, b.to_device(biases), in_place)
    np.testing.assert_array_equal(b.to_host(in_place), y)
    twin = activate(NumpyBackend(), record, v, biases)[1]
    assert_same_kind(y, twin)


@dtypes
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_hidden_delta(name: str, dtype: str) -> None:
    """e * phi', for y that phi can give (or any v): the kernel, the twin and the definition."""
    check_hidden_delta(ACTIVATIONS[name], dtype)


def check_hidden_delta(activation: Activation, dtype: str) -> None:
    v, name = samples.numbers(dtype), activation.name
    for record in variants(activation):
        x = activate(NumpyBackend(), record, v, None)[1] if record.derivative_from == "output" else v
        e = samples.like(v, 2)
        parameters = samples.rounded(record, dtype)
        derivative = partial(references.DERIVATIVES[name], **{k: mpmath.mpf(p) for k, p in parameters.items()})
        wanted, condition = references.derivative_and_condition(name, x, **derivative.keywords)
        if record.derivative_from == "output":
            ends = [float(derivative(mpmath.mpf(end))) for end in ("-inf", "inf")] if np.isinf(x).any() else [0, 0]
        else:
            ends = list(references.DERIVATIVE_LIMITS[name](**parameters))
        wanted = with_limits(wanted, x, (ends[0], ends[1]))
        if name in ("identity", "relu", "leaky_relu", "elu", "selu", "hard_sigmoid"):
            # They choose by y or v, and a NaN there is on the side of v > 0; the loss is NaN anyhow.
            wanted = np.where(np.isnan(x), float(derivative(mpmath.mpf("0.5"))), wanted)
            condition = np.where(np.isnan(x), 1, condition)
        for b in (backend(), NumpyBackend()):
            assert_near(hidden_delta(b, record, e, x), e * wanted, e * np.where(np.isinf(x), 1, condition))
        wild = np.resize(np.array([np.inf, -np.inf, np.nan, np.finfo(dtype).max, 0], dtype), v.shape)
        wild[np.abs(wanted) < np.finfo(dtype).tiny] = 1  # infinity times a derivative that may be flushed to zero
        assert_same_kind(hidden_delta(backend(), record, wild, x), hidden_delta(NumpyBackend(), record, wild, x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_reference_derivative_is_the_derivative(name: str) -> None:
    """DERIVATIVES follows from VALUES: numerically differentiated, at 60 digits."""
    record = ACTIVATIONS[name]
    parameters = {k: mpmath.mpf(p) for k, p in record.values.items()}
    phi = partial(references.VALUES[name], **parameters)
    for v in (-7.3, -2.5, -0.4, 0.3, 1.9, 2.8):
        y_or_v = phi(mpmath.mpf(v)) if record.derivative_from == "output" else mpmath.mpf(v)
        wanted = mpmath.diff(phi, mpmath.mpf(v))
        assert abs(references.DERIVATIVES[name](y_or_v, **parameters) - wanted) < mpmath.mpf(10) ** -15


def output_delta(b: Any, loss: Any, phi: Any, v: np.ndarray, y: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, ...]:
    """losses, delta and output as a backend leaves them; the net input and the target must not change."""
    losses, delta = (b.to_device(np.full_like(a, np.nan)) for a in (d, v))
    net_input, target, output = b.to_device(v), b.to_device(d), b.to_device(y)
    b.output_delta(loss, phi, net_input, target, output, losses, delta)
    np.testing.assert_array_equal(b.to_host(net_input), v)
    np.testing.assert_array_equal(b.to_host(target), d)
    return b.to_host(losses), b.to_host(delta), b.to_host(output)


@dtypes
@pytest.mark.parametrize("activation", COMPOSED)
@pytest.mark.parametrize("name", FREE_LOSSES)
def test_free_loss(name: str, activation: str, dtype: str) -> None:
    """The loss and e * phi' from y, d and v; reference where all is finite, the twin everywhere."""
    phi = ACTIVATIONS[activation]
    v = samples.numbers(dtype)
    y = activate(NumpyBackend(), phi, v, None)[1]
    d = np.where(np.random.default_rng(3).random(v.shape) < 0.1, y, samples.like(v, 4))  # some exact hits
    d.reshape(-1)[:40] = samples.numbers(dtype).reshape(-1)[-40:]
    if FREE_LOSSES[name].targets == "signs":
        d = np.where(np.random.default_rng(4).random(v.shape) < 0.5, -1, 1).astype(dtype)
    x = y if phi.derivative_from == "output" else v
    slopes = {k: mpmath.mpf(p) for k, p in samples.rounded(phi, dtype).items()}
    derivative, derivative_condition = references.derivative_and_condition(activation, x.reshape(-1), **slopes)
    finite = (np.isfinite(v) & np.isfinite(y) & np.isfinite(d)).reshape(-1)
    for loss in variants(FREE_LOSSES[name]):
        parameters = {k: mpmath.mpf(p) for k, p in samples.rounded(loss, dtype).items()}
        got = output_delta(backend(), loss, phi, v, y, d)
        twin = output_delta(NumpyBackend(), loss, phi, v, y, d)
        pairs = zip(y.reshape(-1)[finite], d.reshape(-1)[finite], strict=True)
        both = [references.LOSSES[name](mpmath.mpf(float(a)), mpmath.mpf(float(b)), **parameters) for a, b in pairs]
        value, e = (np.array([references.long_double(x) for x in column]) for column in zip(*both, strict=True))
        for result in (got, twin):
            assert_near(result[0].reshape(-1)[finite], value, value)
            assert_near(result[1].reshape(-1)[finite], e * derivative[finite], e * derivative_condition[finite])
            np.testing.assert_array_equal(result[2], y)
        for kernel, numpy in zip(got, twin, strict=True):
            assert_same_kind(kernel, numpy)


@dtypes
@pytest.mark.parametrize("activation", COMPOSED)
@pytest.mark.parametrize("name", GROUPED_LOSSES)
def test_grouped_loss(name: str, activation: str, dtype: str) -> None:
    """The loss of each target and e * phi' of its outputs; reference where nothing underflows, the twin everywhere."""
    phi = ACTIVATIONS[activation]
    for loss in variants(GROUPED_LOSSES[name]):
        k, parameters = loss.groups, samples.rounded(loss, dtype)
        v = np.random.default_rng(8).permuted(samples.numbers(dtype).reshape(-1))
        v = v[: len(v) // (3 * k) * 3 * k].reshape(-1, k, 3)
        y = activate(NumpyBackend(), phi, v, None)[1]
        d = samples.like(v[:, 0], 4)
        d[::7] = y[::7, 0]  # some exact hits
        flat = (v.reshape(len(v), -1), y.reshape(len(v), -1), d)
        got, twin = (output_delta(b, loss, phi, *flat) for b in (backend(), NumpyBackend()))
        for kernel, numpy in zip(got, twin, strict=True):
            assert_same_kind(kernel, numpy)
        compared = ((np.abs(v) < 80) & (np.abs(y) < 80)).all(axis=1)  # rows and targets
        outputs, targets = y.swapaxes(1, 2)[compared], d[compared]
        exact = {key: [*map(mpmath.mpf, p)] if isinstance(p, tuple) else mpmath.mpf(p) for key, p in parameters.items()}
        reference = partial(references.GROUPED_LOSSES[name], **exact)
        results = [
            reference([mpmath.mpf(float(a)) for a in one], mpmath.mpf(float(t)))
            for one, t in zip(outputs, targets, strict=True)
        ]
        value, size, e, e_size = (
            np.array([references.long_double(x) for part in parts for x in part])
            for parts in zip(*results, strict=True)
        )
        slopes = {key: mpmath.mpf(p) for key, p in samples.rounded(phi, dtype).items()}
        x = (y if phi.derivative_from == "output" else v).swapaxes(1, 2)[compared].reshape(-1)
        derivative, condition = references.derivative_and_condition(activation, x, **slopes)
        for losses, delta, _ in (got, twin):
            deltas = delta.reshape(v.shape).swapaxes(1, 2)[compared].reshape(-1)
            assert_near(losses[compared], value, size)
            assert_near(deltas, e * derivative, e_size * condition)


@dtypes
def test_binary_cross_entropy(dtype: str) -> None:
    """d softplus(-v) + (1 - d) softplus(v), and logistic(v) - d. At an infinite v, twin and kernel agree."""
    for loss in variants(registry.loss("binary_cross_entropy")):
        check_binary_cross_entropy(loss, dtype)


def check_binary_cross_entropy(loss: Any, dtype: str) -> None:
    phi, smoothing = registry.activation("logistic"), Long(samples.rounded(loss, dtype)["label_smoothing"])
    v = samples.numbers(dtype)
    d = np.random.default_rng(5).random(v.shape).astype(dtype)
    d.reshape(-1)[::3] = 0
    d.reshape(-1)[1::3] = 1
    nan = np.full_like(v, np.nan)
    got, twin = (output_delta(b, loss, phi, v, nan, d) for b in (backend(), NumpyBackend()))
    softplus, _ = evaluate(references.VALUES["softplus"], v.reshape(-1))
    negative, _ = evaluate(references.VALUES["softplus"], -v.reshape(-1))
    y, condition = evaluate(references.VALUES["logistic"], v.reshape(-1))
    finite, flat = np.isfinite(v).reshape(-1), d.reshape(-1).astype(Long) * (1 - smoothing) + smoothing / 2
    value = flat * negative + (1 - flat) * softplus
    for result in (got, twin):
        losses, delta, output = (a.reshape(-1)[finite] for a in result)
        assert_near(losses, value[finite], value[finite])
        assert_near(output, y[finite], condition[finite])
        assert_near(delta, (y - flat)[finite], (condition + flat)[finite])
    for kernel, numpy in zip(got, twin, strict=True):
        assert_same_kind(kernel, numpy)


@dtypes
def test_poisson(dtype: str) -> None:
    """exp(v) - d v, and exp(v) - d. At an infinite v, twin and kernel agree."""
    loss, phi = registry.loss("poisson"), registry.activation("exponential")
    v = samples.numbers(dtype)
    d = np.random.default_rng(5).poisson(2.0, v.shape).astype(dtype)
    nan = np.full_like(v, np.nan)
    got, twin = (output_delta(b, loss, phi, v, nan, d) for b in (backend(), NumpyBackend()))
    y, condition = evaluate(references.VALUES["exponential"], v.reshape(-1))
    finite = np.isfinite(v).reshape(-1) & (y < np.finfo(dtype).max)
    y, condition = y[finite], condition[finite]
    net_input, target = (a.reshape(-1)[finite].astype(np.longdouble) for a in (v, d))
    for result in (got, twin):
        losses, delta, output = (a.reshape(-1)[finite] for a in result)
        assert_near(losses, y - target * net_input, condition + np.abs(target * net_input))
        assert_near(output, y, condition)
        assert_near(delta, y - target, condition + target)
    for kernel, numpy in zip(got, twin, strict=True):
        assert_same_kind(kernel, numpy)


@orders
@dtypes
def test_order_of_threads_does_not_matter(order: Any, dtype: str) -> None:
    """No thread reads what another writes: one kernel of each sort, bit for bit."""
    v = samples.numbers(dtype)
    results = []
    for b in (backend("forward"), backend(order)):
        y = activate(b, ACTIVATIONS["tanh"], v, samples.like(v[0], 1))[1]
        delta = hidden_delta(b, ACTIVATIONS["tanh"], samples.like(v, 2), y)
        loss = output_delta(b, FREE_LOSSES["huber"], ACTIVATIONS["tanh"], v, y, samples.like(v, 3))
        rows = activate(b, registry.activation("softmax"), samples.like(v, 3), None)[1]
        results.append((y, delta, *loss, rows))
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
