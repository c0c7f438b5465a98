"""How the NumPy backend shares a step out among the cores of a processor.

A large batch is cut into parts that fit the cache, and each worker takes whole parts through the network, forward and
back, its products on a single thread: so the formulas run on all cores too, and beside the data in the cache. Products
of a batch that is too small for that may be worked on by several threads of BLAS. All of it follows from the shapes
alone, by the rules here; docs/performance.md has the measurements that they come from.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from itertools import pairwise

from gpu_bp.backends.base import Action, Division
from gpu_bp.backends.host_libraries import blas_library

WORKER = 12_000_000  # the least work for each worker, in multiplications: about a quarter of a millisecond
WORKER_ROWS = 128  # and the least rows, since each worker has a gradient of all weights to make
FORMULAS = 80  # what the formulas of a unit take for a row, forward and back, in multiplications
PART_ROWS, PART_NUMBERS = 512, 2**17  # a part has so many rows, or so many numbers in its widest layer
BLAS_SMALL = 2**18  # products up to here OpenBLAS works on by a single thread anyway, likewise
BLAS_THREAD = 2**21  # the least work of a product for each thread of BLAS, in multiplications


# How many threads the process's BLAS had, and the limits that are set now, by whichever thread.
_LIMITS: list[int] = []
_LOCK = threading.Lock()


def division(widths: Sequence[int], rows: int, workers: int) -> Division:
    """How a step of a network of these widths is shared out, where there are so many workers."""
    weights = sum(a * b for a, b in pairwise(widths))
    work = rows * (3 * weights + FORMULAS * sum(widths[1:]))
    taken = max(1, min(workers, work // WORKER, rows // WORKER_ROWS))
    own = -(-rows // taken)  # rows of a worker
    parts = -(-own // max(PART_ROWS, PART_NUMBERS // max(widths)))
    return Division(-(-own // parts), taken)


def blas_threads(largest: int) -> int:
    """By how many threads of BLAS products are to be worked on at most; the largest has so many multiplications."""
    return max(1, largest // BLAS_THREAD)


class Workers:
    """Threads beside the caller's own; as many in all as NumPy's BLAS has, where that can be told to use fewer."""

    def __init__(self) -> None:
        self._blas = blas_library()
        self.count: int = 1 if self._blas is None else self._blas.num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def together(self, actions: Sequence[Action], alike: bool = False) -> None:
        """Runs all of them at once, each with products on a single thread; returns when all have ended.

        One alone may have more threads, but not where it is to be `alike`.
        """
        if len(actions) == 1:
            with self.at_most(1) if alike else nullcontext():
                actions[0]()
            return
        if self._pool is None or self._process != os.getpid():  # a process that is forked has none of the threads
            self._pool, self._process = ThreadPoolExecutor(self.count - 1, "gpu_bp-worker"), os.getpid()
        with self.at_most(1):
            # in copies of the context: what NumPy says of overflows is a part of it
            others: list[Future[None]] = []
            try:
                for action in actions[1:]:
                    others.append(self._pool.submit(copy_context().run, action))
                actions[0]()
            finally:
                wait(others)
            for other in others:
                other.result()

    @contextmanager
    def at_most(self, threads: int) -> Iterator[None]:
        """Within it, products are worked on by so many threads at most, whoever else asks for what meanwhile."""
        if self._blas is None:
            yield
            return
        self._limit(threads, _LIMITS.append)
        try:
            yield
        finally:
            self._limit(threads, _LIMITS.remove)

    def _limit(self, threads: int, change: Callable[[int], None]) -> None:
        assert self._blas is not None
        with _LOCK:
            if len(_LIMITS) == 0:
                _LIMITS.append(self._blas.get_num_threads())  # and this is what there was, and will be again
            change(threads)
            self._blas.set_num_threads(min(_LIMITS))
            if len(_LIMITS) == 1:
                _LIMITS.clear()
