"""A device that is host memory: what `fake_cupy` counts, forbids and records, and its arrays.

Memory of its own has a guard zone on both sides, so that a kernel that writes out of bounds is caught, and what
`empty` gives holds NaN, so that a value that nobody wrote is seen.
"""

from __future__ import annotations

import operator
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from cuda_on_cpu.cpu import Kernel

Order = Literal["forward", "reverse", "random"]

GUARD_BYTES = 256
POISON = 0xFF  # in every byte: a NaN in any floating type, -1 in a signed integer


class CaptureError(RuntimeError):
    """Something that a CUDA graph cannot hold was asked for during a capture."""


class OutOfBoundsError(RuntimeError):
    """A kernel wrote beside an array."""


class PinnedMemoryError(RuntimeError):
    """Host memory was given back before the device had copied from it."""


class Queue:
    """What a stream was given to do, and has yet to do, in that order. A call may be to wait for another stream.

    A queue runs as far as somebody waits for it, and no further: so what comes first by luck alone comes last here.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self.given = self.done = 0

    def give(self, call: Callable[[], None]) -> None:
        self._waiting.append(call)
        self.given += 1

    def run(self, until: int | None = None) -> None:
        """Runs the first `until` calls of all that it was ever given, where they have not run."""
        until = self.given if until is None else until
        while self.done < until:
            self.done += 1
            self._waiting.popleft()()


class Wait(NamedTuple):
    """In a capture: what a stream is given from here on comes after the first `place` calls of another's."""

    queue: Queue
    place: int


class Capture:
    """What is captured of a stream, and of others that come to wait for it, in the order in which it was asked for."""

    def __init__(self, origin: Queue) -> None:
        self.origin = origin
        self.calls: list[tuple[Queue, Callable[[], None] | Wait]] = []
        self.given = Counter({origin: 0})  # calls of each stream
        self.joined: Counter[Queue] = Counter()  # of these, those that the first stream waits for

    def add(self, queue: Queue, call: Callable[[], None] | Wait) -> None:
        self.calls.append((queue, call))
        self.given[queue] += 1
        if queue is self.origin and isinstance(call, Wait):
            self.joined[call.queue] = max(self.joined[call.queue], call.place)


class Device:
    """What happens on the device.

    Args:
        dry: nothing runs; for whoever only wants to know which kernels are called.
        lazy: a call runs only when somebody waits for its stream, as late as on a real device it might.

    Attributes:
        queue: of the current stream. While it captures, no other is given anything.
        order: in which the threads of a kernel run; a right kernel gives the same whatever the order.
        counts: allocations, host copies, synchronisations, device copies, launches (of them, in a replay too) and
            graphs launched so far.
        capture: the one in progress, None where there is none.
        kernels: those that were called so far.
        used_bytes: of the arrays that there are, on the device; pinned_bytes: likewise of pinned memory of the host.
    """

    def __init__(self, order: Order = "forward", *, dry: bool = False, lazy: bool = False) -> None:
        self.order = order
        self._dry = dry
        self._lazy = lazy
        self._pinned: list[weakref.ref[np.ndarray]] = []
        self._arrays: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()
        self.queue = Queue()
        self.kernels: list[Kernel] = []
        self.counts: Counter[str] = Counter()
        self.capture: Capture | None = None
        self._random = np.random.default_rng(0)
        self.used_bytes = self.pinned_bytes = 0

    def launch(self, call: Callable[[], None], queue: Queue | None = None) -> None:
        """Gives a stream a call, by default the current one; during a capture only notes it for the replay."""
        self.counts["launches"] += 1
        if self.capture is not None:
            if (queue or self.queue) not in self.capture.given:
                raise CaptureError("a call to another stream during a capture")
            self.capture.add(queue or self.queue, call)
        else:
            self.give(queue or self.queue, call)

    def give(self, queue: Queue, call: Callable[[], None]) -> None:
        """Gives a stream a call, which it runs at once unless it is lazy."""
        queue.give((lambda: None) if self._dry else call)
        if not self._lazy:
            queue.run()

    def uncapturable(self, *what: str) -> None:
        """Counts things that a graph cannot hold, and refuses them during a capture."""
        self.counts.update(what)
        if self.capture is not None:
            raise CaptureError(f"{' and '.join(what)} during a capture")

    def wait(self, queue: Queue | None = None, until: int | None = None) -> None:
        """The host waits until a stream, by default the current one, has made its first `until` calls, or all."""
        self.uncapturable("synchronisations")
        (queue or self.queue).run(until)

    def thread_order(self, threads: int) -> np.ndarray:
        if self.order == "forward":
            return np.arange(threads)
        return np.arange(threads)[::-1] if self.order == "reverse" else self._random.permutation(threads)

    def empty(self, shape: Any, dtype: Any, order: str = "C") -> ndarray:
        self.uncapturable("allocations")
        memory, host = _guarded(shape, np.dtype(dtype), order)
        self.used_bytes += host.nbytes
        weakref.finalize(memory, self._give_back, host.nbytes, 0)
        self._arrays[id(memory)] = memory
        return ndarray(self, memory, host)

    def memory_at(self, address: int, nbytes: int) -> np.ndarray | None:
        """So many bytes from an address on, where an array that there still is has them all."""
        for memory in self._arrays.values():
            start = address - memory.ctypes.data
            if GUARD_BYTES <= start <= len(memory) - GUARD_BYTES - nbytes:
                return memory[start : start + nbytes].view(np.ndarray)
        return None

    def _give_back(self, used: int, pinned: int) -> None:
        self.used_bytes -= used
        self.pinned_bytes -= pinned

    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory that the device copies from by itself, to be held until it has."""
        self.uncapturable("allocations")
        memory = np.full(nbytes, POISON, np.uint8)
        self._pinned.append(weakref.ref(memory))
        self.pinned_bytes += nbytes
        weakref.finalize(memory, self._give_back, 0, nbytes)
        return memory

    def copy_from_pinned(self, array: ndarray, address: int, nbytes: int, queue: Queue | None) -> None:
        """A copy that the host does not wait for: it reads the host's memory when its turn comes.

        A graph can hold one, but each replay would read what then stands there: refused during a capture.
        """
        held = [(memory, address - memory.ctypes.data) for ref in self._pinned if (memory := ref()) is not None]
        found = [(weakref.ref(m), start) for m, start in held if 0 <= start <= m.nbytes - nbytes]
        if not found or nbytes > array.nbytes:
            raise ValueError("an asynchronous copy from memory that is not pinned, or beyond its end")
        self.uncapturable("asynchronous copies")
        reference, start = found[0]

        def copy() -> None:
            memory = reference()
            if memory is None:
                raise PinnedMemoryError("pinned memory is gone, and was still to be copied")
            array.host.reshape(-1).view(np.uint8)[:nbytes] = memory[start : start + nbytes]

        self.launch(copy, queue)

    def from_host(self, host: np.ndarray) -> ndarray:
        self.uncapturable("host copies")
        self.wait()
        array = self.empty(host.shape, host.dtype)
        array.host[...] = host
        return array


class _Memory(np.ndarray):
    """Memory of the device: a class of its own, so that views are told from it."""


def _guarded(shape: Any, dtype: np.dtype[Any], order: str) -> tuple[_Memory, np.ndarray]:
    """New memory full of POISON, and an array in its middle."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.full(nbytes + 2 * GUARD_BYTES, POISON, np.uint8).view(_Memory)
    host = memory[GUARD_BYTES : GUARD_BYTES + nbytes].view(np.ndarray).view(dtype).reshape(shape, order=order)  # type: ignore[call-overload]
    return memory, host


class ndarray:
    """A stand-in for cupy.ndarray, stricter than it: what this project does not use is not there.

    `host` is its data as a NumPy array, for `fake_cupy` and for tests that have to look.
    """

    __array_ufunc__ = None  # so that NumPy's operators refuse it
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, device: Device, memory: np.ndarray, host: np.ndarray) -> None:
        self.device = device
        self.memory = memory
        self.host = host
        self.shape = host.shape
        self.dtype = host.dtype
        self.size = host.size
        self.ndim = host.ndim
        self.nbytes = host.nbytes
        self.itemsize = host.itemsize
        self.flags = host.flags

    def _view(self, host: np.ndarray) -> ndarray:
        return ndarray(self.device, self.memory, host)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`.")

    def __bool__(self) -> bool:
        return bool(self.get())

    def __float__(self) -> float:
        """As in CuPy, a copy to the host that waits."""
        return float(self.get())

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, index: Any) -> ndarray:
        """A view; slices and whole numbers alone, since an index array would allocate."""
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            if not isinstance(part, slice | int | np.integer | type(...)):
                raise TypeError(f"an index of {type(part)} would allocate")
        return self._view(self.host[parts if ... in parts else (*parts, ...)])  # with ... it is a view in any case

    def __setitem__(self, index: Any, value: Any) -> None:
        part = self[index]
        source = part._operand(value)
        if isinstance(value, ndarray) and np.broadcast_shapes(part.shape, value.shape) != part.shape:
            raise ValueError(f"shape {value.shape} does not fit {part.shape}")
        self.device.launch(lambda: np.copyto(part.host, source))

    def _operand(self, value: Any) -> Any:
        """What an operation with this array may take: a device array of its dtype, or a Python number."""
        if isinstance(value, ndarray):
            if value.dtype != self.dtype:
                raise TypeError(f"{value.dtype} meets {self.dtype}")
            return value.host
        if isinstance(value, int | float):
            return value
        raise TypeError(f"Unsupported type {type(value)}")

    def _in_place(self, function: Callable[..., Any], other: Any) -> ndarray:
        source = self._operand(other)
        self.device.launch(lambda: function(self.host, source))
        return self

    def __iadd__(self, other: Any) -> ndarray:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> ndarray:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> ndarray:
        return self._in_place(operator.imul, other)

    def view(self, dtype: Any) -> ndarray:
        return self._view(self.host.view(dtype))

    def fill(self, value: float) -> None:
        self.device.launch(lambda: self.host.fill(value))

    def reshape(self, *shape: Any) -> ndarray:
        """A view; where the strides do not allow one, CuPy copies."""
        new = self.host.reshape(*shape)
        if not np.may_share_memory(new, self.host) and self.size:
            self.device.uncapturable("device copies", "allocations")
            return self.device.from_host(new)
        return self._view(new)

    @property
    def data(self) -> MemoryPointer:
        return MemoryPointer(self)

    @property
    def T(self) -> ndarray:
        return self._view(self.host.T)

    def copy(self, order: str = "C") -> ndarray:
        made = self.device.empty(self.shape, self.dtype, order)
        self.device.counts["device copies"] += 1
        self.device.launch(lambda: np.copyto(made.host, self.host))
        return made

    def get(self) -> np.ndarray:
        self.device.uncapturable("host copies")
        self.device.wait()
        return self.host.copy()

    def set(self, host: np.ndarray) -> None:
        """From host memory that is not pinned and without a stream, as here, CuPy waits for the copy."""
        if type(host) is not np.ndarray:
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if host.dtype != self.dtype:
            raise TypeError(f"{host.dtype} array cannot be set to {self.dtype} array")
        if host.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {host.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        self.device.uncapturable("host copies")
        self.device.wait()
        self.host[...] = host

    def check_guards(self, kernel: str) -> None:
        """Raises OutOfBoundsError where the guard zones of this array's memory were written."""
        if (self.memory[:GUARD_BYTES] != POISON).any() or (self.memory[-GUARD_BYTES:] != POISON).any():
            raise OutOfBoundsError(f"{kernel} wrote beside an array of shape {self.shape}")


class MemoryPointer:
    """A stand-in for the memory of a contiguous array."""

    def __init__(self, array: ndarray) -> None:
        self._array = array
        self.ptr: int = array.host.ctypes.data

    def copy_from_host_async(self, address: int, nbytes: int, stream: Any = None) -> None:
        queue = None if stream is None else stream.queue
        self._array.device.copy_from_pinned(self._array, address, nbytes, queue)
