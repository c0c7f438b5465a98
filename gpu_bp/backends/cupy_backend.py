"""The CuPy backend: cuBLAS for the products, one kernel for each formula. The only importer of cupy.

The kernels are built from the CUDA text of the records, each when first used, and kept by that text. What a step
calls writes into arrays that the caller owns, or into a few small ones that are made once; it does not wait for the
device.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpu_bp.registry import CUDA_FUNCTIONS
from gpu_bp.spec import Activation, Array, FreeLoss, FusedLoss, Loss, RowActivation, Update

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # such as: several CuPy packages, or no CUDA toolkit path
    import cupy


def why_unusable() -> str | None:
    """Why no GPU can be used here, in one line; None where one can.

    Total and quiet: it asks for a driver and a device, then computes a product and a kernel and looks at the
    result, because NVRTC, its headers and cuBLAS are loaded only when first used.
    """
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"no CUDA driver or device: {_first_line(error)}"
    if count < 1:
        return "no CUDA device"
    try:
        backend = CupyBackend()
        ones, product = backend.to_device(np.ones((2, 2), np.float32)), backend.zeros((2, 2), np.float32)
        backend.matmul(ones, ones, product)
        computed = backend.to_host(_add_one()(product))
    except Exception as error:
        return f"the device is there but does not compute: {_first_line(error)}"
    return None if (computed == 3).all() else "the device computes wrong values"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def _add_one() -> Any:
    return cupy.ElementwiseKernel("T x", "T y", "y = x + T(1)", "gpu_bp_add_one")


@functools.cache
def cublas() -> Any:
    """The module cupy.cublas, which cupy itself does not import. Late, because to import it loads the library."""
    import cupy.cublas

    return cupy.cublas


# The kernels -----------------------------------------------------------------------------------------------


def _scope(text: str, names: Sequence[str], prefix: str) -> str:
    """A formula in a scope of its own, so that two of them may share names in one kernel."""
    values = "".join(f"const T {name} = {prefix}_{name}; " for name in names)
    return f"{{ {values}{text} }}"


def _arguments(names: Sequence[str], prefix: str) -> str:
    return "".join(f", T {prefix}_{name}" for name in names)


@functools.cache
def activation_kernel(name: str, text: str, parameters: tuple[str, ...], biased: bool) -> Any:
    """v = product + bias (broadcast over the rows); y = phi(v)."""
    return cupy.ElementwiseKernel(
        "T product" + (", T bias" if biased else "") + _arguments(parameters, "phi"),
        "T net_input, T output",
        f"const T v = product{' + bias' if biased else ''}; T y; {_scope(text, parameters, 'phi')}"
        " net_input = v; output = y;",  # in this order: the two may be one array
        f"gpu_bp_{name}_value",
        preamble=CUDA_FUNCTIONS,
    )


@functools.cache
def hidden_delta_kernel(name: str, text: str, x: str, parameters: tuple[str, ...]) -> Any:
    """delta = e * phi'."""
    return cupy.ElementwiseKernel(
        f"T e, T {x}{_arguments(parameters, 'phi')}",
        "T delta",
        _scope(text, parameters, "phi"),
        f"gpu_bp_{name}_delta",
        preamble=CUDA_FUNCTIONS,
    )


@functools.cache
def free_loss_kernel(
    name: str,
    loss_text: str,
    loss_parameters: tuple[str, ...],
    delta_text: str,
    delta_parameters: tuple[str, ...],
) -> Any:
    """loss and e = dE/dy from y and d, then delta = e * phi'."""
    return cupy.ElementwiseKernel(
        "T v, T y, T d" + _arguments(loss_parameters, "loss") + _arguments(delta_parameters, "phi"),
        "T loss, T delta",
        f"T e; {_scope(loss_text, loss_parameters, 'loss')} {_scope(delta_text, delta_parameters, 'phi')}",
        f"gpu_bp_{name}",
        preamble=CUDA_FUNCTIONS,
    )


@functools.cache
def fused_loss_kernel(name: str, text: str, parameters: tuple[str, ...]) -> Any:
    """y, loss and delta from v and d."""
    return cupy.ElementwiseKernel(
        "T v, T d" + _arguments(parameters, "loss"),
        "T y, T loss, T delta",
        _scope(text, parameters, "loss"),
        f"gpu_bp_{name}",
        preamble=CUDA_FUNCTIONS,
    )


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


def row_kernel_source(name: str, text: str, dtype: str, target_dtype: str) -> str:
    """The source of a kernel in which one warp handles one row of n columns.

    A float target is a row of n probabilities, an integer one is the class of the row.
    """
    indexed = target_dtype == "long long"
    return f"""
typedef {dtype} T;
{CUDA_FUNCTIONS}{_ROW_FUNCTIONS}
#define TARGET(j) ({"T(j == *target)" if indexed else "target[j]"})
extern "C" __global__ void {name}(const int rows, const int n, const T* net_inputs, const {target_dtype}* targets,
                                  T* outputs, T* losses, T* deltas) {{
    const int lane = threadIdx.x % 32;
    const int row = blockIdx.x * {ROW_WARPS} + threadIdx.x / 32;
    if (row >= rows) return;  // a whole warp at a time
    const long long first = (long long)row * n;
    const T* v = net_inputs + first;
    T* y = outputs + first;
    const {target_dtype}* target = targets + {"row" if indexed else "first"};
    T* loss = losses + row;
    T* delta = deltas + first;
    {text}
}}
"""


@functools.cache
def row_kernel(name: str, text: str, dtype: str, target_dtype: str) -> Any:
    """The compiled kernel of `row_kernel_source`."""
    return cupy.RawKernel(row_kernel_source(name, text, dtype, target_dtype), name)


_CUDA_NAMES = {np.dtype(np.float32): "float", np.dtype(np.float64): "double", np.dtype(np.int64): "long long"}


@functools.cache
def chunk_sums_kernel() -> Any:
    """Chunk c of column j: the sum of x[r, j] over the rows r = c, c + chunks, c + 2 chunks, ..."""
    return cupy.ElementwiseKernel(
        "raw T x, int64 rows, int64 columns, int64 chunks",
        "T sum",
        """
        const long long column = i % columns;
        T running = T(0);
        for (long long row = i / columns; row < rows; row += chunks) running += x[row * columns + column];
        sum = running;
        """,
        "gpu_bp_chunk_sums",
    )


@functools.cache
def add_to_total_kernel() -> Any:
    """total += the sum of a few values, in double: an epoch adds up more losses than a float can tell apart."""
    return cupy.ElementwiseKernel(
        "raw T x, int64 n",
        "float64 total",
        "double sum = 0; for (long long k = 0; k < n; ++k) sum += x[k]; total += sum;",
        "gpu_bp_add_to_total",
    )


@functools.cache
def update_kernel(name: str, text: str, state: tuple[str, ...], scalars: tuple[str, ...]) -> Any:
    """One step of an update rule; the scalars stand in an array, so that no kernel has one baked in."""
    read = "".join(
        f"const T {scalar} = {'i >= n_decayed ? T(0) : ' if scalar == 'weight_decay' else ''}scalars[{k}]; "
        for k, scalar in enumerate(("scale", *scalars))
    )
    return cupy.ElementwiseKernel(
        "raw T scalars, T gradient, int64 n_decayed",
        "T w" + "".join(f", T {array}" for array in state),
        f"{read} const T g = scale * gradient; {text}",
        f"gpu_bp_{name}",
        preamble=CUDA_FUNCTIONS,
    )


# The backend -----------------------------------------------------------------------------------------------


class Scalars:
    """A few numbers on the device that the host changes from step to step, without waiting for the device.

    They are copied from pinned memory, a row a change: from other memory CUDA may wait. A row is written again only
    when the copies of its half of the rows have been made; the host waits only where it is hundreds of changes ahead.
    """

    ROWS = 512

    def __init__(self, count: int, dtype: np.dtype[Any]) -> None:
        self._memory = cupy.cuda.alloc_pinned_memory(self.ROWS * count * dtype.itemsize)
        self._rows = np.frombuffer(self._memory, dtype, self.ROWS * count).reshape(self.ROWS, count)
        self._rows.fill(np.nan)
        self._row = -1
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]  # of each half
        self.device = cupy.empty(count, dtype)

    def set(self, values: Sequence[float]) -> Array:
        """The device array, with these values; nothing is copied where they are the last ones."""
        wanted = np.array(values, self._rows.dtype)
        if np.array_equal(wanted, self._rows[self._row]):
            return self.device
        self._row = (self._row + 1) % self.ROWS
        half, place = divmod(self._row, self.ROWS // 2)
        if place == 0:  # all rows of the other half are on their way: wait for this one's last time round
            self._copied[1 - half].record()
            self._copied[half].synchronize()
        self._rows[self._row] = wanted
        self.device.data.copy_from_host_async(self._rows[self._row].ctypes.data, self.device.nbytes)
        return self.device


class CupyBackend:
    """Arrays in the memory of one CUDA device."""

    name = "cupy"

    def __init__(self) -> None:
        self._device = cupy.cuda.Device()
        properties = cupy.cuda.runtime.getDeviceProperties(self._device.id)
        self.device = properties["name"].decode()
        self._partial: dict[tuple[int, Any], Array] = {}
        self._scalars: dict[tuple[int, Any], Scalars] = {}

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return cupy.zeros(shape, dtype)

    def to_device(self, host: np.ndarray) -> Array:
        return cupy.asarray(np.ascontiguousarray(host))

    def to_host(self, array: Array) -> np.ndarray:
        host: np.ndarray = cupy.asnumpy(array)
        return host

    def synchronize(self) -> None:
        cupy.cuda.get_current_stream().synchronize()

    def gather(self, table: Array, rows: Array, out: Array) -> None:
        cupy.take(table, rows, axis=0, out=out)

    def matmul(self, a: Array, b: Array, out: Array, *, transpose_a: bool = False, transpose_b: bool = False) -> None:
        # gemm rather than cupy.matmul, which allocates for products of 1 x 1
        cublas().gemm("T" if transpose_a else "N", "T" if transpose_b else "N", a, b, out=out)

    def activate(
        self, activation: Activation | RowActivation, net_input: Array, biases: Array | None, output: Array
    ) -> None:
        if isinstance(activation, RowActivation):
            if biases is not None:
                net_input += biases
            self._rows(activation.name, activation.value.cuda, net_input, None, output, output, output)
            return
        kernel = activation_kernel(activation.name, activation.value.cuda, tuple(activation.values), biases is not None)
        inputs = (net_input,) if biases is None else (net_input, biases)
        kernel(*inputs, *activation.values.values(), net_input, output)

    def hidden_delta(self, activation: Activation, delta: Array, net_input: Array, output: Array) -> None:
        x, array = ("y", output) if activation.derivative_from == "output" else ("v", net_input)
        kernel = hidden_delta_kernel(activation.name, activation.delta.cuda, x, tuple(activation.values))
        kernel(delta, array, *activation.values.values(), delta)

    def output_delta(
        self,
        loss: Loss,
        activation: Activation | RowActivation,
        net_input: Array,
        target: Array,
        output: Array,
        losses: Array,
        delta: Array,
    ) -> None:
        if isinstance(loss, FusedLoss):
            if loss.per_row:
                self._rows(loss.name, loss.delta.cuda, net_input, target, output, losses, delta)
            else:
                kernel = fused_loss_kernel(loss.name, loss.delta.cuda, tuple(loss.values))
                kernel(net_input, target, *loss.values.values(), output, losses, delta)
            return
        assert isinstance(loss, FreeLoss)
        assert isinstance(activation, Activation)
        kernel = free_loss_kernel(
            f"{loss.name}_{activation.name}",
            loss.error_signal.cuda,
            tuple(loss.values),
            activation.delta.cuda,
            tuple(activation.values),
        )
        kernel(net_input, output, target, *loss.values.values(), *activation.values.values(), losses, delta)

    def column_sums(self, x: Array, out: Array) -> None:
        partial, chunks = self._chunk_sums(x, len(x), x.shape[1])
        chunk_sums_kernel()(partial, chunks, x.shape[1], 1, out)

    def accumulate(self, losses: Array, total: Array) -> None:
        partial, chunks = self._chunk_sums(losses, losses.size, 1)
        add_to_total_kernel()(partial, chunks, total)

    def update(
        self,
        record: Update,
        parameters: Array,
        gradients: Array,
        state: Sequence[Array],
        scale: float,
        scalars: Mapping[str, float],
        n_decayed: int,
    ) -> None:
        values = (scale, *(scalars[name] for name in record.scalar_names))
        key = (len(values), parameters.dtype)
        if key not in self._scalars:
            self._scalars[key] = Scalars(*key)
        device_scalars = self._scalars[key].set(values)
        kernel = update_kernel(record.name, record.update.cuda, record.state, record.scalar_names)
        kernel(device_scalars, gradients, n_decayed, parameters, *state)

    def _rows(
        self, name: str, text: str, net_input: Array, target: Array | None, output: Array, losses: Array, delta: Array
    ) -> None:
        target = net_input if target is None else target  # softmax alone reads none
        kernel = row_kernel(f"gpu_bp_{name}", text, _CUDA_NAMES[net_input.dtype], _CUDA_NAMES[target.dtype])
        rows, n = net_input.shape
        blocks = -(-rows // ROW_WARPS)
        arguments = (np.int32(rows), np.int32(n), net_input, target, output, losses, delta)
        kernel((blocks,), (32 * ROW_WARPS,), arguments)

    def _chunk_sums(self, x: Array, rows: int, columns: int) -> tuple[Array, int]:
        """Sums of about the root of the rows each: as many threads as terms in each thread's sum."""
        chunks = math.isqrt(rows - 1) + 1
        key = (chunks * columns, x.dtype)
        if key not in self._partial:
            self._partial[key] = cupy.empty(chunks * columns, x.dtype)
        partial = self._partial[key]
        chunk_sums_kernel()(x, rows, columns, chunks, partial)
        return partial, chunks
