"""How the NumPy backend shares a step out among the cores of a processor.

A large batch is cut into parts that fit the cache, and each worker takes whole parts through the network, forward and
back, its products on a single thread: so the formulas run on all cores too, and beside the data in the cache. Products
of a batch that is too small for that may be worked on by several threads of BLAS. All of it follows from the shapes
alone, by the rules here; docs/performance.md has the measurements that they come from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from itertools import pairwise

from gpu_bp.backends.base import Action, Division
from gpu_bp.backends.host_libraries import blas_library

WORKER = 12_000_000  # the least work for each worker, in multiplications: about a quarter of a millisecond
WORKER_ROWS = 128  # and the least rows, since each worker has a gradient of all weights to make
FORMULAS = 80  # what the formulas of a unit take for a row, forward and back, in multiplications
PART_ROWS, PART_NUMBERS = 512, 2**17  # a part has so many rows, or so many numbers in its widest layer
BLAS_SMALL = 2**18  # products that OpenBLAS works on by a single thread anyway, likewise
BLAS_THREAD = 2**21  # the least work of a product for each thread of BLAS, in multiplications


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

    def together(self, actions: Sequence[Action]) -> None:
        """Runs all of them at once, each with products on a single thread; returns when all have ended."""
        if len(actions) == 1:
            actions[0]()
            return
        if self._pool is None or self._process != os.getpid():  # a process that is forked has none of the threads
            self._pool, self._process = ThreadPoolExecutor(self.count - 1, "gpu_bp-worker"), os.getpid()
        with self.at_most(1):
            # in copies of the context: what NumPy says of overflows is a part of it
            others = [self._pool.submit(copy_context().run, action) for action in actions[1:]]
            try:
                actions[0]()
            finally:
                wait(others)
            for other in others:
                other.result()

    @contextmanager
    def at_most(self, threads: int) -> Iterator[None]:
        """Within it, products are worked on by so many threads at most."""
        before = 1 if self._blas is None else self._blas.get_num_threads()
        if threads >= before:
            yield
            return
        assert self._blas is not None
        self._blas.set_num_threads(threads)
        try:
            yield
        finally:
            self._blas.set_num_threads(before)
