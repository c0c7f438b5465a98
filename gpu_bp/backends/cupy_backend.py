"""The CuPy backend: cuBLAS for the products, one kernel for each formula. The only importer of cupy.

The kernels are built from the CUDA text of the records, each when first used, and kept by that text. What a step
calls writes into arrays that the caller owns, or into a few small ones that are made once; it does not wait for the
device. So it can be captured in a CUDA graph (`cuda_graph.py`), with NVIDIA's bindings to cuBLAS (`cublas.py`).

Everything is asked of the current stream, which is the default one where nobody chose another: so what a user asks of
CuPy meanwhile keeps its place. Rows of the host alone are copied on a stream of their own.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

from gpu_bp.backends import cuda_kernels as kernels
from gpu_bp.backends import cuda_low, cuda_rows
from gpu_bp.backends.base import Action, Division, Numbers, or_unknown
from gpu_bp.backends.cublas import WORKSPACE, Gemm, bindings, version
from gpu_bp.backends.cuda_graph import Captures, Recording
from gpu_bp.backends.cuda_rows import CUDA_NAMES
from gpu_bp.formula import Program
from gpu_bp.precision import PRECISIONS, dotted
from gpu_bp.registry import Permutations, Purpose
from gpu_bp.spec import Activation, Array, FreeLoss, FusedLoss, GroupedLoss, Loss, Penalty, RowActivation, Update

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
        computed = backend.to_host(compiled(kernels.add_one())(product))
    except Exception as error:
        return f"the device is there but does not compute: {_first_line(error)}"
    return None if (computed == 3).all() else "the device computes wrong values"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _cuda_version(number: int) -> str:
    """CUDA's number of a version, 12080, as it is written: 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def cublas() -> Any:
    """The module cupy.cublas, which cupy itself does not import. Late, because to import it loads the library."""
    import cupy.cublas

    return cupy.cublas


@functools.cache
def compiled(kernel: kernels.Kernel) -> Any:
    """The kernel, which CuPy compiles for each combination of dtypes when it is first called with them."""
    return cupy.ElementwiseKernel(*kernel[:4], preamble=kernel.preamble, options=kernel.options)


def launch(kernel: kernels.Kernel, *arguments: Any, **keywords: Any) -> None:
    """Calls a kernel; arrays of fewer bits than float32 are stored so, and computed with in float32."""
    named = zip(cuda_low.names(kernel), arguments, strict=True)
    small = frozenset(name for name, x in named if hasattr(x, "dtype") and x.dtype.itemsize == 2)
    compiled(cuda_low.stored(kernel, small) if small else kernel)(*arguments, **keywords)


@functools.cache
def raw_kernel(name: str, source: str) -> Any:
    """The kernel of that name in a source."""
    return cupy.RawKernel(source, name)


def _arguments(array: Array | None) -> tuple[Array, ...]:
    """An array that a kernel takes only where there is one."""
    return () if array is None else (array,)


# The backend -----------------------------------------------------------------------------------------------


# A graph has so many steps where nothing is to be done between them.
STEPS = 20


class Scalars:
    """A few numbers on the device that the host changes from step to step, without waiting for the device.

    They are copied from pinned memory, a row a change: from other memory CUDA may wait. A row is written again only
    when the copies of its half of the rows have been made; the host waits only where it is hundreds of changes ahead.

    Attributes:
        steps: (count,) on the device, of each of the steps that are set at once, in their order.
    """

    ROWS = 512

    def __init__(self, count: int, dtype: np.dtype[Any], steps: int) -> None:
        size = count * steps
        self._memory = cupy.cuda.alloc_pinned_memory(self.ROWS * size * dtype.itemsize)
        self._rows = np.frombuffer(self._memory, dtype, self.ROWS * size).reshape(self.ROWS, size)
        self._row = -1
        self._last = self._rows[-1, :0]
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]  # of each half
        self._device = cupy.empty((steps, count), dtype)
        self.steps = [self._device[step] for step in range(steps)]

    def set(self, *steps: Sequence[float]) -> None:
        """The device gets these values; nothing is copied where they are the last ones."""
        wanted = np.array(steps, self._rows.dtype).reshape(-1)
        if np.array_equal(wanted, self._last):
            return
        self._row = (self._row + 1) % self.ROWS
        half, place = divmod(self._row, self.ROWS // 2)
        if place == 0:  # all rows of the other half are on their way: wait for this one's last time round
            self._copied[1 - half].record()
            self._copied[half].synchronize()
        self._last = self._rows[self._row, : len(wanted)]
        self._last[:] = wanted
        self._device.data.copy_from_host_async(self._last.ctypes.data, self._last.nbytes)


GENERATED = 2**24  # numbers of a stage that are generated at once: 128 MiB


def _at_once(program: Program) -> int:
    """Rows."""
    return max(1, GENERATED // program.width)


def _chunks(rows: int) -> int:
    """Into how many sums rows are divided: about the root, so that there are as many threads as terms in each."""
    return math.isqrt(max(0, rows - 1)) + 1


class Generator:
    """A program on the device: its kernels, its tables, and arrays for its stages."""

    def __init__(self, program: Program) -> None:
        named = [*program.stages.items(), *((f"output{k}", columns) for k, columns in enumerate(program.outputs))]
        self._kernels = {name: kernels.generate(program, columns, name) for name, columns in named}
        self._arrays = {name: cupy.asarray(table) for name, table in program.tables.items()}
        self._widths = {name: columns.width for name, columns in program.stages.items()}
        self._rows = 0  # that the stages have room for

    def __call__(self, seed: int, first: int, rows: Array, outputs: Sequence[Array]) -> None:
        if len(rows) > self._rows:
            self._rows = len(rows)
            self._arrays |= {name: cupy.empty((self._rows, width)) for name, width in self._widths.items()}
        written = {name: self._arrays[name][: len(rows)] for name in self._widths}
        written |= {f"output{k}": output for k, output in enumerate(outputs)}
        for name, out in written.items():
            read, kernel = self._kernels[name]
            compiled(kernel)(rows, first, np.uint64(seed), *(self._arrays[array] for array in read), out)


class CupyBackend:
    """Arrays in the memory of one CUDA device.

    Args:
        graphs: whether what is recorded is captured in a CUDA graph; else it is asked for anew each time, to the same
            results. bindings: whether products go through NVIDIA's bindings where these can be used; without them
            CuPy multiplies, which may differ in the last bits, and nothing is captured.

    Attributes:
        captures: says how many graphs there are, and why there is none.
    """

    name = "cupy"
    read_every = 100

    def __init__(self, *, graphs: bool = True, bindings: bool = True) -> None:
        self._device = cupy.cuda.Device()
        properties = cupy.cuda.runtime.getDeviceProperties(self._device.id)
        self.device = properties["name"].decode()
        self._partial: dict[tuple[int, Any], Array] = {}
        self.resident_bytes = cupy.cuda.runtime.memGetInfo()[1] // 2
        self._generators: weakref.WeakKeyDictionary[Program, Generator] = weakref.WeakKeyDictionary()
        self._uploads = cupy.cuda.Stream(non_blocking=True)
        self._asked, self._uploaded = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self._graphs = graphs
        self.steps_at_once = STEPS if graphs else 1
        self.captures = Captures(cupy)
        self._no_bindings = "" if bindings else "products are left to CuPy, as asked"  # why they are not used

    @functools.cached_property
    def _gemm(self) -> Gemm | None:
        """cuBLAS through NVIDIA's bindings; None where they cannot be used."""
        if self._no_bindings:
            return None
        try:
            return Gemm(cupy.empty(WORKSPACE, np.uint8), lambda: cupy.cuda.get_current_stream().ptr, bindings())
        except ModuleNotFoundError:
            self._no_bindings = "nvmath-python is not installed (pip install 'gpu_bp[cuda13]', or cuda12)"
        except Exception as error:
            self._no_bindings = f"nvmath-python cannot be used: {_first_line(error)}"
        return None

    def libraries(self) -> dict[str, Any]:
        return {
            "cupy": cupy.__version__,
            "cuda runtime": or_unknown(lambda: _cuda_version(cupy.cuda.runtime.runtimeGetVersion())),
            "cuda driver": or_unknown(lambda: _cuda_version(cupy.cuda.runtime.driverGetVersion())),
            "cublas": or_unknown(lambda: cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())),
            "products": or_unknown(version) if self._gemm else "cupy",
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
        if self._gemm is None:
            return f"CuPy has no such products, and NVIDIA's bindings are not used: {self._no_bindings}"
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

    def record(self, run: Action, worker: int = 0) -> Action:
        if not self._graphs:
            return run
        if self._gemm is None:
            self.captures.refuse(self._no_bindings)
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
        if self._gemm is not None:
            self._gemm(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b, arithmetic=arithmetic)
            return
        # gemm rather than cupy.matmul, which allocates for products of 1 x 1
        cublas().gemm("T" if transpose_a else "N", "T" if transpose_b else "N", a, b, out=out)

    def activate(
        self, activation: Activation | RowActivation, net_input: Array, biases: Array | None, output: Array
    ) -> None:
        if isinstance(activation, RowActivation):
            if biases is not None:
                net_input += biases
            self._rows(activation, activation.value.cuda, net_input, None, output, output, output)
            return
        kernel = kernels.activation(
            activation.name, activation.value.cuda, tuple(activation.values), biases is not None
        )
        inputs = (net_input,) if biases is None else (net_input, biases)
        launch(kernel, *inputs, *activation.values.values(), net_input, output)

    def hidden_delta(self, activation: Activation, error: Array, net_input: Array, output: Array, delta: Array) -> None:
        x, array = ("y", output) if activation.derivative_from == "output" else ("v", net_input)
        kernel = kernels.hidden_delta(activation.name, activation.delta.cuda, x, tuple(activation.values))
        launch(kernel, error, array, *activation.values.values(), delta)

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
                self._rows(loss, loss.delta.cuda, net_input, target, output, losses, delta)
            else:
                kernel = compiled(kernels.fused_loss(loss.name, loss.delta.cuda, tuple(loss.values)))
                kernel(net_input, target, *loss.values.values(), output, losses, delta)
            return
        assert isinstance(activation, Activation)
        if isinstance(loss, GroupedLoss):
            text = kernels.grouped_loss(
                f"{loss.name}_{activation.name}",
                loss.error_signals.cuda,
                loss.groups,
                tuple(loss.values.items()),
                activation.delta.cuda,
                tuple(activation.values),
            )
            numbers = (*(x for x in loss.values.values() if not isinstance(x, tuple)), *activation.values.values())
            compiled(text)(net_input, output, target, target.shape[1], *numbers, losses, delta)
            return
        assert isinstance(loss, FreeLoss)
        text = kernels.free_loss(
            f"{loss.name}_{activation.name}",
            loss.error_signal.cuda,
            tuple(loss.values),
            activation.delta.cuda,
            tuple(activation.values),
        )
        kernel = compiled(text)
        kernel(net_input, output, target, *loss.values.values(), *activation.values.values(), losses, delta)

    def column_sums(self, x: Array, out: Array) -> None:
        partial, chunks = self._chunk_sums(x, len(x), x.shape[1])
        compiled(kernels.chunk_sums())(partial, chunks, x.shape[1], 1, out)

    def accumulate(self, x: Array, total: Array, *, squares: bool = False) -> None:
        partial, chunks = self._chunk_sums(x, x.size, 1, of="x[k] * x[k]" if squares else "x[k]")
        compiled(kernels.add_to_total())(partial, chunks, total)

    def add(self, a: Array, b: Array, out: Array) -> None:
        launch(kernels.add(), a, b, out)

    def normalise(self, product: Array, gains: Array, biases: Array | None, scale: Array, net_input: Array) -> None:
        source = cuda_rows.normalise_source(CUDA_NAMES[product.dtype], biases is not None)
        bias = gains if biases is None else biases
        self._by_rows("gpu_bp_normalise", source, product.shape, product, gains, bias, scale, net_input)

    def normalise_delta(self, delta: Array, normalised: Array, scale: Array, gains: Array) -> None:
        source = cuda_rows.normalise_delta_source(CUDA_NAMES[delta.dtype])
        self._by_rows("gpu_bp_normalise_delta", source, delta.shape, delta, normalised, scale, gains)

    def column_dots(self, x: Array, y: Array, out: Array) -> None:
        partial, chunks = self._chunk_sums(x, len(x), x.shape[1], y, of="x[k] * y[k]")
        compiled(kernels.chunk_sums())(partial, chunks, x.shape[1], 1, out)

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
        kernel(scale, total, length, limit, *_arguments(loss_scale), out)

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
        self._by_rows("gpu_bp_limit_norm", source, weights.shape, weights, weights.dtype.type(most), *_arguments(flag))

    def average(self, parameters: Array, average: Array, rest: float, flag: Array | None = None) -> None:
        compiled(kernels.average(flag is not None))(*_arguments(flag), parameters, rest, average)

    def update(
        self,
        record: Update,
        penalties: Sequence[Penalty],
        parameters: Array,
        gradients: Array,
        state: Sequence[Array],
        numbers: Numbers,
        n_weights: int,
        factor: Array | None = None,
        flag: Array | None = None,
        step: int = 0,
    ) -> None:
        assert isinstance(numbers, Scalars)
        before = tuple((penalty.name, penalty.apply.cuda, penalty.weights_only) for penalty in penalties)
        text = kernels.update(
            record.name,
            record.update.cuda,
            record.state,
            record.scalar_names,
            before,
            with_factor=factor is not None,
            with_flag=flag is not None,
        )
        optional = (*_arguments(flag), *_arguments(factor))
        compiled(text)(*optional, numbers.steps[step], gradients, n_weights, parameters, *state)

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
        step = _at_once(program)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            self._generators[program](seed, first, rows[part], [output[part] for output in outputs])

    def count(self, first: int, out: Array) -> None:
        compiled(kernels.count())(first, out)

    def permute(self, permutations: Permutations, first: int, out: Array) -> None:
        p = permutations
        kernel = compiled(kernels.permute(len(p.keys)))
        for k in range(len(out)):
            kernel(*(np.uint64(x) for x in (first, p.n, p.a, p.b)), *p.keys[:, k, 0], out[k])

    def free_bytes(self) -> int:
        _ = self._gemm  # whose workspace is not free, whenever it is made
        pool = cupy.get_default_memory_pool()
        free: int = cupy.cuda.runtime.memGetInfo()[0] + pool.free_bytes()
        limit = pool.get_limit()  # 0 for none
        return min(free, limit - pool.used_bytes()) if limit else free

    def scratch_bytes(self, shapes: Iterable[tuple[int, ...]], dtype: Any) -> int:
        sums = {(n, math.prod(shape) // n) for shape in shapes for n in (shape[0], math.prod(shape))}
        item: int = np.dtype(dtype).itemsize
        return item * sum({_chunks(rows) * columns for rows, columns in sums})

    def generator_bytes(self, program: Program, n_rows: int) -> int:
        stages = sum(columns.width for columns in program.stages.values())
        return 8 * min(n_rows, _at_once(program)) * stages + sum(table.nbytes for table in program.tables.values())

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

    def _rows(
        self,
        record: RowActivation | FusedLoss,
        text: str,
        net_input: Array,
        target: Array | None,
        output: Array,
        losses: Array,
        delta: Array,
    ) -> None:
        target = net_input if target is None else target  # softmax alone reads none
        name, types = f"gpu_bp_{record.name}", (CUDA_NAMES[net_input.dtype], CUDA_NAMES[target.dtype])
        source = cuda_rows.row_kernel_source(name, text, *types, tuple(record.values))
        parameters = (net_input.dtype.type(value) for value in record.values.values())
        self._by_rows(name, source, net_input.shape, net_input, target, output, losses, delta, *parameters)

    def _by_rows(self, name: str, source: str, shape: tuple[int, ...], *arguments: Any) -> None:
        """Runs a kernel in which one warp handles one row of this shape."""
        rows, n = shape
        blocks = -(-rows // cuda_rows.ROW_WARPS)
        raw_kernel(name, source)((blocks,), (32 * cuda_rows.ROW_WARPS,), (np.int32(rows), np.int32(n), *arguments))

    def _chunk_sums(self, x: Array, rows: int, columns: int, *y: Array, of: str = "x[k]") -> tuple[Array, int]:
        """The sums of the chunks of each column, and how many chunks."""
        chunks = _chunks(rows)
        dtype = np.float32 if x.dtype.itemsize == 2 else x.dtype  # what is stored in fewer bits is summed in float32
        key = (chunks * columns, np.dtype(dtype))
        if key not in self._partial:
            self._partial[key] = cupy.empty(*key)
        partial = self._partial[key]
        launch(kernels.chunk_sums(of), x, *y, rows, columns, chunks, partial)
        return partial, chunks
