"""The CuPy backend: cuBLAS for the products, one kernel for each formula.

The kernels are built from the CUDA text of the records (`cuda_records.py`), each when first used. What a step calls
writes into arrays that the caller owns, or into a few small ones that are made once; it does not wait for the device.
So it can be captured in a CUDA graph (`cuda_graph.py`), with NVIDIA's bindings to cuBLAS (`cublas.py`).

Everything is asked of the current stream, which is the default one where nobody chose another: so what a user asks of
CuPy meanwhile keeps its place. Rows of the host alone are copied on a stream of their own.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

from gpu_bp.backends import cuda_kernels as kernels
from gpu_bp.backends import cuda_low, cuda_rows
from gpu_bp.backends.base import Action, Apart, Division, or_unknown
from gpu_bp.backends.cuda_generator import Generator
from gpu_bp.backends.cuda_graph import Captures, Recording
from gpu_bp.backends.cuda_launch import by_rows, compiled, cupy, given, launch
from gpu_bp.backends.cuda_products import Products, first_line
from gpu_bp.backends.cuda_records import RecordKernels
from gpu_bp.backends.cuda_rows import CUDA_NAMES
from gpu_bp.backends.cuda_scalars import Scalars
from gpu_bp.backends.cuda_sums import Sums
from gpu_bp.backends.epilogues import FASTER, Faster
from gpu_bp.backends.nccl import ByNccl, why_not_nccl
from gpu_bp.exchange import Exchange, ThroughHost
from gpu_bp.formula import Program
from gpu_bp.precision import PRECISIONS, dotted
from gpu_bp.ranks import Ranks
from gpu_bp.registry import Permutations, Purpose
from gpu_bp.spec import Activation, Array, RowActivation


def why_unusable(local_rank: int = 0) -> str | None:
    """Why no GPU can be used here, in one line; None where one can, which is the current one then.

    For a rank other than the first of its machine it is the one with its number, of as many as there are.

    Total and quiet: it asks for a driver and a device, then computes a product and a kernel and looks at the
    result, because NVRTC, its headers and cuBLAS are loaded only when first used.
    """
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"no CUDA driver or device: {first_line(error)}"
    if count < 1:
        return "no CUDA device"
    try:
        if number := local_rank % count:
            cupy.cuda.Device(number).use()
        backend = CupyBackend()
        ones, product = backend.to_device(np.ones((2, 2), np.float32)), backend.zeros((2, 2), np.float32)
        backend.matmul(ones, ones, product)
        computed = backend.to_host(compiled(kernels.add_one())(product))
    except Exception as error:
        return f"the device is there but does not compute: {first_line(error)}"
    return None if (computed == 3).all() else "the device computes wrong values"


def _cuda_version(number: int) -> str:
    """CUDA's number of a version, 12080, as it is written: 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"


# A graph has so many steps where nothing is to be done between them.
STEPS = 20


class CupyBackend(RecordKernels, Apart):
    """Arrays in the memory of one CUDA device.

    Args:
        graphs: whether what is recorded is captured in a CUDA graph; else it is asked for anew each time, to the same
            results. bindings: whether products go through NVIDIA's bindings where these can be used; without them
            CuPy multiplies, which may differ in the last bits, and nothing is captured. epilogues: where products with
            an epilogue are faster, if not where it was measured.

    Attributes:
        captures: says how many graphs there are, and why there is none. products: its matrix products.
    """

    name = "cupy"
    read_every = 100

    def __init__(self, *, graphs: bool = True, bindings: bool = True, epilogues: Sequence[Faster] = FASTER) -> None:
        self._device = cupy.cuda.Device()
        properties = cupy.cuda.runtime.getDeviceProperties(self._device.id)
        self.device = properties["name"].decode()
        self._sums = Sums()
        self.resident_bytes = cupy.cuda.runtime.memGetInfo()[1] // 2
        self._generators: weakref.WeakKeyDictionary[Program, Generator] = weakref.WeakKeyDictionary()
        self._uploads = cupy.cuda.Stream(non_blocking=True)
        self._asked, self._uploaded = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self._graphs = graphs
        self.steps_at_once = STEPS if graphs else 1
        self.captures = Captures(cupy)
        why_not = "" if bindings else "products are left to CuPy, as asked"
        self.products = Products(why_not, epilogues, self._device.compute_capability)

    def libraries(self) -> dict[str, Any]:
        return {
            "cupy": cupy.__version__,
            "cuda runtime": or_unknown(lambda: _cuda_version(cupy.cuda.runtime.runtimeGetVersion())),
            "cuda driver": or_unknown(lambda: _cuda_version(cupy.cuda.runtime.driverGetVersion())),
            "cublas": or_unknown(lambda: cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())),
            "products": self.products.by(),
            "nvrtc": or_unknown(lambda: "{}.{}".format(*cupy.cuda.nvrtc.getVersion())),  # it compiles the kernels
            "compute capability": or_unknown(lambda: self._device.compute_capability),
        }

    def refuses(self, products: str) -> str | None:
        needed = PRECISIONS[products].capability
        number = int(self._device.compute_capability)  # such as "90", "120"
        if divmod(number, 10) < needed:
            return (
                f"{self.device} has compute capability {dotted(divmod(number, 10))}, and {products} needs "
                f"{dotted(needed)} or newer; use float32"
            )
        if self.products.gemm is None:
            return f"CuPy has no such products, and NVIDIA's bindings are not used: {self.products.why_not}"
        if products == "bfloat16" and (find_spec("ml_dtypes") is None or np.lib.NumpyVersion(np.__version__) < "2.1.2"):
            return "its arrays need ml_dtypes and NumPy 2.1.2 or newer: pip install -U ml_dtypes numpy"
        return None

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return cupy.zeros(shape, dtype)

    def to_device(self, host: np.ndarray) -> Array:
        return cupy.asarray(np.ascontiguousarray(host))

    def to_host(self, array: Array) -> np.ndarray:
        host: np.ndarray = cupy.asnumpy(array)
        return host

    def synchronize(self) -> None:
        cupy.cuda.get_current_stream().synchronize()

    def exchange(self, ranks: Ranks) -> Exchange:
        why_not = why_not_nccl(ranks)
        return ThroughHost(ranks, self.to_host, self.to_device, why_not) if why_not else ByNccl(ranks)

    def record(self, run: Action, worker: int = 0) -> Action:
        if not self._graphs:
            return run
        if self.products.gemm is None:
            self.captures.refuse(self.products.why_not)
            return run
        return Recording(run, self.captures)

    def together(self, actions: Sequence[Action], *, alike: bool = False) -> None:
        for action in actions:
            action()

    def division(self, widths: Sequence[int], rows: int, workers: int | None = None) -> Division:
        return Division(rows, 1)

    def numbers(self, count: int, dtype: Any) -> Scalars:
        return Scalars(count, np.dtype(dtype), self.steps_at_once)

    def copy(self, array: Array, out: Array) -> None:
        launch(kernels.copy(), array, out)

    def fill(self, array: Array, value: float) -> None:
        array.fill(value)

    def advance(self, counter: Array) -> None:
        compiled(kernels.advance())(counter)

    def gather(self, table: Array, rows: Array, out: Array) -> None:
        cupy.take(table, rows, axis=0, out=out)

    def matmul(
        self,
        a: Array,
        b: Array,
        out: Array,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        arithmetic: str = "",
    ) -> None:
        self.products(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b, arithmetic=arithmetic)

    def dense(
        self,
        activation: Activation | RowActivation | None,
        inputs: Array,
        weights: Array,
        biases: Array | None,
        net_input: Array,
        output: Array,
        *,
        arithmetic: str = "",
    ) -> None:
        if not self.products.dense(activation, inputs, weights, biases, net_input, output, arithmetic):
            super().dense(activation, inputs, weights, biases, net_input, output, arithmetic=arithmetic)

    def dense_gradients(
        self, delta: Array, inputs: Array, weights: Array, biases: Array | None, *, arithmetic: str = ""
    ) -> None:
        if not self.products.dense_gradients(delta, inputs, weights, biases, arithmetic):
            super().dense_gradients(delta, inputs, weights, biases, arithmetic=arithmetic)

    def column_sums(self, x: Array, out: Array) -> None:
        self._sums.of_columns(x, out)

    def accumulate(self, x: Array, total: Array, *, squares: bool = False) -> None:
        self._sums.of_all(x, total, of="x[k] * x[k]" if squares else "x[k]")

    def add(self, a: Array, b: Array, out: Array) -> None:
        launch(kernels.add(), a, b, out)

    def normalise(self, product: Array, gains: Array, biases: Array | None, scale: Array, net_input: Array) -> None:
        source = cuda_rows.normalise_source(CUDA_NAMES[product.dtype], biases is not None)
        bias = gains if biases is None else biases
        by_rows("gpu_bp_normalise", source, product.shape, product, gains, bias, scale, net_input)

    def normalise_delta(self, delta: Array, normalised: Array, scale: Array, gains: Array) -> None:
        source = cuda_rows.normalise_delta_source(CUDA_NAMES[delta.dtype])
        by_rows("gpu_bp_normalise_delta", source, delta.shape, delta, normalised, scale, gains)

    def column_dots(self, x: Array, y: Array, out: Array) -> None:
        self._sums.of_columns(x, out, y, of="x[k] * y[k]")

    def weigh(self, weights: Array, losses: Array, delta: Array) -> None:
        column = weights.reshape(-1, 1)
        for x in (losses, delta):
            compiled(kernels.weigh())(column, x, x)

    def class_weights(self, targets: Array, table: Array, weights: Array | None, out: Array) -> None:
        own = () if weights is None else (weights,)
        n = 1 if targets.ndim == 1 else targets.shape[1]
        compiled(kernels.class_weights(targets.ndim == 1, weights is not None))(targets, table, n, *own, out)

    def dropout(self, seed: int, step: Array, start: int, rate: float, x: Array, out: Array) -> None:
        self._fill(kernels.dropout(), seed, Purpose.DROPOUT, start, out, x, rate, 1 / (1 - rate), step=step)

    def input_noise(self, seed: int, step: Array, start: int, sd: float, x: Array, out: Array) -> None:
        self._fill(kernels.input_noise(), seed, Purpose.INPUT_NOISE, start, out, x, sd, step=step)

    def step_factor(
        self,
        scale: float,
        weight: Array | None,
        squares: Array | None,
        most: float,
        out: Array,
        loss_scale: Array | None = None,
    ) -> None:
        total = 1.0 if weight is None else weight
        length, limit = (0.0, math.inf) if squares is None else (squares, most)
        kernel = compiled(kernels.step_factor(loss_scale is not None))
        kernel(scale, total, length, limit, *given(loss_scale), out)

    def multiply(self, x: Array, factor: Array) -> None:
        compiled(cuda_low.multiply())(factor, x)

    def adjust_scale(
        self,
        scale: Array,
        good: Array,
        skip: Array,
        steps: Array,
        flag: Array,
        every: int,
        least: float,
        most: float,
    ) -> None:
        compiled(cuda_low.adjust_scale())(skip, steps, every, least, most, scale, good, flag)

    def watch(self, gradients: Array, total: Array, steps: Array, flag: Array) -> None:
        compiled(kernels.watch())(gradients, total, steps, flag)

    def limit_norms(self, weights: Array, most: float, flag: Array | None = None) -> None:
        source = cuda_rows.limit_norm_source(CUDA_NAMES[weights.dtype], flag is not None)
        by_rows("gpu_bp_limit_norm", source, weights.shape, weights, weights.dtype.type(most), *given(flag))

    def average(self, parameters: Array, average: Array, rest: float, flag: Array | None = None) -> None:
        compiled(kernels.average(flag is not None))(*given(flag), parameters, rest, average)

    def uniforms(self, seed: int, purpose: Purpose, start: int, out: Array) -> None:
        self._fill(kernels.fill(normal=False), seed, purpose, start, out)

    def normals(self, seed: int, purpose: Purpose, start: int, out: Array) -> None:
        self._fill(kernels.fill(normal=True), seed, purpose, start, out)

    def _fill(
        self,
        kernel: kernels.Kernel,
        seed: int,
        purpose: Purpose,
        start: int,
        out: Array,
        *arguments: Any,
        step: Array | None = None,
    ) -> None:
        block, lane = divmod(start, 4)
        # NumPy counts a counter up before it uses it, hence + 1
        c0, c1, c2, c3 = (np.uint64((block + 1) >> shift & 0xFFFFFFFFFFFFFFFF) for shift in (0, 64, 128, 192))
        blocks = -(-(lane + out.size) // 4)
        last = c3 if step is None else step  # an element of step 0 has c3 = 0, and its like of step n has n
        counter = (c0, c1, c2, last, np.uint64(seed), np.uint64(purpose), lane, out.size)
        launch(kernel, *counter, *arguments, out, size=blocks)

    def generate(self, program: Program, seed: int, first: int, rows: Array, outputs: Sequence[Array]) -> None:
        if program not in self._generators:
            self._generators[program] = Generator(program)
        self._generators[program](seed, first, rows, outputs)

    def count(self, first: int, out: Array) -> None:
        compiled(kernels.count())(first, out)

    def permute(self, permutations: Permutations, first: int, out: Array) -> None:
        p = permutations
        kernel = compiled(kernels.permute(len(p.keys)))
        for k in range(len(out)):
            kernel(*(np.uint64(x) for x in (first, p.n, p.a, p.b)), *p.keys[:, k, 0], out[k])

    def free_bytes(self) -> int:
        _ = self.products.gemm, self.products.lt  # whose workspaces are not free, whenever they are made
        pool = cupy.get_default_memory_pool()
        free: int = cupy.cuda.runtime.memGetInfo()[0] + pool.free_bytes()
        limit = pool.get_limit()  # 0 for none
        return min(free, limit - pool.used_bytes()) if limit else free

    def scratch_bytes(self, shapes: Iterable[tuple[int, ...]], dtype: Any) -> int:
        return Sums.n_bytes(shapes, dtype)

    def generator_bytes(self, program: Program, n_rows: int) -> int:
        return Generator.n_bytes(program, n_rows)

    def staging(self, array: Array) -> np.ndarray:
        memory = cupy.cuda.alloc_pinned_memory(array.nbytes)
        return np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)

    def upload(self, host: np.ndarray, array: Array) -> None:
        self._asked.record()
        self._uploads.wait_event(self._asked)
        array.data.copy_from_host_async(host.ctypes.data, host.nbytes, self._uploads)
        self._uploaded.record(self._uploads)

    def await_uploads(self) -> None:
        cupy.cuda.get_current_stream().wait_event(self._uploaded)

    def finish_uploads(self) -> None:
        self._uploaded.synchronize()

    def mark(self) -> Any:
        event = cupy.cuda.Event()
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        milliseconds: float = cupy.cuda.get_elapsed_time(begin, end)
        return milliseconds / 1000

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        cupy.cuda.nvtx.RangePush(name)
        try:
            yield
        finally:
            cupy.cuda.nvtx.RangePop()
