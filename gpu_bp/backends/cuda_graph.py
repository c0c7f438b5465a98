"""What a backend is asked for again and again, as a CUDA graph: captured once, and replayed.

first call: done as it is, which compiles kernels and makes what is kept -> second: captured and launched -> launched

A capture does nothing on the device. So where it fails, nothing has been done yet, and what was asked for is done as it
is, then and from then on; only a launch, which is never tried twice, does it otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from gpu_bp.backends.base import Action


class Recording:
    """An action that a graph takes the place of.

    Args:
        run: what is to be done; it asks the device for the same each time, on the same arrays, and waits for nothing.
        stream: to capture on; the current one may be the default stream, which cannot. The graph is launched on
            whatever stream is current.
        cupy: the module.
        refused: is told why there is no graph where a capture fails.
    """

    def __init__(self, run: Action, stream: Any, cupy: Any, refused: Callable[[Exception], None]) -> None:
        self._run = run  # kept: what it works on must outlive the graph
        self._stream = stream
        self._cupy = cupy
        self._refused = refused
        self._called = False
        self._launch: Action | None = None

    def __call__(self) -> None:
        if self._launch is None:
            if not self._called:
                self._run()
                self._called = True
                return
            try:
                self._capture()
            except Exception as error:
                self._refused(error)
                self._launch = self._run
        assert self._launch is not None
        self._launch()

    def _capture(self) -> None:
        """Raises whatever refuses to be captured; the stream can capture again."""
        cupy, stream = self._cupy, self._stream
        # Whatever is allocated meanwhile has its address in the graph: it comes from a pool that nobody else uses.
        pool = cupy.cuda.MemoryPool()
        with stream, cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            try:
                self._run()
            except BaseException:
                with contextlib.suppress(Exception):  # that it is of no use is known
                    stream.end_capture()
                raise
            graph = stream.end_capture()
        self._launch, self._pool = graph.launch, pool
