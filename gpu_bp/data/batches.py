"""Batches: the rows of a source in the order of the steps, put into the same arrays again and again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_bp.backends import Backend
from gpu_bp.data.order import Order, Sampling
from gpu_bp.data.source import Batch, Source
from gpu_bp.data.sources import empty, on_device
from gpu_bp.data.windows import Blocks, Windows
from gpu_bp.spec import Array


class Batches:
    """The batches of a source, epoch after epoch.

    Rows that lie on the device, or are generated there in order, come straight from the source; others by windows
    (see `windows.py`), in blocks of `block_rows` and `window_blocks` of these a window. With sampling "replacement"
    every batch is full; else each row comes once an epoch, and the last batch may be shorter.
    """

    def __init__(
        self,
        backend: Backend,
        source: Source,
        batch_size: int,
        sampling: Sampling,
        seed: int,
        *,
        dtype: Any = "float32",
        block_rows: int | None = None,
        window_blocks: int | None = None,
    ) -> None:
        self._backend = backend
        self._n_rows = source.n_rows
        self.size = min(batch_size, source.n_rows)
        self.per_epoch = -(-source.n_rows // self.size)
        self._length = self.per_epoch * self.size if sampling == "replacement" else source.n_rows
        self._arrays = empty(backend, source, self.size, dtype)
        self._windows: Windows | None = None
        from_host = source.backend is not backend
        if source.block_rows > 1 and (sampling == "shuffled" or (sampling == "ordered" and from_host)):
            blocks = Blocks.of(source, sampling, seed, block_rows, window_blocks)
            self._windows = Windows(backend, source, blocks, dtype)
        else:
            self._source = on_device(backend, source)
            self._order = Order(backend, sampling, seed, source.n_rows, self._length, self.size)

    def epoch(self, epoch: int, first: int = 0, *, follows: bool = True) -> Iterator[Batch]:
        """The batches of an epoch from number `first` on; each is valid until the next is asked for.

        Rows are read ahead beyond the epoch's end where the next one `follows`.
        """
        if self._windows is not None:
            yield from self._from_windows(self._windows, epoch, first * self.size, follows)
            return
        for start in range(first * self.size, self._length, self.size):
            n = min(self.size, self._length - start)
            rows = self._order.rows(epoch, start, n)
            batch = Batch(self._arrays.inputs[:n], self._arrays.targets[:n], rows)
            self._source.fill(rows, batch)
            yield batch

    def _from_windows(self, windows: Windows, epoch: int, place: int, follows: bool) -> Iterator[Batch]:
        size = min(self.size, self._n_rows - place)
        filled = 0  # rows of the batch in progress, where it began in the window before
        for window, places in windows.from_place(epoch, place, follows):
            start, end = 0, window.n if places is None else len(places)
            while start < end:
                n = min(size - filled, end - start)
                if places is None and n == size:
                    batch = window.part(start, start + n)  # it lies in the window as it is
                else:
                    part = self._arrays.part(filled, filled + n)
                    self._gather(window, start, n, places, part)
                    batch = self._arrays.part(0, size)
                start, filled, place = start + n, filled + n, place + n
                if filled == size:
                    windows.upload_what_is_read()
                    yield batch
                    filled, size = 0, min(self.size, self._n_rows - place)

    def _gather(self, window: Batch, start: int, n: int, places: Array | None, out: Batch) -> None:
        if places is None:
            for name in ("inputs", "targets", "rows"):
                getattr(out, name)[...] = getattr(window, name)[start : start + n]
            return
        rows = places[start : start + n]
        for name in ("inputs", "targets", "rows"):
            self._backend.gather(getattr(window, name), rows, getattr(out, name))
