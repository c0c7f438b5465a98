"""The formulas once more, from their definitions and in many digits, and how near a kernel must come to them.

Written with mpmath and without a look at numerical stability: at 60 digits `1 + tanh(u)` may cancel. A kernel must
be within a few units in the last place of what its inputs determine: where the relative error of an input by eps
changes the result by c eps, c is the condition, and the bound is `ULPS` * eps * c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mpmath
import numpy as np

mpmath.mp.dps = 60

ULPS = 8
Number = Any  # mpmath.mpf

SELU_SCALE = mpmath.mpf("1.0507009873554804934193349852946")
SELU_ALPHA = mpmath.mpf("1.6732632423543772848170429916717")
CUBIC = mpmath.mpf("0.044715")


def _logistic(v: Number) -> Number:
    return 1 / (1 + mpmath.exp(-v))


def _gelu_tanh_argument(v: Number) -> Number:
    return 2 * mpmath.sqrt(2 / mpmath.pi) * (v + CUBIC * v**3)


def _gelu_tanh_derivative(v: Number) -> Number:
    p = _logistic(_gelu_tanh_argument(v))
    return p + v * p * (1 - p) * 2 * mpmath.sqrt(2 / mpmath.pi) * (1 + 3 * CUBIC * v**2)


# phi(v)
VALUES: dict[str, Callable[..., Number]] = {
    "identity": lambda v: v,
    "logistic": _logistic,
    "tanh": mpmath.tanh,
    "scaled_tanh": lambda v, a, b: a * mpmath.tanh(b * v),
    "relu": lambda v: max(v, mpmath.mpf(0)),
    "leaky_relu": lambda v, slope: slope * v if v < 0 else v,
    "elu": lambda v, alpha: alpha * mpmath.expm1(v) if v < 0 else v,
    "selu": lambda v: SELU_SCALE * (SELU_ALPHA * mpmath.expm1(v) if v < 0 else v),
    "softplus": lambda v: mpmath.log1p(mpmath.exp(v)) if v < 1000 else v,
    "exponential": mpmath.exp,
    "softsign": lambda v: v / (1 + abs(v)),
    "silu": lambda v: v * _logistic(v),
    "gelu": lambda v: v * mpmath.erfc(-v / mpmath.sqrt(2)) / 2 if abs(v) < 1000 else max(v, mpmath.mpf(0)),
    "gelu_tanh": lambda v: v * _logistic(_gelu_tanh_argument(v)),
    "hard_sigmoid": lambda v: min(max(v / 6 + mpmath.mpf(1) / 2, mpmath.mpf(0)), mpmath.mpf(1)),
}

# phi'(v), written in what the record takes it from: y or v. At a kink it is the left one.
DERIVATIVES: dict[str, Callable[..., Number]] = {
    "identity": lambda y: mpmath.mpf(1),
    "logistic": lambda y: y - y**2,
    "tanh": lambda y: 1 - y**2,
    "scaled_tanh": lambda y, a, b: a * b - b / a * y**2,
    "relu": lambda y: mpmath.mpf(y > 0),
    "leaky_relu": lambda v, slope: slope if v <= 0 else mpmath.mpf(1),
    "elu": lambda y, alpha: y + alpha if y <= 0 else mpmath.mpf(1),
    "selu": lambda y: y + SELU_SCALE * SELU_ALPHA if y <= 0 else SELU_SCALE,
    "softplus": lambda y: -mpmath.expm1(-y),
    "exponential": lambda y: y,
    "softsign": lambda y: (1 - abs(y)) ** 2,
    "silu": lambda v: _logistic(v) + v * _logistic(v) * (1 - _logistic(v)),
    "gelu": lambda v: mpmath.erfc(-v / mpmath.sqrt(2)) / 2 + v * mpmath.npdf(v) if abs(v) < 1000 else mpmath.mpf(v > 0),
    "gelu_tanh": _gelu_tanh_derivative,
    "hard_sigmoid": lambda y: mpmath.mpf(1) / 6 if 0 < y < 1 else mpmath.mpf(0),
}

# phi at minus and plus infinity, and phi' there where it is taken from v.
VALUE_LIMITS: dict[str, Callable[..., tuple[float, float]]] = {
    "identity": lambda: (-np.inf, np.inf),
    "logistic": lambda: (0, 1),
    "tanh": lambda: (-1, 1),
    "scaled_tanh": lambda a, b: (-a, a),
    "relu": lambda: (0, np.inf),
    "leaky_relu": lambda slope: (-np.inf if slope > 0 else np.inf, np.inf),
    "elu": lambda alpha: (-alpha, np.inf),
    "selu": lambda: (-float(SELU_SCALE * SELU_ALPHA), np.inf),
    "softplus": lambda: (0, np.inf),
    "exponential": lambda: (0, np.inf),
    "softsign": lambda: (-1, 1),
    "silu": lambda: (0, np.inf),
    "gelu": lambda: (0, np.inf),
    "gelu_tanh": lambda: (0, np.inf),
    "hard_sigmoid": lambda: (0, 1),
}
DERIVATIVE_LIMITS: dict[str, Callable[..., tuple[float, float]]] = {
    "leaky_relu": lambda slope: (slope, 1),
    "silu": lambda: (0, 1),
    "gelu": lambda: (0, 1),
    "gelu_tanh": lambda: (0, 1),
}


# Where a formula rounds more than its inputs ask for: what is added to the condition.
SLACK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    # 1 - p is off by half a unit of 1, and v multiplies it, until p is 1; no training sees the 20 units
    "silu": lambda v: np.minimum(np.abs(v), 40) / 16,
    "gelu_tanh": lambda v: np.minimum(np.abs(v), 10) / 16,
}


def derivative_and_condition(name: str, xs: np.ndarray, **parameters: Number) -> tuple[np.ndarray, np.ndarray]:
    """phi' of x (y or v), and its condition, in the shape of xs."""
    values, condition = evaluate(lambda x: DERIVATIVES[name](x, **parameters), xs.reshape(-1))
    slack = SLACK[name](xs.astype(np.longdouble)) if name in SLACK else 0
    return values.reshape(xs.shape), condition.reshape(xs.shape) + slack


def _log_cosh(r: Number) -> tuple[Number, Number]:
    far = abs(r) > 1000
    return abs(r) - mpmath.log(2) if far else mpmath.log(mpmath.cosh(r)), mpmath.sign(r) if far else mpmath.tanh(r)


def _squared_hinge(y: Number, d: Number) -> tuple[Number, Number]:
    margin = max(1 - d * y, mpmath.mpf(0))
    return margin**2, -2 * d * margin


def _huber(r: Number, threshold: Number) -> tuple[Number, Number]:
    if abs(r) <= threshold:
        return r**2 / 2, r
    return threshold * (abs(r) - threshold / 2), threshold * mpmath.sign(r)


# The value and dE/dy of a free loss in y and d.
LOSSES: dict[str, Callable[..., tuple[Number, Number]]] = {
    "squared_error": lambda y, d: ((y - d) ** 2 / 2, y - d),
    "mean_absolute_error": lambda y, d: (abs(y - d), mpmath.sign(y - d)),
    "huber": lambda y, d, threshold: _huber(y - d, threshold),
    "log_cosh": lambda y, d: _log_cosh(y - d),
    "squared_hinge": _squared_hinge,
}


Grouped = tuple[list[Number], list[Number], list[Number], list[Number]]


def _quantile(y: list[Number], d: Number, levels: list[Number]) -> Grouped:
    value = sum(max((1 - q) * (a - d), q * (d - a)) for a, q in zip(y, levels, strict=True))
    e = [1 - q if a > d else -q if a < d else mpmath.mpf(0) for a, q in zip(y, levels, strict=True)]
    return [value], [sum(abs(a - d) for a in y)], e, [mpmath.mpf(1)] * len(y)  # 1 - q is of a q that was rounded


def _gaussian_nll(y: list[Number], d: Number, eps: Number) -> Grouped:
    (mean, raw), far = y, 1 + abs(y[1])  # as raw is rounded before exp is taken of it
    variance = mpmath.log1p(mpmath.exp(raw)) + eps
    square, slope = (mean - d) ** 2 / variance, _logistic(raw) / variance / 2
    e = [(mean - d) / variance, slope * (1 - square)]
    size = 1 + abs(mpmath.log(variance)) + square
    return [(mpmath.log(variance) + square) / 2], [size * far], e, [abs(e[0]) * far, slope * (1 + square) * far]


# The value of a loss of several outputs a target, in these and d, and dE/dy; behind each what its rounding scales with.
GROUPED_LOSSES: dict[str, Callable[..., Grouped]] = {
    "quantile": _quantile,
    "gaussian_nll": _gaussian_nll,
}


def evaluate(function: Callable[[Number], Number], xs: Iterable[float]) -> tuple[np.ndarray, np.ndarray]:
    """f(x) and its condition |f(x)| + |x f'(x)|, as long doubles; NaN for an x that is not finite."""
    step = mpmath.mpf(2) ** -60
    values, conditions = [], []
    for x in xs:
        if not np.isfinite(x):
            values.append(np.longdouble(np.nan))
            conditions.append(np.longdouble(0))
            continue
        exact = mpmath.mpf(float(x))
        value = function(exact)
        slope = (function(exact * (1 + step)) - value) / step  # x f'(x): the step is relative
        values.append(long_double(value))
        conditions.append(long_double(abs(value) + abs(slope)))
    return np.array(values), np.array(conditions)


def long_double(x: Number) -> Any:
    high = float(x)
    return (
        np.longdouble(high) + np.longdouble(float(x - mpmath.mpf(high))) if np.isfinite(high) else np.longdouble(high)
    )


def assert_near(got: np.ndarray, wanted: np.ndarray, condition: np.ndarray | float, *, ulps: float = ULPS) -> None:
    """Every element of `got` is what is wanted, within `ulps` units of its dtype times the condition.

    The smallest normal number is allowed beside it, since the device may flush smaller ones to zero. A wanted
    value beyond the largest finite one must come as infinity, or as a value within the bound.
    """
    info = np.finfo(got.dtype)
    assert got.shape == wanted.shape
    with np.errstate(invalid="ignore", over="ignore"):
        bound = ulps * np.longdouble(info.eps) * np.abs(condition) + np.longdouble(info.tiny)
        error = np.abs(got.astype(np.longdouble) - wanted)
        right = (error <= bound) | (np.isnan(got) & np.isnan(wanted)) | (got == wanted)
        beyond = np.isinf(got) & (np.sign(got) == np.sign(wanted)) & (np.abs(wanted) + bound > info.max)
    wrong = np.argwhere(~(right | beyond))
    assert not len(wrong), "\n".join(
        [f"{len(wrong)} of {got.size} wrong"]
        + [
            f"at {tuple(k)}: {got[tuple(k)]!r}, wanted {wanted[tuple(k)]!r}, off by {error[tuple(k)]!r}"
            for k in wrong[:5]
        ]
    )


def assert_same_kind(got: np.ndarray, twin: np.ndarray) -> None:
    """NaN, infinities and their signs stand in the same places."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(twin))
    np.testing.assert_array_equal(np.isposinf(got), np.isposinf(twin))
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(twin))
