"""softmax: y_j = exp(v_j) / sum_k exp(v_k), over a row. An output activation, and the beginning of cross-entropy.

The largest v of the row is taken off first, so that exp cannot overflow.
"""

import numpy as np

from gpu_bp.spec import RowActivation, Scratch, Twin

Array = np.ndarray

SOFTMAX_CUDA = """
T top = v[0];
for (int j = lane; j < n; j += 32) top = v[j] > top ? v[j] : top;
top = warp_max(top);
T sum = T(0);
for (int j = lane; j < n; j += 32) { y[j] = exp(v[j] - top); sum += y[j]; }
sum = warp_sum(sum);
for (int j = lane; j < n; j += 32) y[j] /= sum;
"""


def softmax_rows(v: Array, y: Array, s: Scratch) -> None:
    """Softmax; leaves the row's largest v in s.row_a and the sum of exp(v - largest) in s.row_b."""
    # of short rows NumPy finds the place of the largest faster than the largest, and BLAS the sum
    v.argmax(axis=1, out=s.row_index)
    np.add(s.row_index, s.row_start, out=s.row_index)
    v.reshape(-1).take(s.row_index, out=s.row_a.reshape(-1), mode="clip")
    np.subtract(v, s.row_a, out=y)
    np.exp(y, out=y)
    y.dot(s.column_ones, s.row_b)
    y /= s.row_b


softmax = RowActivation(
    name="softmax",
    source="Bridle (1990)",
    value=Twin(SOFTMAX_CUDA, softmax_rows),
)
