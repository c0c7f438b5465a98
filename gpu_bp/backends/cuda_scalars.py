"""Numbers that change from step to step, such as the learning rate, where the kernels of a captured step find them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_bp.backends.cuda_launch import cupy


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
