"""Layer normalisation: v_j = gain_j (u_j - mean) / sqrt(variance + eps) + bias_j, over the units j of a row.

u is the product of weights and inputs, v the net input of the activation (Ba, Kiros and Hinton, 2016). x, the
normalised u, is kept, and the row's scale 1 / sqrt(variance + eps): with them the way back is

    d = gain dE/dv        dE/du = scale (d - mean(d) - x mean(d x))

CUDA: the bodies of kernels in which one warp handles one row of n columns, `lane` by `lane`. The variance is that of
the row itself, divided by n, and taken about its mean: so nothing cancels.
"""

import numpy as np

from gpu_bp.spec import Scratch, Twin

Array = np.ndarray
EPS = 1e-5


def _normalise(x: Array, gains: Array, biases: Array | None, scale: Array, v: Array, s: Scratch) -> None:
    n = x.shape[1]
    np.add.reduce(x, axis=1, keepdims=True, out=s.row_a)
    s.row_a /= n
    x -= s.row_a
    np.multiply(x, x, out=s.a)
    np.add.reduce(s.a, axis=1, keepdims=True, out=s.row_a)
    s.row_a /= n
    s.row_a += EPS
    np.sqrt(s.row_a, out=s.row_a)
    np.divide(1, s.row_a, out=scale)
    x *= scale
    np.multiply(x, gains, out=v)
    if biases is not None:
        v += biases


def _normalise_delta(delta: Array, x: Array, scale: Array, gains: Array, s: Scratch) -> None:
    n = x.shape[1]
    delta *= gains
    np.add.reduce(delta, axis=1, keepdims=True, out=s.row_a)
    s.row_a /= n
    np.multiply(delta, x, out=s.a)
    np.add.reduce(s.a, axis=1, keepdims=True, out=s.row_b)
    s.row_b /= n
    np.multiply(x, s.row_b, out=s.a)
    delta -= s.row_a
    delta -= s.a
    delta *= scale


# u stands in x, which it leaves as the normalised u.
normalise = Twin(
    f"""
T sum = T(0);
for (int j = lane; j < n; j += 32) sum += x[j];
const T mean = warp_sum(sum) / T(n);
T squares = T(0);
for (int j = lane; j < n; j += 32) {{ x[j] -= mean; squares += x[j] * x[j]; }}
const T s = T(1) / sqrt(warp_sum(squares) / T(n) + T({EPS}));
for (int j = lane; j < n; j += 32) {{ x[j] *= s; v[j] = x[j] * gains[j] + BIAS(j); }}
if (lane == 0) *scale = s;
""",
    _normalise,
)

# dE/dv stands in delta, which it leaves as dE/du.
normalise_delta = Twin(
    """
T sum = T(0), dots = T(0);
for (int j = lane; j < n; j += 32) { delta[j] *= gains[j]; sum += delta[j]; dots += delta[j] * x[j]; }
const T mean = warp_sum(sum) / T(n), dot = warp_sum(dots) / T(n);
for (int j = lane; j < n; j += 32) delta[j] = *scale * (delta[j] - mean - x[j] * dot);
""",
    _normalise_delta,
)


# max-norm: the weights of a unit are shrunk where their length is more than `most` (Srivastava et al., 2014) --


def _limit_norm(weights: Array, most: float, s: Scratch) -> None:
    np.multiply(weights, weights, out=s.a)
    np.add.reduce(s.a, axis=1, keepdims=True, out=s.row_a)
    np.sqrt(s.row_a, out=s.row_a)
    np.maximum(s.row_a, most, out=s.row_a)
    np.divide(most, s.row_a, out=s.row_a)  # 1 where the length is less
    weights *= s.row_a


limit_norm = Twin(
    """
T squares = T(0);
for (int j = lane; j < n; j += 32) squares += weights[j] * weights[j];
const T length = sqrt(warp_sum(squares));
if (length > most) for (int j = lane; j < n; j += 32) weights[j] *= most / length;
""",
    _limit_norm,
)
