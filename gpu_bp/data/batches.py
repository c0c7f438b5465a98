"""Batches: the rows of a source in the order of the steps, put into the same arrays again and again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from typing import Any

from gpu_bp.backends import Backend
from gpu_bp.data.order import Order, Sampling
from gpu_bp.data.places import Places
from gpu_bp.data.source import Batch, Source
from gpu_bp.data.sources import empty, on_device
from gpu_bp.data.windows import Blocks, Windows
from gpu_bp.sharding import Sharding
from gpu_bp.spec import Array

# Numbers of the rows of several steps, at most.
TOGETHER = 2**20


class Batches:
    """The batches of a source, epoch after epoch: one a step, or several of at most `part_rows` rows each; or one for
    `steps_at_once` steps, or fewer where these have many numbers.

    Rows that lie on the device, or are generated there in order, come straight from the source; others by windows
    (see `windows.py`), in blocks of `block_rows` and `window_blocks` of these a window. With sampling "replacement"
    every step is full; else each row comes once an epoch, and the last step may be shorter. The rows and their order
    do not depend on the parts.

    Attributes:
        size: rows of a step. part_size: rows of a batch, at most.
        in_leaves: whether the parts are the leaves of a sharding.
        per_epoch: steps an epoch.
        asked_rows: rows that the source is asked for at once, at most.
        staged: whether they come from the host into staging memory that stays.
    """

    def __init__(
        self,
        backend: Backend,
        source: Source,
        batch_size: int,
        sampling: Sampling,
        seed: int,
        *,
        part_rows: int | None = None,
        dtype: Any = "float32",
        block_rows: int | None = None,
        window_blocks: int | None = None,
        steps_at_once: int = 1,
        sharding: Sharding | None = None,
    ) -> None:
        self._backend = backend
        self._sharding = sharding
        self.size = min(batch_size, source.n_rows)
        self.part_size = min(part_rows or self.size, self.size)
        self.in_leaves = sharding is not None and self.part_size < self.size
        if sharding is not None:
            most = sharding.largest_leaf(self.size) if self.in_leaves else self.size
            self.part_size = min(sharding.most_rows(self.size), most)
        self.per_epoch = -(-source.n_rows // self.size)
        self._length = self.per_epoch * self.size if sampling == "replacement" else source.n_rows
        self._steps = 1
        if self.part_size == self.size and sharding is None:
            most = TOGETHER // (self.size * (source.n_inputs + source.n_targets))
            self._steps = max(1, min(steps_at_once, most, self._length // self.size))
        batch_rows = self.part_size * self._steps
        self._arrays = empty(backend, source, batch_rows, dtype)
        self._parts_of_arrays: dict[int, Batch] = {}
        self._windows: Windows | None = None
        self.asked_rows, self.staged = batch_rows, False
        from_host = source.backend is not backend
        if source.block_rows > 1 and (sampling == "shuffled" or (sampling == "ordered" and from_host)):
            blocks = Blocks.of(source, sampling, seed, block_rows, window_blocks)
            places = Places.of(source.n_rows, self.size, sharding, in_order=sampling == "ordered")
            self._windows = Windows(backend, source, blocks, places, dtype)
            self.asked_rows, self.staged = min(blocks.asked_rows, self._windows.rows), from_host
        else:
            self._source = on_device(backend, source)
            self._order = Order(backend, sampling, seed, source.n_rows, self._length, batch_rows)

    def epoch(
        self, epoch: int, first: int = 0, *, follows: bool = True, free: Callable[[], int] = lambda: 1
    ) -> Generator[Batch, None, None]:
        """The batches of an epoch from step number `first` on; each is valid until the next is asked for.

        Rows are read ahead beyond the epoch's end where the next one `follows`. How many steps may be taken at once, is
        asked of `free` before each batch.
        """
        if self._windows is not None:
            yield from self._from_windows(self._windows, epoch, first, follows, free)
            return
        for start, step, place, n in self._parts(first, free):
            rows = self._order.rows(epoch, start + place, n)
            batch = replace(self._batch(step, place, n), rows=rows)
            if n:
                self._source.fill(rows, batch)
            yield batch

    def _parts(self, first: int, free: Callable[[], int]) -> Iterator[tuple[int, int, int, int]]:
        """The parts of the steps from number `first` on: where the step starts in the epoch, how many rows it has, the
        part's place in it, and the part's rows. Or all of several steps."""
        start, several = first * self.size, self._steps * self.size
        while start < self._length:
            if self._steps > 1 and self._length - start >= several and free() >= self._steps:
                yield start, several, 0, several
                start += several
                continue
            step = min(self.size, self._length - start)
            for place, end in self._cuts(step):
                yield start, step, place, end - place
            start += step

    def _rows_here(self, step: int) -> tuple[int, int]:
        """Of a step of so many rows the first that is worked on here, and the end of them."""
        return (0, step) if self._sharding is None else self._sharding.rows(step)

    def _cuts(self, step: int) -> Iterable[tuple[int, int]]:
        """The parts of a step of so many rows: one at least, be it of no rows."""
        first, end = self._rows_here(step)
        if first == end or (end - first <= self.part_size and not self.in_leaves):
            return [(first, end)]
        if self._sharding is not None:
            return self._sharding.leaves(step)
        return [(place, min(place + self.part_size, step)) for place in range(0, step, self.part_size)]

    def _batch(self, step: int, place: int, n: int) -> Batch:
        """The arrays for n rows, as a part of a step of so many, or as all rows of several steps."""
        steps = max(1, step // self.size)
        last = place + n == self._rows_here(step)[1]
        return replace(self._first(n), place=place, last=last, steps=steps, rows_in_step=step // steps)

    def _from_windows(
        self, windows: Windows, epoch: int, first: int, follows: bool, free: Callable[[], int]
    ) -> Iterator[Batch]:
        at = end = 0  # of the run that is there
        window, places = self._arrays, None
        coming = windows.from_place(epoch, first * self.size, follows)
        for _, step, place, size in self._parts(first, free):
            filled = 0
            while filled < size:
                if at == end:
                    window, places = next(coming)
                    at, end = 0, window.n if places is None else len(places)
                n = min(size - filled, end - at)
                self._gather(window, at, n, places, self._arrays.part(filled, filled + n))
                at, filled = at + n, filled + n
            windows.upload_what_is_read()
            yield self._batch(step, place, size)
        for _ in coming:  # what is read ahead for the next epoch stays
            pass

    def _first(self, n: int) -> Batch:
        """The first n rows of the arrays: the same objects again and again, by which a step knows them."""
        if n not in self._parts_of_arrays:
            self._parts_of_arrays[n] = self._arrays.part(0, n)
        return self._parts_of_arrays[n]

    def _gather(self, window: Batch, start: int, n: int, places: Array | None, out: Batch) -> None:
        for held, array in zip(window.arrays, out.arrays, strict=True):
            if places is None:
                self._backend.copy(held[start : start + n], array)
            else:
                self._backend.gather(held, places[start : start + n], array)
