"""Activation functions: value and delta (e * phi'(v)) of each, CUDA text beside its NumPy twin.

To add one: write its record here; the table at the end is what the rest of the package reads.
"""

import numpy as np

from gpu_bp.kernels.functions import choose, clamp, zero_where
from gpu_bp.kernels.functions import logistic as logistic_of
from gpu_bp.kernels.gated import gelu, gelu_tanh, silu
from gpu_bp.kernels.softmax import softmax
from gpu_bp.spec import Activation, Parameter, Scratch, Twin

Array = np.ndarray

HAYKIN = "Haykin, Neural Networks and Learning Machines, 3rd ed., chapter 4"

_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717


def _zero_kink(**_: float) -> tuple[float, ...]:
    return (0.0,)


# identity: y = v ------------------------------------------------------------------------------------------


def _identity_value(v: Array, y: Array, s: Scratch) -> None:
    if y is not v:
        np.copyto(y, v)


def _identity_delta(e: Array, y: Array, delta: Array, s: Scratch) -> None:
    if delta is not e:
        np.copyto(delta, e)


identity = Activation(
    name="identity",
    source=HAYKIN,
    value=Twin("y = v;", _identity_value),
    delta=Twin("delta = e;", _identity_delta),
    derivative_from="output",
)


# logistic: y = 1 / (1 + exp(-v)) --------------------------------------------------------------------------


def _logistic_value(v: Array, y: Array, s: Scratch) -> None:
    logistic_of(v, y, s)


def _logistic_delta(e: Array, y: Array, delta: Array, s: Scratch) -> None:
    np.subtract(s.one, y, out=s.a)
    s.a *= y
    np.multiply(e, s.a, out=delta)


logistic = Activation(
    name="logistic",
    source=HAYKIN,
    value=Twin("y = logistic(v);", _logistic_value),
    delta=Twin("delta = e * (y * (T(1) - y));", _logistic_delta),
    derivative_from="output",
)


# tanh and Haykin's scaled tanh: y = a tanh(b v) -----------------------------------------------------------
# (1 - y)(1 + y) rather than 1 - y^2: the subtraction is exact near saturation.


def _tanh_value(v: Array, y: Array, s: Scratch) -> None:
    np.tanh(v, out=y)


def _tanh_delta(e: Array, y: Array, delta: Array, s: Scratch) -> None:
    np.subtract(s.one, y, out=s.a)
    np.add(s.one, y, out=s.b)
    s.a *= s.b
    np.multiply(e, s.a, out=delta)


tanh = Activation(
    name="tanh",
    source=HAYKIN + ", with a = b = 1",
    value=Twin("y = tanh(v);", _tanh_value),
    delta=Twin("delta = e * ((T(1) - y) * (T(1) + y));", _tanh_delta),
    derivative_from="output",
)


def _scaled_tanh_value(v: Array, y: Array, s: Scratch, a: float, b: float) -> None:
    np.multiply(v, b, out=y)
    np.tanh(y, out=y)
    y *= a


def _scaled_tanh_delta(e: Array, y: Array, delta: Array, s: Scratch, a: float, b: float) -> None:
    np.subtract(a, y, out=s.a)
    np.add(a, y, out=s.b)
    s.a *= s.b
    s.a *= b / a
    np.multiply(e, s.a, out=delta)


scaled_tanh = Activation(
    name="scaled_tanh",
    source=HAYKIN + "; LeCun (1993): phi(1) = 1, phi(-1) = -1",
    parameters={"a": Parameter(1.7159, "(0, inf)"), "b": Parameter(2 / 3, "(0, inf)")},
    value=Twin("y = a * tanh(b * v);", _scaled_tanh_value),
    delta=Twin("delta = e * ((a - y) * (a + y) * (b / a));", _scaled_tanh_delta),
    derivative_from="output",
)


# relu and leaky relu: y = v, and 0 or slope * v below zero ------------------------------------------------
# At the kink the derivative is the left one. Comparisons are written so that a NaN stays a NaN.


def _relu_value(v: Array, y: Array, s: Scratch) -> None:
    np.maximum(v, s.zeros, out=y)


def _relu_delta(e: Array, y: Array, delta: Array, s: Scratch) -> None:
    np.less_equal(y, s.zeros, out=s.mask)
    zero_where(s.mask, e, delta, s)


relu = Activation(
    name="relu",
    source="Nair and Hinton (2010)",
    value=Twin("y = v < T(0) ? T(0) : v;", _relu_value),
    delta=Twin("delta = y <= T(0) ? T(0) : e;", _relu_delta),
    derivative_from="output",
    kinks=_zero_kink,
)


def _leaky_relu_value(v: Array, y: Array, s: Scratch, slope: float) -> None:
    np.minimum(v, s.zeros, out=s.a)
    s.a *= slope
    np.maximum(v, s.zeros, out=y)
    y += s.a


def _leaky_relu_delta(e: Array, v: Array, delta: Array, s: Scratch, slope: float) -> None:
    np.less_equal(v, s.zeros, out=s.mask)
    np.multiply(e, slope, out=s.b)
    choose(s.mask, s.b, e, delta, s)


leaky_relu = Activation(
    name="leaky_relu",
    source="Maas, Hannun and Ng (2013)",
    parameters={"slope": Parameter(0.01)},
    value=Twin("y = v < T(0) ? slope * v : v;", _leaky_relu_value),
    delta=Twin("delta = v <= T(0) ? slope * e : e;", _leaky_relu_delta),
    derivative_from="net_input",  # a negative slope hides the sign of v from y
    kinks=_zero_kink,
)


# elu, selu: y = scale * v, and scale * alpha * (exp(v) - 1) below zero ------------------------------------
# expm1, because exp(v) - 1 cancels near zero. Below zero phi' = scale * alpha * exp(v) = y + scale * alpha.


def _elu(v: Array, y: Array, s: Scratch, scale: float, alpha: float) -> None:
    np.minimum(v, s.zeros, out=s.a)
    np.expm1(s.a, out=s.a)
    s.a *= alpha
    np.maximum(v, s.zeros, out=y)
    y += s.a
    if scale != 1:
        y *= scale


def _elu_delta(e: Array, y: Array, delta: Array, s: Scratch, scale: float, alpha: float) -> None:
    np.less_equal(y, s.zeros, out=s.mask)
    np.add(y, scale * alpha, out=s.b)
    s.b *= e
    np.multiply(e, scale, out=delta)
    choose(s.mask, s.b, delta, delta, s)


elu = Activation(
    name="elu",
    source="Clevert, Unterthiner and Hochreiter (2016)",
    parameters={"alpha": Parameter(1.0, "(0, inf)")},
    value=Twin(
        "y = v < T(0) ? alpha * expm1(v) : v;",
        lambda v, y, s, alpha: _elu(v, y, s, 1.0, alpha),
    ),
    delta=Twin(
        "delta = y <= T(0) ? e * (y + alpha) : e;",
        lambda e, y, delta, s, alpha: _elu_delta(e, y, delta, s, 1.0, alpha),
    ),
    derivative_from="output",
    kinks=_zero_kink,
)

selu = Activation(
    name="selu",
    source="Klambauer et al. (2017)",
    value=Twin(
        f"y = T({_SELU_SCALE}) * (v < T(0) ? T({_SELU_ALPHA}) * expm1(v) : v);",
        lambda v, y, s: _elu(v, y, s, _SELU_SCALE, _SELU_ALPHA),
    ),
    delta=Twin(
        f"delta = y <= T(0) ? e * (y + T({_SELU_SCALE * _SELU_ALPHA})) : e * T({_SELU_SCALE});",
        lambda e, y, delta, s: _elu_delta(e, y, delta, s, _SELU_SCALE, _SELU_ALPHA),
    ),
    derivative_from="output",
    kinks=_zero_kink,
)


# softplus: y = log(1 + exp(v)) ----------------------------------------------------------------------------


def _softplus_value(v: Array, y: Array, s: Scratch) -> None:
    np.logaddexp(v, 0, out=y)


def _softplus_delta(e: Array, y: Array, delta: Array, s: Scratch) -> None:
    np.negative(y, out=s.a)
    np.expm1(s.a, out=s.a)
    np.negative(s.a, out=s.a)
    np.multiply(e, s.a, out=delta)


softplus = Activation(
    name="softplus",
    source="Dugas et al. (2001)",
    value=Twin("y = softplus(v);", _softplus_value),
    # phi' = logistic(v) = 1 - exp(-y)
    delta=Twin("delta = e * -expm1(-y);", _softplus_delta),
    derivative_from="output",
)


# exponential: y = exp(v), the rate of a Poisson variable ---------------------------------------------------


def _exponential_value(v: Array, y: Array, s: Scratch) -> None:
    np.exp(v, out=y)


def _exponential_delta(e: Array, y: Array, delta: Array, s: Scratch) -> None:
    np.multiply(e, y, out=delta)


exponential = Activation(
    name="exponential",
    source="McCullagh and Nelder, Generalized Linear Models: the inverse of the log link",
    value=Twin("y = exp(v);", _exponential_value),
    delta=Twin("delta = e * y;", _exponential_delta),
    derivative_from="output",
)


# softsign: y = v / (1 + |v|) ------------------------------------------------------------------------------
# Beyond 1e30 the quotient rounds to 1 or -1; holding v there keeps infinity over infinity away.


def _softsign_value(v: Array, y: Array, s: Scratch) -> None:
    clamp(v, -1e30, 1e30, out=y)
    np.abs(y, out=s.a)
    s.a += 1
    y /= s.a


def _softsign_delta(e: Array, y: Array, delta: Array, s: Scratch) -> None:
    np.abs(y, out=s.a)
    np.subtract(1, s.a, out=s.a)
    s.a *= s.a
    np.multiply(e, s.a, out=delta)


softsign = Activation(
    name="softsign",
    source="Turian, Bergstra and Bengio (2009)",
    value=Twin("const T c = clamp(v, T(-1e30), T(1e30)); y = c / (T(1) + fabs(c));", _softsign_value),
    delta=Twin("const T r = T(1) - fabs(y); delta = e * (r * r);", _softsign_delta),
    derivative_from="output",
    kinks=_zero_kink,  # the second derivative jumps
)


# hard sigmoid: y = v / 6 + 1 / 2, held between 0 and 1 ----------------------------------------------------


def _hard_sigmoid_value(v: Array, y: Array, s: Scratch) -> None:
    np.multiply(v, 1 / 6, out=y)
    y += 0.5
    clamp(y, 0, 1, out=y)


def _hard_sigmoid_delta(e: Array, y: Array, delta: Array, s: Scratch) -> None:
    np.multiply(e, 1 / 6, out=delta)
    np.less_equal(y, s.zeros, out=s.mask)
    zero_where(s.mask, delta, delta, s)
    np.greater_equal(y, 1, out=s.mask)
    zero_where(s.mask, delta, delta, s)


hard_sigmoid = Activation(
    name="hard_sigmoid",
    source="Courbariaux, Bengio and David (2015); the slope 1/6 as in MobileNetV3",
    value=Twin(f"y = clamp(v * T({1 / 6}) + T(0.5), T(0), T(1));", _hard_sigmoid_value),
    delta=Twin(f"delta = y <= T(0) || y >= T(1) ? T(0) : e * T({1 / 6});", _hard_sigmoid_delta),
    derivative_from="output",
    kinks=lambda: (-3.0, 3.0),
)


ACTIVATIONS = (
    identity,
    logistic,
    tanh,
    scaled_tanh,
    relu,
    leaky_relu,
    elu,
    selu,
    softplus,
    exponential,
    softsign,
    silu,
    gelu,
    gelu_tanh,
    hard_sigmoid,
)
ROW_ACTIVATIONS = (softmax,)
ALIASES = {"sigmoid": "logistic", "linear": "identity"}
