"""Shuffling rows that do not fit in memory, and reading them ahead of the steps.

The rows lie in blocks of consecutive rows. An epoch takes the blocks in a pseudo-random order, some at a time: these
are a *window*, which is read block by block into memory, and its rows are then taken in a pseudo-random order. So every
row comes once, the disk is read by blocks, and any place of any epoch is found without the ones before it.

How well it shuffles: two rows of one block always come within one window. Where the rows on disk are in no
particular order that does not matter; where they are sorted, blocks must be small against the sorted parts.

Where the rows of a step are split into shards (`sharding.py`), those of a window are shared out in the order in which
its blocks are read: to shard 0 as many as it takes while the window lasts, the next to shard 1, and so on; each takes
its own in a pseudo-random order. So who works on some shards reads their part of the window alone, and the order
depends on how many shards there are, but not on who works on them. Where nothing is shuffled, their rows of each step
are read.

While the steps take rows from one window, a thread reads the next into the memory of the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpu_bp.backends import Backend
from gpu_bp.data.order import Sampling
from gpu_bp.data.places import Places
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

    def within(self, epoch: int, window: int, n: int, shard: int = 0, shards: int = 1) -> Permutations:
        """The order in which a shard of so many takes the n rows that it has of a window."""
        return Permutations.of(self.seed, Purpose.WINDOWS, n, (epoch * self.windows + window) * shards + shard)

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
    """The memory for one window: on the device, and where it is filled, which for rows of the host is on the host."""

    def __init__(self, backend: Backend, source: Source, n: int, dtype: Any) -> None:
        self.device = empty(backend, source, n, dtype)
        self.filled = self.device if source.backend is backend else self.device.map(backend.staging)
        self.blocks: list[tuple[int, int]] = []  # that it holds, or is about to
        self.reading: Future[None] | None = None


class _Window(NamedTuple):
    """A window of an epoch: its number, its places from start to end, and the ranges of rows that are read of it."""

    epoch: int
    number: int
    start: int
    end: int
    ranges: list[tuple[int, int]]


class Windows:
    """The windows of a source that have rows for `places`, one after the other, on the device: these rows of each.

    Rows of files, or of whatever else lives on the host, are read ahead by a thread; generated ones are made in place.

    Attributes:
        rows: of a window here, at most.
    """

    def __init__(self, backend: Backend, source: Source, blocks: Blocks, places: Places, dtype: Any) -> None:
        self._blocks = blocks
        self._places = places
        self.rows = places.most(blocks.window_rows)
        self._backend = backend
        self._source = source
        ahead = source.backend is None and blocks.windows > 1
        self._slots = [Slot(backend, source, self.rows, dtype) for _ in range(2 if ahead else 1)]
        self._thread = ThreadPoolExecutor(1, "gpu_bp-reader") if ahead else None
        self._order = backend.zeros((self.rows,), np.int64)

    def from_place(self, epoch: int, place: int, follows: bool) -> Iterator[tuple[Batch, Array | None]]:
        """From a place of an epoch to the epoch's end: the rows that are taken here one after the other, in runs.

        Those of a run are to be taken in their order where there is none with them, else the places (n,) say which.
        Each is valid until the next is asked for. Where the next epoch `follows`, its first window is read ahead too.
        """
        window = self._window_at(epoch, place, follows=False)
        try:
            while window is not None:
                slot, following = self._ask_for(window), self._window_at(epoch, window.end, follows)
                if self._thread is not None and following is not None:
                    self._ask_for(following, slot)
                self._finish(slot)
                self._backend.await_uploads()
                yield from self._runs(slot.device, window, max(place, window.start))
                window = following if following is not None and following.epoch == epoch else None
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

    def _window_at(self, epoch: int, place: int, follows: bool) -> _Window | None:
        """The window of the next row that is taken here, from a place of an epoch on, or in the one that `follows`."""
        places, taken = self._places, self._places.here(place)
        if taken == places.here(places.n_rows):
            if not follows:
                return None
            epoch, taken = epoch + 1, 0
        place = places.place(taken)
        number, within = self._blocks.find(epoch, place)
        start, ranges = place - within, self._blocks.blocks(epoch, number)
        end = start + sum(n for _, n in ranges)
        if self._blocks.sampling == "ordered":
            ranges = [(first, last - first) for _, first, last in places.runs(start, end)]
        else:
            before = places.before(end, places.shards.start) - places.before(start, places.shards.start)
            ranges = list(_cut(ranges, before, before + places.here(end) - places.here(start)))
        return _Window(epoch, number, start, end, ranges)

    def _runs(self, rows: Batch, window: _Window, place: int) -> Iterator[tuple[Batch, Array | None]]:
        """What is taken of a window from a place of its epoch on; `rows` begin with those of it that were read."""
        places, (epoch, number, start, end, _) = self._places, window
        if self._blocks.sampling == "ordered":
            yield rows.part(places.here(place) - places.here(start), places.here(end) - places.here(start)), None
            return
        of_shards: dict[int, tuple[Batch, Array]] = {}
        at = 0
        for shard in places.shards:
            n = places.of_shard(end, shard) - places.of_shard(start, shard)
            if n:
                order = self._order[at : at + n]
                within = self._blocks.within(epoch, number, n, shard, places.sharding.shards)
                self._backend.permute(within, 0, order.reshape(1, -1))
                of_shards[shard] = rows.part(at, at + n), order
            at += n
        for shard, first, last in places.runs(place, end):
            held, order = of_shards[shard]
            taken = places.of_shard(first, shard) - places.of_shard(start, shard)
            yield held, order[taken : taken + last - first]

    def _ask_for(self, window: _Window, beside: Slot | None = None) -> Slot:
        """The slot that has what is read of a window, or is reading it; else one, but not `beside`, is given to it."""
        blocks = window.ranges
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


def _cut(ranges: Iterable[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Of the rows in these ranges those from start to end."""
    for first, n in ranges:
        if max(start, 0) < min(end, n):
            yield first + max(start, 0), min(end, n) - max(start, 0)
        start, end = start - n, end - n
