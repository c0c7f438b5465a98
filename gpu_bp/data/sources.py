"""The sources there are: rows of files (`FileSource`), of a formula (`GeneratedSource`), and on the device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from gpu_bp.backends import Backend
from gpu_bp.data.preparation import Coding, Preparation, check_targets, scaled
from gpu_bp.data.source import READ_NUMBERS, Batch, Reader, Rows, Source, block_rows_for
from gpu_bp.data.synthetic import Set
from gpu_bp.errors import UserError
from gpu_bp.formula import Columns, Place, Program, runs
from gpu_bp.ranks import Alone, Ranks
from gpu_bp.spec import Array, Loss

# Of a preparation, and as tables of a program.
SCALING, TARGET_SCALING = ("shift", "scale"), ("target_shift", "target_scale")


def put(values: np.ndarray, out: np.ndarray, what: str, first: int = 0) -> None:
    """out = values (rows, n), finite numbers, cast.

    Raises:
        UserError: one is too large for out's dtype (which; `first` is the number of the first row).
    """
    if np.may_share_memory(values, out):
        return  # it was read there
    with np.errstate(over="ignore"):
        np.copyto(out, values, casting="unsafe")
    if values.dtype != out.dtype and out.dtype.kind == "f" and not np.isfinite(out).all():
        row, column = np.argwhere(~np.isfinite(out))[0]
        raise UserError(
            f"{what}, row {first + row}, column {column} (counting from 0): {values[row, column]:g} is too large for "
            f"{out.dtype}; scale the data, or use train.precision = 'float64'"
        )


class SameRows(Source):
    """A source of the rows of another."""

    def __init__(self, source: Source, block_rows: int) -> None:
        super().__init__(
            source.n_rows,
            source.n_inputs,
            source.n_targets,
            source.task,
            indexed=source.indexed,
            weighted=source.weighted,
            block_rows=block_rows,
        )


class CheckedSource(SameRows):
    """A source of a user's own, the one `given`, its rows looked at where they are filled on the host.

    Raises:
        UserError: (by `fill`) a row is not as the source promises (which, and how).
    """

    def __init__(self, source: Source, name: str) -> None:
        super().__init__(source, source.block_rows)
        self.backend = source.backend
        self.given = source
        self._name = name

    def fill(self, rows: Array, batch: Batch) -> None:
        self.given.fill(rows, batch)
        if isinstance(batch.inputs, np.ndarray):
            self._check(rows, batch)

    def _check(self, rows: np.ndarray, batch: Batch) -> None:
        self._refuse(~np.isfinite(batch.inputs).all(axis=1), rows, "has inputs that are not finite")
        if self.indexed:
            outside = (batch.targets < 0) | (batch.targets >= self.n_targets)
            self._refuse(outside, rows, f"has a class that is none of 0 to {self.n_targets - 1}")
        else:
            self._refuse(~np.isfinite(batch.targets).all(axis=1), rows, "has targets that are not finite")
        if batch.weights is not None:
            right = (batch.weights >= 0) & np.isfinite(batch.weights)
            self._refuse(~right, rows, "has a weight that is negative or not finite")

    def _refuse(self, wrong: np.ndarray, rows: np.ndarray, what: str) -> None:
        if wrong.any():
            raise UserError(f"row {rows[int(wrong.argmax())]} of the {self._name} source {what}")


class FileSource(Source):
    """Rows first to first + n of a reader, prepared."""

    def __init__(
        self, reader: Reader, first: int, n_rows: int, preparation: Preparation, coding: Coding, loss: Loss
    ) -> None:
        super().__init__(
            n_rows,
            reader.n_inputs,
            coding.n_targets,
            coding.task,
            indexed=coding.indexed,
            weighted=reader.weighted,
            block_rows=reader.block_rows,
        )
        self._reader = reader
        self._first = first
        self._preparation = preparation
        self._coding = coding
        self._loss = loss
        # whether rows can be read into the batch itself
        self._as_they_are = not preparation.scales and (coding.indexed or not coding.labels)

    def fill(self, rows: Array, batch: Batch) -> None:
        for start, end in runs(rows, READ_NUMBERS // self.n_inputs + 1):
            first, part = self._first + int(rows[start]), batch.part(start, end)
            out = Rows(part.inputs, part.targets) if self._as_they_are else None
            self._put(self._reader.read(first, end - start, out), first, part)

    def _put(self, read: Rows, first: int, batch: Batch) -> None:
        where = self._reader.where
        put(self._preparation.inputs(read.inputs), batch.inputs, f"{where}, inputs", first)
        if read.labels is None:
            check_targets(read.wanted, self._loss, where, first)
        width = self._coding.width
        coded = self._coding.code(read.wanted.reshape(len(batch.rows), -1), np.arange(width)[None])
        put(self._preparation.targets(coded), batch.targets.reshape(-1, width), f"{where}, targets", first)
        if read.weights is not None:
            assert batch.weights is not None
            put(read.weights[:, None], batch.weights[:, None], f"{where}, weights", first)


class GeneratedSource(Source):
    """Rows first to first + n of a synthetic set, generated where they are asked for: on `backend`."""

    backend: Backend

    def __init__(
        self, backend: Backend, made: Set, seed: int, first: int, n_rows: int, preparation: Preparation, coding: Coding
    ) -> None:
        n_inputs = made.inputs.width
        block_rows = block_rows_for(n_inputs + made.target.width)
        super().__init__(n_rows, n_inputs, coding.n_targets, coding.task, indexed=coding.indexed, block_rows=block_rows)
        self.backend = backend
        self._seed = seed
        self._first = first
        names = (SCALING if preparation.scales else ()) + (TARGET_SCALING if preparation.target_shift else ())
        tables = dict(made.tables) | {name: np.array(getattr(preparation, name)) for name in names}

        def inputs(at: Place) -> Any:
            x = made.inputs.formula(at)
            return scaled(x, *(at.table(name, at.column) for name in SCALING)) if preparation.scales else x

        def targets(at: Place) -> Any:
            d = coding.code(made.target.formula(at), at.column)
            return scaled(d, *(at.table(name, at.column) for name in TARGET_SCALING)) if preparation.target_shift else d

        outputs = (Columns(n_inputs, inputs), Columns(coding.width, targets))
        self._program = Program(outputs, made.stages, tables)

    def fill(self, rows: Array, batch: Batch) -> None:
        self.backend.generate(self._program, self._seed, self._first, rows, (batch.inputs, batch.targets))


class SetReader:
    """A synthetic set as a reader: its rows as they are before scaling and coding, float64. See `Reader`."""

    def __init__(self, backend: Backend, made: Set, seed: int, where: str, n_rows: int) -> None:
        self._backend = backend
        self._seed = seed
        self.n_rows = n_rows
        self.n_inputs = made.inputs.width
        self.n_targets = made.target.width
        self.classes = made.classes
        self.binary = made.binary
        self.weighted = False
        self.block_rows = block_rows_for(self.n_inputs + self.n_targets)
        self.where = where
        self._program = Program((made.inputs, made.target), made.stages, made.tables)

    def read(self, first: int, n: int, out: Rows | None = None) -> Rows:
        backend, dtype = self._backend, np.int64 if self.classes else np.float64
        rows = backend.zeros((n,), np.int64)
        backend.count(0, rows)
        outputs = (backend.zeros((n, self.n_inputs), np.float64), backend.zeros((n, self.n_targets), dtype))
        backend.generate(self._program, self._seed, first, rows, outputs)
        inputs, wanted = map(backend.to_host, outputs)
        return Rows(inputs, labels=wanted[:, 0]) if self.classes else Rows(inputs, targets=wanted)


class ResidentSource(SameRows):
    """A source whose rows all lie on the device: `inputs` (n, n_inputs) and `targets`, as in a `Batch`."""

    backend: Backend

    def __init__(self, backend: Backend, source: Source, dtype: Any) -> None:
        super().__init__(source, 1)
        self.backend = backend
        self._held = arrays(backend, source, source.n_rows, dtype)
        self.inputs, self.targets = self._held[:2]
        step = source.read_rows
        loader = on_device(backend, source)
        numbers = backend.zeros((min(step, self.n_rows),), np.int64)
        for start in range(0, self.n_rows, step):
            end = min(start + step, self.n_rows)
            rows = numbers[: end - start]
            backend.count(start, rows)
            loader.fill(rows, Batch.of([array[start:end] for array in self._held], rows))

    def fill(self, rows: Array, batch: Batch) -> None:
        for held, out in zip(self._held, batch.filled, strict=True):
            self.backend.gather(held, rows, out)


class UploadedSource(SameRows):
    """A source of the host, its rows copied to the device as they are asked for."""

    backend: Backend

    def __init__(self, backend: Backend, source: Source) -> None:
        super().__init__(source, source.block_rows)
        self.backend = backend
        self._source = source

    def fill(self, rows: Array, batch: Batch) -> None:
        numbers = self.backend.to_host(rows)
        staging = Batch.of([self.backend.staging(array) for array in batch.filled], numbers)
        self._source.fill(numbers, staging)
        for host, array in zip(staging.filled, batch.filled, strict=True):
            self.backend.upload(host, array)
        self.backend.await_uploads()
        self.backend.finish_uploads()  # the staging memory goes


def on_device(backend: Backend, source: Source) -> Source:
    """A source that fills batches of this backend."""
    here = source.backend is backend or (source.backend is None and backend.name == "numpy")
    return source if here else UploadedSource(backend, source)


def arrays(backend: Backend, source: Source, n: int, dtype: Any) -> list[Array]:
    """What a source fills for n rows, not yet filled, numbers of that dtype."""
    targets = backend.zeros((n,), np.int64) if source.indexed else backend.zeros((n, source.n_targets), dtype)
    weights = [backend.zeros((n,), dtype)] if source.weighted else []
    return [backend.zeros((n, source.n_inputs), dtype), targets, *weights]


def empty(backend: Backend, source: Source, n: int, dtype: Any) -> Batch:
    """A batch of n rows for a source, not yet filled."""
    return Batch.of(arrays(backend, source, n, dtype), backend.zeros((n,), np.int64))


def place(backend: Backend, sources: Mapping[str, Source], residency: str, dtype: Any) -> tuple[bool, str]:
    """Whether the rows are put on the device: where that is asked for, or with "auto" where they fit; and a line that
    says so."""
    n_bytes = _bytes(sources, dtype)
    size = f"data: {_size(sources, dtype)}"
    if residency == "host" or (residency == "auto" and n_bytes > backend.resident_bytes):
        generated = sources["train"].backend is not None
        why = "as asked" if residency == "host" else f"more than {backend.resident_bytes / 2**20:,.0f} MiB"
        return False, f"{size}, {'generated' if generated else 'read'} as they are needed ({why})"
    return True, f"{size}, on the device ({'as asked' if residency == 'device' else 'they fit'})"


def settle(
    backend: Backend, sources: Mapping[str, Source], residency: str, dtype: Any, ranks: Ranks | None = None
) -> tuple[dict[str, Source], str]:
    """The sources, put on the device where `place` says so; and its line. On all of several ranks, or on none.

    Raises:
        UserError: they are to be put on the device and do not fit.
    """
    on_device, line = place(backend, sources, residency, dtype)
    if not on_device:
        return dict(sources), line
    resident: dict[str, Source] = {}
    with suppress(MemoryError):  # CuPy's error is one too
        resident = {name: ResidentSource(backend, s, dtype) for name, s in sources.items()}
    if all((ranks or Alone()).all_gather(bool(resident))):
        return resident, line
    if residency == "auto":
        return settle(backend, sources, "host", dtype)
    size = _size(sources, dtype)
    raise UserError(f"data.residency: {size} do not fit on the device; use residency = 'host'")


def _bytes(sources: Mapping[str, Source], dtype: Any) -> int:
    """Of all their rows."""
    item = np.dtype(dtype).itemsize
    return sum(
        s.n_rows * ((s.n_inputs + s.weighted) * item + (8 if s.indexed else s.n_targets * item))
        for s in sources.values()
    )


def _size(sources: Mapping[str, Source], dtype: Any) -> str:
    n_rows, n_bytes = sum(source.n_rows for source in sources.values()), _bytes(sources, dtype)
    return f"{n_rows:,} rows, {n_bytes / 2**20:,.{0 if n_bytes >= 2**20 else 3}f} MiB"
