"""Functions that several formulas share, for CUDA and for NumPy: stable over the whole range.

(The twin of CUDA's `softplus(v)` is numpy.logaddexp(v, 0); of its `sinpi` and `cospi`, which CUDA has, `sincospi`.)
"""

import numpy as np

from gpu_bp.spec import Scratch

CUDA_FUNCTIONS = r"""
// exp of a number that is never positive cannot overflow.
template <typename T> __device__ inline T logistic(T v) {
    const T s = exp(-fabs(v));
    return (v < T(0) ? s : T(1)) / (T(1) + s);
}
// log(1 + exp(v)): exp of a negative number cannot overflow, and log1p keeps what is left for v far below zero.
template <typename T> __device__ inline T softplus(T v) {
    return (v < T(0) ? T(0) : v) + log1p(exp(-fabs(v)));
}
// Unlike fmin and fmax, this keeps a NaN.
template <typename T> __device__ inline T clamp(T v, T low, T high) {
    return v < low ? low : (v > high ? high : v);
}
"""


def cuda_sign(x: str) -> str:
    """CUDA text for the sign of a variable, 0 where it is 0; a NaN stays one. Its twin is numpy.sign."""
    return f"({x} > T(0) ? T(1) : ({x} < T(0) ? T(-1) : {x}))"


def clamp(v: np.ndarray, low: float, high: float, out: np.ndarray) -> None:
    """`out` = v held between low and high; a NaN stays one."""
    np.maximum(v, low, out=out)
    np.minimum(out, high, out=out)


def logistic(v: np.ndarray, out: np.ndarray, s: Scratch) -> None:
    """`out` = 1 / (1 + exp(-v)), 0 where exp overflows. (scipy.special.expit, without vector code, is much slower.)"""
    np.negative(v, out=out)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += s.one
    np.reciprocal(out, out=out)


# NumPy writes under a mask (`where=`) element by element, at a tenth of the speed of these.


def zero_where(mask: np.ndarray, x: np.ndarray, out: np.ndarray, s: Scratch) -> None:
    """`out` = 0 where the mask is set, else x, whatever that is. Uses s.a."""
    np.copyto(s.bits, mask)
    np.subtract(s.bits, 1, out=s.bits)  # no bit, or all of them
    np.bitwise_and(x.view(s.bits.dtype), s.bits, out=out.view(s.bits.dtype))


def choose(mask: np.ndarray, x: np.ndarray, other: np.ndarray, out: np.ndarray, s: Scratch) -> None:
    """`out` = x where the mask is set, else `other`. Uses s.a, and changes x."""
    bits = s.bits.dtype
    zero_where(mask, other, out, s)
    np.invert(s.bits, out=s.bits)
    np.bitwise_and(x.view(bits), s.bits, out=x.view(bits))
    np.bitwise_or(out.view(bits), x.view(bits), out=out.view(bits))


def sincospi(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sin(pi x) and cos(pi x), float64, to a few units in the last place even beside their zeros.

    x less the nearest half is exact, and pi times that at most a quarter of pi.
    """
    halves = np.rint(2 * x)
    angle = np.pi * (x - 0.5 * halves)
    sine, cosine = np.sin(angle), np.cos(angle)
    quarter = halves.astype(np.int64) & 3
    odd = (quarter & 1) == 1
    return (
        np.where(odd, cosine, sine) * (1 - (quarter & 2)),
        np.where(odd, sine, cosine) * (1 - ((quarter + 1) & 2)),
    )
