"""A stand-in for the module `cupy`, as strict as CuPy: its arrays lie on the host, its kernels run by g++.

A kernel is what CuPy would compile: the real CuPy decides its dtypes and writes its source (`codegen`), g++
compiles it (`cpu`). Products are NumPy's, with CuPy's checks. Only what the backend uses is here, so that whatever
else it comes to use fails at once and is thought about.

    cupy = FakeCupy(order="random")
    with cupy.cuda.Stream() as stream:
        stream.begin_capture(); step(); graph = stream.end_capture()
    graph.launch()
"""

from __future__ import annotations

import re
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from cuda_on_cpu import codegen
from cuda_on_cpu.cpu import Kernel, array_argument, indexer_argument, pointer_argument, scalar_argument
from cuda_on_cpu.device import Capture, CaptureError, Device, Order, Queue, Wait, ndarray
from cuda_on_cpu.fake_cublas import FakeCublas
from cuda_on_cpu.fake_cublaslt import FakeCublasLt

DEFAULT_BLOCK = 128


class FakeCupy:
    """The names of the module `cupy` that the backend uses, over one `Device`.

    Args:
        order: in which the threads of a kernel run.
        dry: nothing runs.
        lazy: a call runs only when somebody waits for its stream.
        capability: the compute capability of the device, such as "90" for 9.0. uuid: by which it is told from others.

    Attributes:
        bindings, lt_bindings: stand for nvmath.bindings.cublas and cublasLt.
        ranges: the NVTX ranges that were opened and closed again, in the order of their ends, each "outer/inner".
    """

    def __init__(
        self,
        order: Order = "forward",
        *,
        dry: bool = False,
        lazy: bool = False,
        capability: str = "90",
        uuid: str = "GPU-0",
    ) -> None:
        codegen.require()
        self.__version__ = codegen.real_cupy().__version__
        self.device = Device(order, dry=dry, lazy=lazy)
        self._streams = [Stream(self, self.device.queue, 0)]  # the default one first
        self._current = [self._streams[0]]
        self.bindings = FakeCublas(self)
        self.lt_bindings = FakeCublasLt(self)
        self.ranges: list[str] = []
        self._open_ranges: list[str] = []
        self.cublas = SimpleNamespace(gemm=self._gemm)
        runtime = SimpleNamespace(
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda number: {"name": b"a CPU that stands in for a GPU", "uuid": uuid},
            deviceSynchronize=self._synchronise,
            memGetInfo=lambda: (2**32 - self.device.used_bytes, 2**33),
            runtimeGetVersion=lambda: 12080,
            driverGetVersion=lambda: 13010,
            CUDARuntimeError=RuntimeError,
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Device=lambda number=0: SimpleNamespace(
                id=number, synchronize=self._synchronise, compute_capability=capability, pci_bus_id="0000:00:00.0"
            ),
            device=SimpleNamespace(get_cublas_handle=lambda: 1),
            cublas=SimpleNamespace(getVersion=lambda handle: 120804),
            nvrtc=SimpleNamespace(getVersion=lambda: (12, 8)),
            Stream=self._stream,
            get_current_stream=lambda: self._current[-1],
            MemoryPool=lambda: SimpleNamespace(malloc=None),
            using_allocator=lambda allocator: nullcontext(),
            Event=lambda disable_timing=False: Event(self.device, timed=not disable_timing),
            get_elapsed_time=elapsed_time,
            nvtx=SimpleNamespace(RangePush=self._push_range, RangePop=self._pop_range),
            alloc_pinned_memory=self.device.pinned,
        )

    def get_default_memory_pool(self) -> SimpleNamespace:
        """One that keeps nothing, and has no limit."""
        return SimpleNamespace(free_bytes=lambda: 0, used_bytes=lambda: self.device.used_bytes, get_limit=lambda: 0)

    def ElementwiseKernel(self, *arguments: Any, **named: Any) -> ElementwiseKernel:
        return ElementwiseKernel(self.device, codegen.real_cupy().ElementwiseKernel(*arguments, **named))

    def RawKernel(self, code: str, name: str) -> RawKernel:
        return RawKernel(self.device, code, name)

    def empty(self, shape: Any, dtype: Any = np.float64) -> ndarray:
        return self.device.empty(shape, dtype)

    def zeros(self, shape: Any, dtype: Any = np.float64) -> ndarray:
        array = self.device.empty(shape, dtype)
        array.fill(0)
        return array

    def asarray(self, a: Any) -> ndarray:
        return a if isinstance(a, ndarray) else self.device.from_host(np.asarray(a))

    def asnumpy(self, a: Any) -> np.ndarray:
        return a.get() if isinstance(a, ndarray) else np.asarray(a)

    def take(self, a: ndarray, indices: ndarray, axis: int, out: ndarray) -> ndarray:
        """Rows of `a`. A row number out of range wraps around, as in CuPy: no kernel can raise."""
        _device_arrays(a, indices, out)
        if axis != 0 or indices.dtype.kind != "i":
            raise TypeError("rows are taken by whole numbers along axis 0")
        if out.dtype != a.dtype:
            raise TypeError("Output dtype mismatch")
        if out.shape != indices.shape + a.shape[1:]:
            raise ValueError("Output shape mismatch")
        if not len(a) and out.size:
            raise IndexError("cannot do a non-empty take from an empty axes.")
        self.device.launch(lambda: np.copyto(out.host, a.host[indices.host % len(a)]))
        return out

    def _gemm(self, transa: str, transb: str, a: ndarray, b: ndarray, out: ndarray) -> ndarray:
        """out = op(a) @ op(b), after the checks of cupy.cublas.gemm."""
        _device_arrays(a, b, out)
        if self.device.capture is not None:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        assert a.ndim == b.ndim == out.ndim == 2
        assert a.dtype == b.dtype == out.dtype
        if a.dtype.char not in "fd":
            raise TypeError("invalid dtype")
        left, right = (x.host if op == "N" else x.host.T for op, x in ((transa, a), (transb, b)))
        assert left.shape[1] == right.shape[0]
        assert out.shape == (left.shape[0], right.shape[1])
        if np.may_share_memory(out.host, a.host) or np.may_share_memory(out.host, b.host):
            raise ValueError("cuBLAS reads its factors while it writes the product")
        for x in (a, b, out):
            if not (x.flags.c_contiguous or x.flags.f_contiguous):
                self.device.uncapturable("device copies", "allocations")  # CuPy copies such a one first
        self.device.launch(lambda: np.copyto(out.host, left @ right))
        return out

    def _stream(self, non_blocking: bool = False) -> Stream:
        self._streams.append(Stream(self, Queue(), 64 * len(self._streams)))
        return self._streams[-1]

    def stream_at(self, ptr: int) -> Stream:
        return next(stream for stream in self._streams if stream.ptr == ptr)

    def enter(self, stream: Stream) -> None:
        """The stream becomes the current one."""
        self._current.append(stream)
        self.device.queue = stream.queue

    def leave(self) -> None:
        """The one before is the current one again."""
        self._current.pop()
        self.device.queue = self._current[-1].queue

    def _push_range(self, name: str) -> None:
        self._open_ranges.append(name)

    def _pop_range(self) -> None:
        self.ranges.append("/".join(self._open_ranges))
        self._open_ranges.pop()

    def _synchronise(self) -> None:
        for stream in self._streams:
            self.device.wait(stream.queue)


def _device_arrays(*arrays: Any) -> None:
    for array in arrays:
        if not isinstance(array, ndarray):
            raise TypeError(f"Unsupported type {type(array)}")


class Stream:
    """A stream that can capture what it is given while it is the current one. A capture concerns the whole device in
    so far as it forbids the same to all, as in CUDA's global mode."""

    def __init__(self, cupy: FakeCupy, queue: Queue, ptr: int) -> None:
        self._cupy = cupy
        self._device = cupy.device
        self.queue = queue
        self.ptr = ptr

    def __enter__(self) -> Stream:
        self._cupy.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._cupy.leave()

    def begin_capture(self) -> None:
        if self.ptr == 0:
            raise CaptureError("the default stream cannot capture")
        if self._device.capture is not None:
            raise CaptureError("a capture is in progress")
        self._device.capture = Capture(self.queue)

    def end_capture(self) -> Graph:
        capture, self._device.capture = self._device.capture, None
        if capture is None or capture.origin is not self.queue:
            raise CaptureError("no capture is in progress")
        if any(n > capture.joined[queue] for queue, n in capture.given.items() if queue is not self.queue):
            raise CaptureError("another stream came to be captured, and was not waited for at the end")
        return Graph(self._device, capture)

    def synchronize(self) -> None:
        self._device.wait(self.queue)

    def wait_event(self, event: Event) -> None:
        """What this stream is given from here on comes after what the event is of now: to record it anew does not
        change that."""
        queue, place, capture = event.queue, event.place, self._device.capture
        if capture is None:
            self._device.counts["waits for another stream"] += 1
            self._device.give(self.queue, lambda: queue.run(place))
        elif event.capture is capture:
            capture.add(self.queue, Wait(queue, place))  # and so this stream is captured too
        else:
            self._device.uncapturable("waits for another stream")


class Event:
    """A place in the order of what a stream was given, to wait for. One that was not recorded is passed.

    `time`: when it was reached, if it is timed and was.
    """

    def __init__(self, device: Device, *, timed: bool) -> None:
        self._device = device
        self._timed = timed
        self.queue, self.place = device.queue, 0
        self.capture: Capture | None = None  # in which it was recorded
        self.time: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.queue = self._device.queue if stream is None else stream.queue
        if self._timed:
            self._device.uncapturable("timed events")  # a graph would hold them, and never give their times
            self._device.give(self.queue, self._reach)
        capture = self._device.capture
        self.capture = capture if capture and self.queue in capture.given else None
        self.place = capture.given[self.queue] if self.capture and capture else self.queue.given

    def _reach(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        if self.queue.done < self.place:
            self._device.wait(self.queue, self.place)


def elapsed_time(begin: Event, end: Event) -> float:
    """Milliseconds between two timed events."""
    if begin.time is None or end.time is None:
        raise RuntimeError("an event that is not timed, was not recorded, or was not reached yet")
    return 1000 * (end.time - begin.time)


class Graph:
    """The calls of a capture, to be run again on the same arrays."""

    def __init__(self, device: Device, capture: Capture) -> None:
        self._device = device
        self._capture = capture

    def launch(self) -> None:
        device, capture = self._device, self._capture
        device.counts["graphs"] += 1
        queues = {queue: device.queue if queue is capture.origin else Queue() for queue in capture.given}
        before = {queue: own.given for queue, own in queues.items()}
        for queue, call in capture.calls:
            if isinstance(call, Wait):
                device.give(queues[queue], partial(queues[call.queue].run, before[call.queue] + call.place))
            else:
                device.launch(call, queues[queue])


# Kernels ---------------------------------------------------------------------------------------------------


class ElementwiseKernel:
    """A cupy.ElementwiseKernel that runs on the CPU. `real` is the one of the real CuPy."""

    def __init__(self, device: Device, real: Any) -> None:
        self._device = device
        self.real = real
        self._compiled: dict[Any, Kernel] = {}
        self._poisoned = [not p.raw and written_before_read(real.operation, p.name) for p in real.out_params]

    def __call__(self, *arguments: Any, size: int | None = None) -> Any:
        real = self.real
        if len(arguments) not in (real.nin, real.nargs):
            raise TypeError(
                f"{real.name} takes {real.nin} arguments, or {real.nargs} with outputs, not {len(arguments)}"
            )
        for argument in arguments:
            if not isinstance(argument, ndarray | int | float | np.number):
                raise TypeError(f"Unsupported type {type(argument)}")
        inputs, outputs = arguments[: real.nin], arguments[real.nin :]
        if not all(isinstance(output, ndarray) for output in outputs):
            raise TypeError("Output arguments type must be cupy.ndarray")
        dtypes = [x.dtype if isinstance(x, ndarray) else None for x in inputs]
        types = codegen.elementwise_types(real, dtypes, [output.dtype for output in outputs])
        parameters = (*real.in_params, *real.out_params)
        looped = [isinstance(x, ndarray) and not p.raw for p, x in zip(parameters, arguments, strict=False)]
        if any(looped) == (size is not None):
            raise ValueError("Loop size is undecided." if size is None else "Specified 'size' can be used only if raw")
        loops = [x.shape for x, loop in zip(arguments, looped, strict=True) if loop]
        shape = np.broadcast_shapes(*loops) if loops else (size,)
        if not outputs:
            outputs = tuple(self._device.empty(shape, dtype) for dtype in types[1])
            arguments, looped = (*inputs, *outputs), [*looped, *(True for _ in outputs)]
        for parameter, output in zip(real.out_params, outputs, strict=True):
            if not parameter.raw and output.shape != shape:
                raise ValueError("Out shape is mismatched")
        if 0 not in shape:
            hosts = [x.host if isinstance(x, ndarray) else x for x in arguments]
            hosts = [np.broadcast_to(h, shape) if loop else h for h, loop in zip(hosts, looped, strict=True)]
            self._launch(hosts, looped, (*types[0], *types[1]), types[2], shape, outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _launch(
        self, hosts: list[Any], looped: list[bool], dtypes: tuple[Any, ...], type_map: Any, shape: Any, outputs: Any
    ) -> None:
        if all(h.flags.c_contiguous for h, loop in zip(hosts, looped, strict=True) if loop):
            shape = (int(np.prod(shape, dtype=np.int64)),)  # CuPy then loops over one dimension
            hosts = [h.reshape(-1) if loop else h for h, loop in zip(hosts, looped, strict=True)]
        signature = tuple(
            codegen.Argument(np.dtype(t), h.ndim, h.flags.c_contiguous)
            if isinstance(h, np.ndarray)
            else codegen.Argument(np.dtype(t))
            for h, t in zip(hosts, dtypes, strict=True)
        )
        kernel = self._kernel(signature, len(shape), type_map)
        blobs = [
            array_argument(h) if isinstance(h, np.ndarray) else scalar_argument(h, t)
            for h, t in zip(hosts, dtypes, strict=True)
        ]
        blobs.append(indexer_argument(shape))
        inputs = [h for h in hosts[: self.real.nin] if isinstance(h, np.ndarray)]
        written = list(zip(outputs, self._poisoned, strict=True))
        threads = int(np.prod(shape, dtype=np.int64))
        block = min(DEFAULT_BLOCK, threads)
        grid = -(-threads // block)

        def run() -> None:
            for output, poisoned in written:
                if poisoned and not any(np.may_share_memory(output.host, x) for x in inputs):
                    output.host.fill(-1 if output.dtype.kind == "i" else np.nan)
            kernel(blobs, grid, block, self._device.thread_order(grid * block))
            for output in outputs:
                output.check_guards(self.real.name)

        self._device.launch(run)

    def _kernel(self, signature: tuple[codegen.Argument, ...], ndim: int, type_map: Any) -> Kernel:
        key = (signature, ndim)
        if key not in self._compiled:
            source = codegen.elementwise_source(self.real, signature, ndim, type_map)
            self._compiled[key] = Kernel(
                source, self.real.name, with_cupy_headers=True, options=self.real.kwargs.get("options", ())
            )
            self._device.kernels.append(self._compiled[key])
        return self._compiled[key]


def written_before_read(operation: str, name: str) -> bool:
    """Whether a body assigns to `name` before it reads it, or never mentions it: its old value is then no input."""
    first = re.search(rf"\b{name}\b", operation)
    if first is None:
        return True
    assigned = re.match(rf"{name}\s*=(?!=)([^;]*)", operation[first.start() :])
    return assigned is not None and not re.search(rf"\b{name}\b", assigned[1])


class RawKernel:
    """A cupy.RawKernel that runs on the CPU, one fiber a thread.

    Stricter than CuPy, which passes addresses and knows nothing of what they point to: dtypes are compared with
    the source's, and arrays must be contiguous.
    """

    def __init__(self, device: Device, code: str, name: str) -> None:
        self._device = device
        self.code = code
        self.name = name
        self._kernel = Kernel(code, name, fibers=True)
        device.kernels.append(self._kernel)

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
        if len(grid) != 1 or len(block) != 1:
            raise NotImplementedError("grids and blocks of one dimension alone")
        parameters = self._kernel.parameters
        if len(args) != len(parameters):
            raise TypeError(f"{self.name} takes {len(parameters)} arguments, not {len(args)}")
        blobs, arrays = [], []
        for k, (parameter, argument) in enumerate(zip(parameters, args, strict=True)):
            if not isinstance(argument, ndarray | np.number):  # a Python number has no C type of its own
                raise TypeError(f"Unsupported type {type(argument)}")
            is_array = isinstance(argument, ndarray)
            if is_array != bool(parameter.is_pointer) or argument.dtype != parameter.dtype:
                raise TypeError(f"argument {k} of {self.name} is {parameter.dtype}, not {argument.dtype}")
            if isinstance(argument, ndarray):
                if not argument.flags.c_contiguous:
                    raise ValueError(f"argument {k} of {self.name} must be contiguous")
                arrays.append(argument)
                blobs.append(pointer_argument(argument.host))
            else:
                blobs.append(scalar_argument(argument, argument.dtype))

        def run() -> None:
            self._kernel(blobs, grid[0], block[0], self._device.thread_order(block[0]))
            for array in arrays:
                array.check_guards(self.name)

        self._device.launch(run)
