"""Losses: value and output delta of each, together; CUDA text beside its NumPy twin.

A row's loss is the sum over its outputs. To add one: write its record here (one of several outputs a target in
`grouped.py`); the table at the end is what the rest of the package reads.
"""

import math

import numpy as np

from gpu_bp.kernels.functions import clamp, logistic, zero_where
from gpu_bp.kernels.grouped import gaussian_nll, quantile
from gpu_bp.kernels.softmax import SOFTMAX_CUDA, softmax_rows
from gpu_bp.spec import FreeLoss, FusedLoss, Parameter, Scratch, Twin

Array = np.ndarray


# squared error: 1/2 (d - y)^2 -----------------------------------------------------------------------------


def _squared_error(y: Array, d: Array, loss: Array, e: Array, s: Scratch) -> None:
    np.subtract(y, d, out=e)
    np.multiply(e, s.half, out=loss)
    loss *= e


squared_error = FreeLoss(
    name="squared_error",
    source="Haykin, Neural Networks and Learning Machines, 3rd ed., chapter 4",
    targets="real",
    error_signal=Twin("const T r = y - d; loss = T(0.5) * r * r; e = r;", _squared_error),
)


# mean absolute error: |d - y|, the mean being taken over the rows of a batch ------------------------------


def _absolute_error(y: Array, d: Array, loss: Array, e: Array, s: Scratch) -> None:
    np.subtract(y, d, out=e)
    np.abs(e, out=loss)
    np.sign(e, out=e)


mean_absolute_error = FreeLoss(
    name="mean_absolute_error",
    source="Laplace (1774)",
    targets="real",
    error_signal=Twin(
        # the last branch is 0 for an exact hit and keeps a NaN
        "const T r = y - d; loss = fabs(r); e = r > T(0) ? T(1) : (r < T(0) ? T(-1) : r);",
        _absolute_error,
    ),
    kinks=lambda: (0.0,),
)


# huber: 1/2 r^2 up to |r| = threshold, linear beyond; with e = r held there it is e (r - e/2) in both parts ----


def _huber(y: Array, d: Array, loss: Array, e: Array, s: Scratch, threshold: float) -> None:
    np.subtract(y, d, out=s.a)
    clamp(s.a, -threshold, threshold, out=e)
    np.multiply(e, -0.5, out=loss)
    loss += s.a
    loss *= e


huber = FreeLoss(
    name="huber",
    source="Huber (1964)",
    parameters={"threshold": Parameter(1.0, "(0, inf)")},
    targets="real",
    error_signal=Twin(
        "const T r = y - d; e = clamp(r, -threshold, threshold); loss = e * (r - T(0.5) * e);",
        _huber,
    ),
    kinks=lambda threshold: (-threshold, threshold),
)


# log cosh: log cosh r for r = y - d; near 0 like r^2 / 2, far out like |r| - log 2 -------------------------
# Near 0 as log(1 + 2 sinh^2(r / 2)), where nothing cancels; beyond 1 without cosh, which would overflow.


def _log_cosh(y: Array, d: Array, loss: Array, e: Array, s: Scratch) -> None:
    np.subtract(y, d, out=e)
    np.abs(e, out=s.a)
    np.tanh(e, out=e)
    np.less(s.a, 1, out=s.mask)
    np.minimum(s.a, 1, out=s.b)
    s.b *= 0.5
    np.sinh(s.b, out=s.b)
    s.b *= s.b
    s.b *= 2
    np.log1p(s.b, out=s.b)
    np.multiply(s.a, -2, out=loss)
    np.exp(loss, out=loss)
    np.log1p(loss, out=loss)
    s.a -= math.log(2)
    loss += s.a
    np.copyto(loss, s.b, where=s.mask)


log_cosh = FreeLoss(
    name="log_cosh",
    source="Green (1990), as the penalty of a reconstruction",
    targets="real",
    error_signal=Twin(
        "const T r = y - d; const T a = fabs(r); e = tanh(r);"
        " if (a < T(1)) { const T h = sinh(T(0.5) * a); loss = log1p(T(2) * (h * h)); }"
        f" else loss = (a - T({math.log(2)!r})) + log1p(exp(T(-2) * a));",
        _log_cosh,
    ),
)


# squared hinge: max(0, 1 - d y)^2, d being -1 or 1 --------------------------------------------------------


def _squared_hinge(y: Array, d: Array, loss: Array, e: Array, s: Scratch) -> None:
    np.multiply(d, y, out=s.a)
    np.subtract(1, s.a, out=s.a)
    np.maximum(s.a, 0, out=s.a)
    np.multiply(s.a, s.a, out=loss)
    np.multiply(d, -2, out=s.b)
    np.multiply(s.b, s.a, out=e)


squared_hinge = FreeLoss(
    name="squared_hinge",
    source="Tang (2013)",
    targets="signs",
    error_signal=Twin(
        "const T r = T(1) - d * y; const T m = r < T(0) ? T(0) : r; loss = m * m; e = T(-2) * d * m;",
        _squared_hinge,
    ),
    kinks=lambda: (0.0,),  # d y is 1 where y is d
)


# poisson: y - d v, the negative log likelihood of counts d less log d!, with y = exp(v) -------------------


def _poisson(v: Array, d: Array, y: Array, loss: Array, delta: Array, s: Scratch) -> None:
    np.exp(v, out=y)
    np.multiply(d, v, out=loss)
    np.subtract(y, loss, out=loss)
    np.subtract(y, d, out=delta)


poisson = FusedLoss(
    name="poisson",
    source="McCullagh and Nelder, Generalized Linear Models, chapter 6",
    targets="counts",
    output_activation="exponential",
    delta=Twin("y = exp(v); loss = y - d * v; delta = y - d;", _poisson),
)


# label smoothing: d (1 - s) + s / n, so that a network need not be certain of a class, one of n --------------

LABEL_SMOOTHING = {"label_smoothing": Parameter(0.0, "[0, 1)")}  # Szegedy et al. (2016)


def _smoothed(d: Array, label_smoothing: float, n: int, out: Array) -> None:
    np.multiply(d, 1 - label_smoothing, out=out)
    out += label_smoothing / n


# binary cross-entropy: -d log y - (1 - d) log(1 - y), y = logistic(v); as many labels as outputs ----------
# In v it is (1 - d) max(v, 0) + d max(-v, 0) + log(1 + exp(-|v|)): no term is negative, so nothing cancels.


def _binary_cross_entropy(
    v: Array, d: Array, y: Array, loss: Array, delta: Array, s: Scratch, label_smoothing: float
) -> None:
    _smoothed(d, label_smoothing, 2, out=delta)  # holds d until the end
    d = delta
    np.abs(v, out=s.a)
    np.negative(s.a, out=s.a)
    np.exp(s.a, out=s.a)
    np.log1p(s.a, out=s.a)
    np.maximum(v, 0, out=s.b)
    np.negative(v, out=s.c)
    np.maximum(s.c, 0, out=s.c)  # not max(v, 0) - v, which is NaN at infinity
    logistic(v, y, s)
    np.subtract(1, d, out=loss)
    loss *= s.b
    s.c *= d
    loss += s.c
    loss += s.a
    np.subtract(y, d, out=delta)


binary_cross_entropy = FusedLoss(
    name="binary_cross_entropy",
    source="Bishop, Pattern Recognition and Machine Learning, section 4.3.2",
    parameters=LABEL_SMOOTHING,
    targets="unit",
    output_activation="logistic",
    delta=Twin(
        "const T t = d * (T(1) - label_smoothing) + label_smoothing / T(2);"
        " y = logistic(v); delta = y - t; const T up = v < T(0) ? T(0) : v; const T down = v < T(0) ? -v : T(0);"
        " loss = (T(1) - t) * up + t * down + log1p(exp(-fabs(v)));",
        _binary_cross_entropy,
    ),
)


# cross-entropy: -sum_j d_j log y_j, y = softmax(v) --------------------------------------------------------
# With log y_j = v_j - top - log(sum): the logarithm is never taken of a y_j that has gone to zero. Where d_j is 0
# the term is 0, however far v_j lies below the top (minus infinity times 0 would be NaN).


def _cross_entropy(v: Array, d: Array, y: Array, loss: Array, delta: Array, s: Scratch, label_smoothing: float) -> None:
    softmax_rows(v, y, s)
    np.log(s.row_b, out=s.row_b)
    n = v.shape[1]
    if d.ndim == 1:  # class indices: d_j is 1 in column d, 0 elsewhere, before they are smoothed
        np.add(s.row_start, d, out=s.row_index)
        values = loss.reshape(-1)
        v.reshape(-1).take(s.row_index, out=values, mode="clip")
        np.subtract(s.row_a, loss, out=loss)
        if label_smoothing:
            loss *= 1 - label_smoothing
            np.subtract(s.row_a, v, out=delta)
            np.add.reduce(delta, axis=1, keepdims=True, out=s.row_a)
            s.row_a *= label_smoothing / n
            loss += s.row_a
        loss += s.row_b
        if label_smoothing:
            np.subtract(y, label_smoothing / n, out=delta)
        else:
            np.copyto(delta, y)
        flat, own = delta.reshape(-1), s.row_a.reshape(-1)
        flat.take(s.row_index, out=own, mode="clip")
        own -= 1 - label_smoothing
        flat[s.row_index] = own
    else:
        _smoothed(d, label_smoothing, n, out=s.a)
        d = s.a
        np.subtract(v, s.row_a, out=delta)
        delta -= s.row_b
        delta *= d
        np.equal(d, 0, out=s.mask)  # d is s.a, which is used up
        d = s.b
        np.copyto(d, s.a)
        zero_where(s.mask, delta, delta, s)
        np.add.reduce(delta, axis=1, keepdims=True, out=loss)
        np.negative(loss, out=loss)
        np.subtract(y, d, out=delta)


cross_entropy = FusedLoss(
    name="cross_entropy",
    source="Bridle (1990); Bishop, Pattern Recognition and Machine Learning, section 4.3.4",
    parameters=LABEL_SMOOTHING,
    targets="classes",
    least_outputs=2,
    output_activation="softmax",
    per_row=True,
    delta=Twin(
        SOFTMAX_CUDA
        + """
const T log_sum = log(sum);
T row_loss = T(0);
for (int j = lane; j < n; j += 32) {
    const T d = TARGET(j) * (T(1) - label_smoothing) + label_smoothing / T(n);
    delta[j] = y[j] - d;
    if (d != T(0)) row_loss += d * (log_sum + (top - v[j]));
}
row_loss = warp_sum(row_loss);
if (lane == 0) *loss = row_loss;
""",
        _cross_entropy,
    ),
)


LOSSES = (
    squared_error,
    mean_absolute_error,
    huber,
    log_cosh,
    squared_hinge,
    poisson,
    cross_entropy,
    binary_cross_entropy,
    quantile,
    gaussian_nll,
)
ALIASES: dict[str, str] = {}
