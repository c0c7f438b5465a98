"""What a backend is asked for again and again, as a CUDA graph: captured once, and replayed.

first call: done as it is, which compiles kernels and makes what is kept -> second: captured and launched -> launched

A capture does nothing on the device. So where it fails, nothing has been done yet, and what was asked for is done as it
is, then and from then on. A launch that fails is an error: nobody knows what it has done.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from gpu_bp.backends.base import Action

log = logging.getLogger("gpu_bp")


class Captures:
    """Captures on a stream of their own, since the current one may be the default stream, which cannot.

    Attributes:
        count: graphs made so far. capturing: whether one is being made.
        refused: why there was none, the first time that there was none; "" as long as there always was.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self.count = 0
        self.capturing = False
        self.refused = ""

    def graph(self, run: Action) -> tuple[Any, Any]:
        """A graph of what `run` asks of the device, and what must live as long as it.

        It can be launched on any stream, and comes after what that was given before.

        Raises:
            Exception: whatever does not let itself be captured.
        """
        cupy, stream = self._cupy, self._stream
        # The address of what is allocated meanwhile stands in the graph: it comes from a pool that nobody else uses.
        pool = cupy.cuda.MemoryPool()
        with stream, cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            self.capturing = True
            try:
                run()
            except BaseException:
                with contextlib.suppress(Exception):  # it is of no use, but the stream can capture again
                    stream.end_capture()
                raise
            finally:
                self.capturing = False
            graph = stream.end_capture()
        self.count += 1
        return graph, pool

    def refuse(self, why: str) -> None:
        """Says once why there is no graph."""
        if not self.refused:
            self.refused = why
            log.warning(f"steps are not captured in a CUDA graph, which would be faster: {why}")


class Recording:
    """An action whose place a graph takes.

    Args:
        run: what is to be done. It asks the device for the same each time, on the same arrays, and waits for nothing.
    """

    def __init__(self, run: Action, captures: Captures) -> None:
        self._run = run  # what it works on must outlive the graph
        self._captures = captures
        self._called = False
        self._launch: Action | None = None

    def __call__(self) -> None:
        if self._captures.capturing:  # it becomes a part of another's graph
            self._run()
            return
        if self._launch is None:
            if not self._called:
                self._run()
                self._called = True
                return
            try:
                graph, self._kept = self._captures.graph(self._run)
                self._launch = graph.launch
            except Exception as error:
                self._captures.refuse((str(error).strip() or type(error).__name__).splitlines()[0])
                self._launch = self._run
        self._launch()
