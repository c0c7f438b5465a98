"""The CUDA kernels in which one warp handles one row: softmax and what goes with it, normalisation, max-norm.

Each is the whole source of a cupy.RawKernel, kept, since a step asks for it again and again.
"""

from __future__ import annotations

import functools

import numpy as np

from gpu_bp.registry import CUDA_FUNCTIONS, limit_norm, normalise, normalise_delta

CUDA_NAMES = {np.dtype(np.float32): "float", np.dtype(np.float64): "double", np.dtype(np.int64): "long long"}
ROW_WARPS = 4  # rows that a block of threads handles, each by one warp

_ROW_FUNCTIONS = """
template <typename S> __device__ inline S warp_sum(S x) {
    for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(0xffffffffu, x, k);
    return x;
}
template <typename S> __device__ inline S warp_max(S x) {
    for (int k = 16; k; k >>= 1) { const S other = __shfl_xor_sync(0xffffffffu, x, k); x = other > x ? other : x; }
    return x;
}
"""


def rows_source(name: str, text: str, dtype: str, arrays: str, pointers: str, preamble: str = "") -> str:
    """The source of a kernel in which one warp handles one row of n columns, `lane` by `lane`.

    `arrays` are its arguments, from which `pointers` takes what belongs to the row.
    """
    return f"""
typedef {dtype} T;
{CUDA_FUNCTIONS}{_ROW_FUNCTIONS}{preamble}
extern "C" __global__ void {name}(const int rows, const int n, {arrays}) {{
    const int lane = threadIdx.x % 32;
    const int row = blockIdx.x * {ROW_WARPS} + threadIdx.x / 32;
    if (row >= rows) return;  // a whole warp at a time
    const long long first = (long long)row * n;
    {pointers}
    {text}
}}
"""


@functools.cache
def row_kernel_source(name: str, text: str, dtype: str, target_dtype: str, parameters: tuple[str, ...] = ()) -> str:
    """Softmax, or a loss that reduces a row; its parameters come last.

    A float target is a row of n probabilities, an integer one is the class of the row.
    """
    indexed = target_dtype == "long long"
    return rows_source(
        name,
        text,
        dtype,
        f"const T* net_inputs, const {target_dtype}* targets, T* outputs, T* losses, T* deltas"
        + "".join(f", const T {parameter}" for parameter in parameters),
        "const T* v = net_inputs + first; T* y = outputs + first; T* loss = losses + row; T* delta = deltas + first; "
        f"const {target_dtype}* target = targets + {'row' if indexed else 'first'};",
        f"#define TARGET(j) ({'T(j == *target)' if indexed else 'target[j]'})\n",
    )


@functools.cache
def normalise_source(dtype: str, biased: bool) -> str:
    """Layer normalisation; without biases `biases` is any array."""
    return rows_source(
        "gpu_bp_normalise",
        normalise.cuda,
        dtype,
        "T* products, const T* gains, const T* biases, T* scales, T* net_inputs",
        "T* x = products + first; T* scale = scales + row; T* v = net_inputs + first;",
        f"#define BIAS(j) {'biases[j]' if biased else 'T(0)'}\n",
    )


@functools.cache
def normalise_delta_source(dtype: str) -> str:
    """The way back through it."""
    return rows_source(
        "gpu_bp_normalise_delta",
        normalise_delta.cuda,
        dtype,
        "T* deltas, const T* normalised, const T* scales, const T* gains",
        "T* delta = deltas + first; const T* x = normalised + first; const T* scale = scales + row;",
    )


@functools.cache
def limit_norm_source(dtype: str, with_flag: bool = False) -> str:
    """Max-norm: a row is the weights of a unit. Nothing is done where the flag is set: see `Backend.watch`."""
    return rows_source(
        "gpu_bp_limit_norm",
        limit_norm.cuda,
        dtype,
        f"T* all, const T most{', const long long* flag' if with_flag else ''}",
        f"{'if (*flag >= 0) return; ' if with_flag else ''}T* weights = all + first;",
    )
