"""Shuffling rows that do not fit in memory, and reading them ahead of the steps.

The rows lie in blocks of consecutive rows. An epoch takes the blocks in a pseudo-random order, some at a time: these
are a *window*, which is read block by block into memory, and its rows are then taken in a pseudo-random order. So every
row comes once, the disk is read by blocks, and any place of any epoch is found without the ones before it.

How well it shuffles: two rows of one block always come within one window. Where the rows on disk are in no
particular order that does not matter; where they are sorted, blocks must be small against the sorted parts.

While the steps take rows from one window, a thread reads the next into the memory of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_bp.backends import Backend
from gpu_bp.data.order import Sampling
from gpu_bp.data.source import Batch, Source
from gpu_bp.data.sources import empty
from gpu_bp.registry import Permutations, Purpose
from gpu_bp.spec import Array

WINDOW_BLOCKS = 64
WINDOW_BYTES = 2**26  # of numbers of 8 bytes, so that the order does not depend on the precision
ORDERED_BYTES = 2**24  # where nothing is shuffled: enough to be ahead


@dataclass(frozen=True)
class Blocks:
    """How n rows are cut into blocks and windows, and in which order an epoch takes them."""

    n_rows: int
    rows: int  # a block; the last may have fewer
    window: int  # blocks
    sampling: Sampling
    seed: int

    @classmethod
    def of(cls, source: Source, sampling: Sampling, seed: int, rows: int | None, window: int | None) -> Blocks:
        """Blocks of so many rows and windows of so many blocks, or by default what suits the source."""
        # weights are left out, so that the order does not depend on whether there are any
        row_bytes = 8 * (source.n_inputs + (1 if source.indexed else source.n_targets))
        window_bytes = ORDERED_BYTES if sampling == "ordered" else WINDOW_BYTES
        if rows is None:  # in order, rows that are best asked for together are so in parts too
            rows = min(source.block_rows, max(1, window_bytes // row_bytes) if sampling == "ordered" else source.n_rows)
        rows = min(rows, source.n_rows)
        fitting = window_bytes // (row_bytes * rows)
        window = min(window or max(1, min(WINDOW_BLOCKS, fitting)), -(-source.n_rows // rows))
        return cls(source.n_rows, rows, window, sampling, seed)

    @property
    def count(self) -> int:
        """Blocks in all."""
        return -(-self.n_rows // self.rows)

    @property
    def windows(self) -> int:
        """Windows an epoch."""
        return -(-self.count // self.window)

    @property
    def window_rows(self) -> int:
        """Rows of a window, at most."""
        return min(self.n_rows, self.rows * self.window)

    @property
    def asked_rows(self) -> int:
        """Rows that the source is asked for at once, at most."""
        return self.window_rows if self._in_order else self.rows

    @property
    def _in_order(self) -> bool:
        """Whether the blocks keep their order. Within a single window the rows' order is enough."""
        return self.sampling == "ordered" or self.windows == 1

    def _permutation(self, epoch: int) -> Permutations | None:
        """Of the blocks; None where they keep their order."""
        if self._in_order:
            return None
        return Permutations.of(self.seed, Purpose.ORDER, self.count, epoch)

    def blocks(self, epoch: int, window: int) -> list[tuple[int, int]]:
        """The ranges of rows of a window, as first row and number of rows: a range a block, or one for all in order."""
        permutation = self._permutation(epoch)
        if permutation is None:
            first = window * self.window * self.rows
            return [(first, min(self.n_rows - first, self.window * self.rows))]
        numbers = np.arange(window * self.window, min((window + 1) * self.window, self.count))
        taken = permutation(numbers)[0].tolist()
        return [(b * self.rows, min(self.rows, self.n_rows - b * self.rows)) for b in taken]

    def within(self, epoch: int, window: int, n: int) -> Permutations:
        """The order in which the n rows of a window are taken."""
        return Permutations.of(self.seed, Purpose.WINDOWS, n, epoch * self.windows + window)

    def find(self, epoch: int, place: int) -> tuple[int, int]:
        """The window in which a place of an epoch lies, and its number within it."""
        full = self.rows * self.window
        permutation, last = self._permutation(epoch), self.count - 1
        short = last if permutation is None else int(permutation.inverse(np.array([last]))[0, 0])
        lacking = self.count * self.rows - self.n_rows  # rows that the last block, wherever it comes, has less
        window = place // full
        if place >= (short // self.window + 1) * full - lacking:
            window, place = (place + lacking) // full, place + lacking
        return window, place - window * full


class Slot:
    """The memory of one window: on the device, and where it is filled, which for rows of the host is on the host."""

    def __init__(self, backend: Backend, source: Source, n: int, dtype: Any) -> None:
        self.device = empty(backend, source, n, dtype)
        self.filled = self.device if source.backend is backend else self.device.map(backend.staging)
        self.blocks: list[tuple[int, int]] = []  # that it holds, or is about to
        self.reading: Future[None] | None = None


class Windows:
    """The windows of a source, one after the other, on the device.

    Rows of files, or of whatever else lives on the host, are read ahead by a thread; generated ones are made in place.
    """

    def __init__(self, backend: Backend, source: Source, blocks: Blocks, dtype: Any) -> None:
        self._blocks = blocks
        self._backend = backend
        self._source = source
        ahead = source.backend is None and blocks.windows > 1
        self._slots = [Slot(backend, source, blocks.window_rows, dtype) for _ in range(2 if ahead else 1)]
        self._thread = ThreadPoolExecutor(1, "gpu_bp-reader") if ahead else None
        self._places = backend.zeros((blocks.window_rows,), np.int64)

    def from_place(self, epoch: int, place: int, follows: bool) -> Iterator[tuple[Batch, Array | None]]:
        """From a place of an epoch to the epoch's end, window by window: its rows that are to come.

        They are to be taken in their order where there is none with them, else the places (n,) say which first.
        Each window is valid until the next is asked for. Where the next epoch `follows`, its first window is read
        ahead too.
        """
        window, skipped = self._blocks.find(epoch, place)
        try:
            while window < self._blocks.windows:
                slot = self._ask_for(epoch, window)
                if self._thread is not None and (follows or window + 1 < self._blocks.windows):
                    self._ask_for(*divmod(epoch * self._blocks.windows + window + 1, self._blocks.windows), slot)
                self._finish(slot)
                self._backend.await_uploads()
                n = sum(rows for _, rows in slot.blocks)
                if self._blocks.sampling == "ordered":
                    yield slot.device.part(skipped, n), None
                else:
                    places = self._places[:n]
                    self._backend.permute(self._blocks.within(epoch, window, n), 0, places.reshape(1, -1))
                    yield slot.device.part(0, n), places[skipped:]
                window, skipped = window + 1, 0
        except BaseException:  # GeneratorExit too, where the epoch is left early
            for slot in self._slots:
                if slot.reading is not None:
                    slot.blocks = []  # the thread stops at the end of its block
            raise
        finally:
            self._backend.finish_uploads()  # who drops the windows now gives no memory back that is being copied

    def upload_what_is_read(self) -> None:
        """Begins to copy windows that have been read meanwhile to the device; called now and then.

        One that could not be read is an error only where it is needed, so that chance has no part in it.
        """
        for slot in self._slots:
            if slot.reading is not None and slot.reading.done() and slot.reading.exception() is None:
                self._finish(slot)

    def _ask_for(self, epoch: int, window: int, beside: Slot | None = None) -> Slot:
        """The slot that has a window, or is reading it; else one, but not `beside`, is given to it."""
        blocks = self._blocks.blocks(epoch, window)
        slots = [slot for slot in self._slots if slot is not beside]
        for slot in slots:
            if slot.blocks == blocks:
                return slot
        slot = slots[0]
        slot.blocks = blocks
        if slot.reading is not None:  # from an epoch that was left early; it stops, and its errors are nobody's
            wait([slot.reading])
        self._backend.finish_uploads()
        if self._thread is not None:
            slot.reading = self._thread.submit(self._read, slot, blocks)
            return slot
        try:
            self._read(slot, blocks)
        except BaseException:
            slot.blocks = []
            raise
        self._upload(slot)
        return slot

    def _read(self, slot: Slot, blocks: list[tuple[int, int]]) -> None:
        start = 0
        for first, n in blocks:
            if slot.blocks is not blocks:
                return  # they are not wanted any more
            part = slot.filled.part(start, start + n)
            if slot.filled is slot.device:
                self._backend.count(first, part.rows)
            else:
                part.rows[:] = np.arange(first, first + n)
            self._source.fill(part.rows, part)
            start += n

    def _finish(self, slot: Slot) -> None:
        if slot.reading is not None:
            reading, slot.reading = slot.reading, None
            try:
                reading.result()
            except BaseException:
                slot.blocks = []
                raise
            self._upload(slot)

    def _upload(self, slot: Slot) -> None:
        if slot.filled is not slot.device:
            for host, array in zip(slot.filled.arrays, slot.device.arrays, strict=True):
                self._backend.upload(host, array)
