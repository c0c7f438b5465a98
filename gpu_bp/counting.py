"""Arrays that are counted and not made: a backend without memory, and sources that fill nothing.

On these the parts of a training can be made, however large, to see what they would take (`memory.py`).
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from gpu_bp.backends import Backend
from gpu_bp.backends.base import Action, Apart, Division, Numbers
from gpu_bp.backends.numpy_backend import HostNumbers
from gpu_bp.data.batches import Batches
from gpu_bp.data.source import Batch, Source
from gpu_bp.data.sources import GeneratedSource, SameRows, arrays, empty, on_device
from gpu_bp.formula import Program
from gpu_bp.spec import Array

# For these a backend keeps nothing for itself.
WITHOUT_SCRATCH = ("copy", "fill", "gather", "matmul", "add", "advance")


class Counting(Apart):
    """A backend that makes arrays without memory, and counts them for the part of the training that is being made.

    All other operations do nothing. `device`, `host`: bytes by part.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.resident_bytes = backend.name, backend.resident_bytes
        self.steps_at_once = backend.steps_at_once
        self.device: Counter[str] = Counter()
        self.host: Counter[str] = Counter()
        self._part = ""
        self._worker = 0
        # that something was done to, by worker and dtype
        self._shapes: defaultdict[tuple[int, np.dtype[Any]], set[tuple[int, ...]]] = defaultdict(set)
        self._generated: Counter[Program] = Counter()  # rows at once, at most

    def refuses(self, products: str) -> str | None:
        return self._backend.refuses(products)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it, what is made counts for this part."""
        self._part, before = name, self._part
        yield
        self._part = before

    @property
    def scratch(self) -> int:
        """What the backend itself will keep for what was asked of it."""
        generators = sum(self._backend.generator_bytes(program, n) for program, n in self._generated.items())
        kept = sum(self._backend.scratch_bytes(shapes, dtype) for (_, dtype), shapes in self._shapes.items())
        return generators + kept

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array = _blank(shape, dtype)
        self.device[self._part] += array.nbytes
        return array

    def to_device(self, host: np.ndarray) -> Array:
        return self.zeros(host.shape, host.dtype)

    def to_host(self, array: Array) -> Array:
        return array

    def staging(self, array: Array) -> Array:
        if self.name != "numpy":
            self.host[self._part] += array.nbytes
        return array

    def generate(self, program: Program, seed: int, first: int, rows: Array, outputs: Any) -> None:
        self._generated[program] = max(self._generated[program], len(rows))

    def record(self, run: Action, worker: int = 0) -> Action:
        def action() -> None:
            self._worker = worker
            run()
            self._worker = 0

        return action

    def together(self, actions: Sequence[Action], *, alike: bool = False) -> None:
        for action in actions:
            action()

    def division(self, widths: Sequence[int], rows: int, workers: int | None = None) -> Division:
        return self._backend.division(widths, rows, workers)

    def numbers(self, count: int, dtype: Any) -> Numbers:
        return HostNumbers(count, dtype)  # a few bytes, which nobody reads

    def __getattr__(self, name: str) -> Callable[..., None]:
        def operation(*arguments: Any, **keywords: Any) -> None:
            if name in WITHOUT_SCRATCH:
                return
            arrays = [x for x in arguments if isinstance(x, np.ndarray) and x.dtype.kind in "fV" and x.size]
            for array in arrays[:1]:  # what is stored in fewer bits is worked on in float32
                dtype = np.dtype(np.float32) if array.itemsize == 2 else array.dtype
                self._shapes[self._worker, dtype].add(array.shape)

        return operation


def _blank(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array all of whose elements are one place in memory."""
    dtype = np.dtype(dtype)
    if (n_bytes := math.prod(shape) * dtype.itemsize) > 2**62:
        raise MemoryError(f"an array of {n_bytes:.1e} bytes")
    return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, [0] * len(shape))


class _Counted(SameRows):
    """A source of as many rows as another, which fills nothing."""

    def fill(self, rows: Array, batch: Batch) -> None:
        pass


def counted(source: Source, backend: Backend, counting: Backend) -> Source:
    """What stands for a source while it is counted; nothing of its own code runs."""
    made = source.backend is backend
    stand_in: Source = _Counted(source, source.block_rows)
    if made and isinstance(source, GeneratedSource):
        stand_in = copy.copy(source)
    stand_in.backend = counting if made else source.backend
    return stand_in


def resident(source: Source, counting: Backend, dtype: Any) -> Source:
    """What stands for a `ResidentSource` of a source."""
    arrays(counting, source, source.n_rows, dtype)
    _fill(source, min(source.read_rows, source.n_rows), counting, dtype)
    made = _Counted(source, 1)
    made.backend = counting
    return made


def _fill(source: Source, n: int, counting: Backend, dtype: Any) -> None:
    """Asks a source for n rows, for what is made meanwhile; what they are put into is counted elsewhere."""
    batch = empty(cast(Backend, Counting(counting)), source, n, dtype)
    on_device(counting, source).fill(batch.rows, batch)


def ask(batches: Batches, source: Source, counting: Backend, dtype: Any) -> Batch:
    """A batch of these, after as many rows were asked for at once as ever are."""
    if not batches.staged:
        _fill(source, batches.asked_rows, counting, dtype)
    return empty(cast(Backend, Counting(counting)), source, batches.part_size, dtype)
