"""Activation records against mpmath: values and derivatives over the whole range, in both precisions."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_bp import registry
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.spec import Activation

mpmath.mp.dps = 60


def _elu(v: mpmath.mpf, scale: float, alpha: float) -> mpmath.mpf:
    return scale * (v if v > 0 else alpha * mpmath.expm1(v))


def _gelu_tanh(v: mpmath.mpf) -> mpmath.mpf:
    u = mpmath.sqrt(2 / mpmath.pi) * (v + mpmath.mpf("0.044715") * v**3)
    return v / (1 + mpmath.exp(-2 * u))  # v / 2 (1 + tanh u), which no number of digits computes far below zero


def _hard_sigmoid(v: mpmath.mpf) -> mpmath.mpf:
    return min(max(v / 6 + mpmath.mpf(1) / 2, mpmath.mpf(0)), mpmath.mpf(1))


# phi(v) from its definition; the derivative is taken from it numerically, at 60 digits.
DEFINITIONS = {
    "identity": lambda v: v,
    "logistic": lambda v: 1 / (1 + mpmath.exp(-v)),
    "tanh": mpmath.tanh,
    "scaled_tanh": lambda v: mpmath.mpf(1.7159) * mpmath.tanh(mpmath.mpf(2 / 3) * v),
    "relu": lambda v: max(v, mpmath.mpf(0)),
    "leaky_relu": lambda v: v if v > 0 else mpmath.mpf(0.01) * v,
    "elu": lambda v: _elu(v, 1, 1),
    "selu": lambda v: _elu(v, 1.0507009873554805, 1.6732632423543772),
    "softplus": lambda v: mpmath.log1p(mpmath.exp(v)),
    "exponential": mpmath.exp,
    "softsign": lambda v: v / (1 + abs(v)),
    "silu": lambda v: v / (1 + mpmath.exp(-v)),
    "gelu": lambda v: v * mpmath.ncdf(v),
    "gelu_tanh": _gelu_tanh,
    "hard_sigmoid": _hard_sigmoid,
}
RECORDS = {record.name: record for record in registry.ACTIVATIONS.values() if isinstance(record, Activation)}
DTYPES = ("float32", "float64")
POINTS = [sign * v for v in (1e-30, 1e-8, 1e-3, 0.1, 0.5, 1, 2, 3.3, 5, 9, 15, 30, 80, 300) for sign in (1, -1)]

# At the ends: phi(-inf), phi(inf), phi'(-inf), phi'(inf).
LIMITS = {
    "identity": (-math.inf, math.inf, 1, 1),
    "logistic": (0, 1, 0, 0),
    "tanh": (-1, 1, 0, 0),
    "scaled_tanh": (-1.7159, 1.7159, 0, 0),
    "relu": (0, math.inf, 0, 1),
    "leaky_relu": (-math.inf, math.inf, 0.01, 1),
    "elu": (-1, math.inf, 0, 1),
    "selu": (-1.0507009873554805 * 1.6732632423543772, math.inf, 0, 1.0507009873554805),
    "softplus": (0, math.inf, 0, 1),
    "exponential": (0, math.inf, 0, math.inf),
    "softsign": (-1, 1, 0, 0),
    "silu": (0, math.inf, 0, 1),
    "gelu": (0, math.inf, 0, 1),
    "gelu_tanh": (0, math.inf, 0, 1),
    "hard_sigmoid": (0, 1, 0, 0),
}


def value_and_derivative(backend: Backend, record: Activation, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    net_input, output = backend.to_device(v[:, None]), backend.to_device(np.full_like(v, np.nan)[:, None])
    backend.activate(record, net_input, None, output)
    delta = backend.to_device(np.ones_like(v)[:, None])
    backend.hidden_delta(record, delta, net_input, output, delta)
    return backend.to_host(output)[:, 0], backend.to_host(delta)[:, 0]


def test_every_record_has_a_definition() -> None:
    assert set(DEFINITIONS) == set(LIMITS) == set(RECORDS)
    assert registry.ACTIVATIONS["sigmoid"] is registry.ACTIVATIONS["logistic"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECORDS)
def test_value_and_derivative(backend: Backend, name: str, dtype: str) -> None:
    points = [v for v in POINTS if not (name == "exponential" and v > 80)]  # it overflows float32
    v = np.array(points, dtype)
    y, slope = value_and_derivative(backend, RECORDS[name], v)
    epsilon = float(np.finfo(dtype).eps)
    smallest = float(np.finfo(dtype).tiny)
    for x, computed, computed_slope in zip(v, y, slope, strict=True):
        exact_v = mpmath.mpf(float(x))
        exact = DEFINITIONS[name](exact_v)
        exact_slope = mpmath.diff(DEFINITIONS[name], exact_v, h=abs(exact_v) * mpmath.mpf("1e-20"))
        # a few roundings, and one of v as the function magnifies it: far out, gelu falls like exp(-v^2 / 2)
        bound = epsilon * (16 * abs(exact) + 2 * abs(exact_v * exact_slope)) + smallest
        assert abs(computed - exact) <= bound, (name, x, computed, exact)
        # A derivative taken from a saturated y is as good as 1 - |y| is: absolute, not relative.
        bound = 32 * epsilon * max(abs(exact_slope), 1) + smallest
        assert abs(computed_slope - exact_slope) <= bound, (name, x, computed_slope, exact_slope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECORDS)
def test_ends_of_the_range(backend: Backend, name: str, dtype: str) -> None:
    """Infinities give the limits, the largest numbers nothing worse, and a NaN stays one."""
    largest = float(np.finfo(dtype).max)
    ends = np.array([-math.inf, math.inf, -largest, largest], dtype)
    with np.errstate(over="ignore"):  # selu's factor carries the largest number to infinity
        y, slope = value_and_derivative(backend, RECORDS[name], ends)
    low, high, low_slope, high_slope = LIMITS[name]
    np.testing.assert_allclose(y[:2], np.array([low, high], dtype), rtol=1e-6)
    np.testing.assert_allclose(slope, [low_slope, high_slope] * 2, rtol=1e-6, atol=1e-6)
    assert not np.isnan(y).any()
    with np.errstate(invalid="ignore"):
        y, _ = value_and_derivative(backend, RECORDS[name], np.array([math.nan], dtype))
    assert np.isnan(y).all()


@pytest.mark.parametrize("name", RECORDS)
def test_output_may_take_the_place_of_the_net_input(backend: Backend, name: str) -> None:
    v = np.linspace(-4, 4, 33).reshape(11, 3)
    apart, together = backend.to_device(np.empty_like(v)), backend.to_device(v)
    backend.activate(RECORDS[name], backend.to_device(v), None, apart)
    backend.activate(RECORDS[name], together, None, together)
    np.testing.assert_array_equal(backend.to_host(together), backend.to_host(apart))


@pytest.mark.parametrize("name", RECORDS)
def test_large_arrays_are_worked_on_in_slices(name: str) -> None:
    """Slices give what one call of the twin gives, biases and a short last slice included."""
    backend, rng = NumpyBackend(), np.random.default_rng(0)
    v, bias = rng.standard_normal((5001, 17)), rng.standard_normal(17)
    output = np.empty_like(v)
    backend.activate(RECORDS[name], v.copy(), bias, output)
    for rows in (slice(0, 1), slice(2400, 2410), slice(4990, 5001)):
        part = np.empty_like(v[rows])
        backend.activate(RECORDS[name], v[rows].copy(), bias, part)
        np.testing.assert_array_equal(output[rows], part)


@given(st.floats(-700, 700), st.floats(-700, 700))
def test_activations_that_rise_never_fall(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    falling = {"silu", "gelu", "gelu_tanh"}
    for name in RECORDS.keys() - falling:
        y, slope = value_and_derivative(NumpyBackend(), RECORDS[name], np.array([low, high]))
        assert y[0] <= y[1]
        assert (slope >= 0).all()


def test_haykins_scaled_tanh() -> None:
    """phi(1) = 1 and phi(-1) = -1, and the slope at the origin is 1.1424 (Haykin, chapter 4)."""
    y, slope = value_and_derivative(NumpyBackend(), RECORDS["scaled_tanh"], np.array([-1.0, 0.0, 1.0]))
    np.testing.assert_allclose(y, [-1, 0, 1], atol=1e-4)
    assert slope[1] == pytest.approx(1.1424, abs=2e-3)


def test_softmax(backend: Backend) -> None:
    v = np.array([[1.0, 2.0, 3.0], [1000.0, 1000.0, -1000.0], [-5000.0, 0.0, -5000.0]])
    output = backend.to_device(np.empty_like(v))
    backend.activate(registry.activation("softmax"), backend.to_device(v), backend.to_device(np.zeros(3)), output)
    total = math.exp(1) + math.exp(2) + math.exp(3)
    expected = [[math.exp(k) / total for k in (1, 2, 3)], [0.5, 0.5, 0], [0, 1, 0]]
    np.testing.assert_allclose(backend.to_host(output), expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("tahn", {}, "did you mean tanh"),
        ("elu", {"slope": 1.0}, "elu has no parameter 'slope'; known: alpha"),
        ("elu", {"alpha": -1.0}, r"alpha of elu must be a number in \(0, inf\), not -1.0"),
        ("leaky_relu", {"slope": "steep"}, "must be a number"),
        ("leaky_relu", {"slope": math.nan}, "must be a number"),
    ],
)
def test_errors(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(registry.UserError, match=message):
        registry.activation(name, **parameters)
