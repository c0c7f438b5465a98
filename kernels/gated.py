"""Activations that pass v through a gate between 0 and 1: y = v g(v). silu, gelu and gelu_tanh.

They fall and then rise, so their derivative is taken from the net input.
"""

import math

import numpy as np
from scipy.special import erfc

from gpu_bp.kernels.functions import clamp, logistic
from gpu_bp.spec import Activation, Scratch, Twin

Array = np.ndarray

# Beyond this |v| the sigmoid-like factor of silu and gelu is exactly 0 or 1; holding v there keeps
# infinity from giving infinity times zero.
SATURATED = "T(1e4)"
_SATURATED = 1e4

_SQRT_HALF = math.sqrt(0.5)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


# silu: y = v logistic(v), and gelu_tanh, which is v logistic(2u) with another u -------------------------------
# phi' = p (1 + v (1 - p) 2u'), with p the logistic factor. For gelu_tanh 1/2 (1 + tanh u) is written
# logistic(2u), since 1 + tanh(u) cancels for u far below zero.


def _silu_value(v: Array, y: Array, s: Scratch) -> None:
    np.maximum(v, -_SATURATED, out=s.a)
    logistic(s.a, s.b, s)
    np.multiply(s.a, s.b, out=y)


def _silu_delta(e: Array, v: Array, delta: Array, s: Scratch) -> None:
    clamp(v, -_SATURATED, _SATURATED, out=s.a)
    logistic(s.a, s.b, s)
    np.subtract(1, s.b, out=s.c)
    s.a *= s.c
    s.a += 1
    s.a *= s.b
    np.multiply(e, s.a, out=delta)


silu = Activation(
    name="silu",
    source="Elfwing, Uchibe and Doya (2018)",
    value=Twin(f"const T c = v < -{SATURATED} ? -{SATURATED} : v; y = c * logistic(c);", _silu_value),
    delta=Twin(
        f"const T c = clamp(v, -{SATURATED}, {SATURATED}); const T p = logistic(c);"
        " delta = e * (p * (T(1) + c * (T(1) - p)));",
        _silu_delta,
    ),
    derivative_from="net_input",
)

_TWO_C = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _gelu_tanh_value(v: Array, y: Array, s: Scratch) -> None:
    clamp(v, -_SATURATED, _SATURATED, out=s.c)
    np.multiply(s.c, s.c, out=s.a)
    s.a *= _TWO_C * _CUBIC
    s.a += _TWO_C
    s.a *= s.c
    logistic(s.a, s.b, s)
    np.maximum(v, -_SATURATED, out=s.a)
    np.multiply(s.a, s.b, out=y)


def _gelu_tanh_delta(e: Array, v: Array, delta: Array, s: Scratch) -> None:
    clamp(v, -_SATURATED, _SATURATED, out=s.c)
    np.multiply(s.c, s.c, out=s.a)
    np.multiply(s.a, _TWO_C * _CUBIC, out=s.b)
    s.b += _TWO_C
    s.b *= s.c
    logistic(s.b, s.b, s)  # p
    s.a *= 3 * _TWO_C * _CUBIC
    s.a += _TWO_C  # 2u'
    s.a *= s.c
    np.subtract(1, s.b, out=s.c)
    s.a *= s.c
    s.a += 1
    s.a *= s.b
    np.multiply(e, s.a, out=delta)


_GELU_TANH_P = (
    f"const T c = clamp(v, -{SATURATED}, {SATURATED});"
    f" const T p = logistic(c * (T({_TWO_C}) + T({_TWO_C * _CUBIC}) * c * c));"
)

gelu_tanh = Activation(
    name="gelu_tanh",
    source="Hendrycks and Gimpel (2016), the approximation by tanh",
    value=Twin(f"{_GELU_TANH_P} y = (v < -{SATURATED} ? -{SATURATED} : v) * p;", _gelu_tanh_value),
    delta=Twin(
        f"{_GELU_TANH_P} const T du = T({_TWO_C}) + T({3 * _TWO_C * _CUBIC}) * c * c;"
        " delta = e * (p * (T(1) + c * (T(1) - p) * du));",
        _gelu_tanh_delta,
    ),
    derivative_from="net_input",
)


# gelu: y = v Phi(v), Phi the normal distribution function -------------------------------------------------
# Phi(v) = erfc(-v / sqrt(2)) / 2, since 1 + erf cancels for v far below zero.


def _gelu_value(v: Array, y: Array, s: Scratch) -> None:
    np.maximum(v, -_SATURATED, out=s.a)
    np.multiply(s.a, -_SQRT_HALF, out=s.b)
    erfc(s.b, out=s.b)
    s.b *= 0.5
    np.multiply(s.a, s.b, out=y)


def _gelu_delta(e: Array, v: Array, delta: Array, s: Scratch) -> None:
    clamp(v, -_SATURATED, _SATURATED, out=s.a)
    np.multiply(s.a, -_SQRT_HALF, out=s.b)
    np.multiply(s.b, s.b, out=s.c)
    np.negative(s.c, out=s.c)
    np.exp(s.c, out=s.c)
    s.c *= _INV_SQRT_2PI  # the normal density
    s.c *= s.a
    erfc(s.b, out=s.b)
    s.b *= 0.5
    s.b += s.c
    np.multiply(e, s.b, out=delta)


gelu = Activation(
    name="gelu",
    source="Hendrycks and Gimpel (2016)",
    value=Twin(
        f"const T c = v < -{SATURATED} ? -{SATURATED} : v; y = c * (T(0.5) * erfc(c * T({-_SQRT_HALF})));",
        _gelu_value,
    ),
    delta=Twin(
        f"const T c = clamp(v, -{SATURATED}, {SATURATED}); const T z = c * T({-_SQRT_HALF});"
        f" delta = e * (T(0.5) * erfc(z) + c * (T({_INV_SQRT_2PI}) * exp(-z * z)));",
        _gelu_delta,
    ),
    derivative_from="net_input",
)
