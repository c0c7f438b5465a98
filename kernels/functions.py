"""Functions that several formulas share, for CUDA and for NumPy: stable over the whole range.

(The twin of CUDA's `logistic` is scipy.special.expit.)
"""

import numpy as np

CUDA_FUNCTIONS = r"""
// exp of a number that is never positive cannot overflow.
template <typename T> __device__ inline T logistic(T v) {
    const T s = exp(-fabs(v));
    return (v < T(0) ? s : T(1)) / (T(1) + s);
}
// Unlike fmin and fmax, this keeps a NaN.
template <typename T> __device__ inline T clamp(T v, T low, T high) {
    return v < low ? low : (v > high ? high : v);
}
"""


def clamp(v: np.ndarray, low: float, high: float, out: np.ndarray) -> None:
    """`out` = v held between low and high; a NaN stays one."""
    np.maximum(v, low, out=out)
    np.minimum(out, high, out=out)
