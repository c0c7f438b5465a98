"""Shard folders: rows in files of about 64 MiB, written by `write_shards` and read by `ShardReader`."""

from __future__ import annotations

import errno
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpu_bp.data.shard_files import ShardFiles, shard_files
from gpu_bp.data.shard_manifest import AGAIN, MANIFEST, Manifest, Shard, ShardFile
from gpu_bp.data.source import Reader, Rows, block_rows_for
from gpu_bp.errors import UserError, unknown
from gpu_bp.lock import LOCK, Lock
from gpu_bp.whole_file import SUFFIX

FILE_FORMATS = ("npy", "parquet")
DTYPES = ("float64", "float32")
SHARD_BYTES = 64 * 2**20
MOST_SHARDS = 100_000  # the manifest, which names each, is written anew after each


class ShardReader:
    """The rows of a shard folder: a `Reader`.

    Opening looks at the manifest, and whether every file is there with its size. A file's checksum is verified once,
    when a shard is first read from. Threads may read at the same time; they take turns.

    Raises:
        UserError: not a shard folder, one that is incomplete, a file that is missing or of another size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = manifest = Manifest.read(self.folder)
        if manifest.finished_rows < manifest.rows:
            raise UserError(
                f"{folder} is incomplete: it has {manifest.finished_rows} of {manifest.rows} rows; {AGAIN} to finish it"
            )
        for shard in manifest.shards:
            for file in shard.files:
                _check_size(self.folder / file.name, file)
            if not manifest.could_hold(shard):
                first, end = shard.first, shard.first + shard.rows
                raise UserError(f"{self.folder / MANIFEST}: rows {first} to {end - 1} do not fit into their files")
        self._files = shard_files(manifest, self.folder)  # whose columns the sizes of the files bear out
        for index, shard in enumerate(manifest.shards):
            if tuple(file.name for file in shard.files) != self._files.names(index):
                raise UserError(f"{self.folder / MANIFEST}: shard {index} must be in {self._files.names(index)}")
        self._verified: set[int] = set()
        self._lock = threading.Lock()
        self.n_rows = manifest.rows
        self.n_inputs = manifest.n_inputs
        self.n_targets = manifest.n_targets
        self.classes = manifest.classes
        self.binary = manifest.binary
        self.weighted = False
        self.block_rows = manifest.block_rows
        self.where = str(folder)

    def read(self, first: int, n: int, out: Rows | None = None) -> Rows:
        """The n rows from number `first` on, in arrays of the folder's dtype: `out`'s where they are that.

        Raises:
            UserError: a file was changed, or cannot be read.
            IndexError: there are no such rows.
        """
        m = self.manifest
        if not 0 <= first <= first + n <= m.rows:
            raise IndexError(f"rows {first} to {first + n} of {m.rows}")
        dtype, wanted_dtype = np.dtype(m.dtype), np.dtype(np.int64 if m.classes else m.dtype)
        if out is not None and (out.inputs.dtype, out.wanted.dtype) == (dtype, wanted_dtype):
            inputs, wanted = out.inputs, out.wanted
        else:
            inputs = np.empty((n, m.n_inputs), dtype)
            wanted = np.empty(n if m.classes else (n, m.n_targets), wanted_dtype)
        done = 0
        with self._lock:
            while done < n:
                index, start = divmod(first + done, m.shard_rows)
                end = min(n, done + m.shards[index].rows - start)
                self._read(index, start, inputs[done:end], wanted[done:end])
                done = end
        if not m.classes:
            return Rows(inputs, targets=wanted)
        outside = (wanted < 0) | (wanted >= len(m.classes))
        if outside.any():
            k = int(outside.argmax())
            raise UserError(f"{self.where}, row {first + k}: class {wanted[k]} is none of 0 to {len(m.classes) - 1}")
        return Rows(inputs, labels=wanted)

    def _read(self, index: int, start: int, inputs: np.ndarray, wanted: np.ndarray) -> None:
        try:
            if index not in self._verified:
                for file in self.manifest.shards[index].files:
                    _check_sum(self.folder / file.name, file)
                self._verified.add(index)
            self._files.read(index, start, inputs, wanted)
        except OSError as error:
            raise UserError(f"{error.filename or self.folder}: {error.strerror or error}") from None


def write_shards(
    reader: Reader,
    folder: str | Path,
    *,
    rows: int,
    config: Mapping[str, Any],
    file_format: str = "npy",
    dtype: str = "float64",
    shard_rows: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> int:
    """Writes the first `rows` rows of a reader as a shard folder, or what is missing in one that was begun.

    A block of rows is held in memory at a time. Wherever it ends, the folder is valid, and the same call goes on.

    Args:
        reader: where the rows come from.
        folder: a new or empty folder, or one that was begun with the same arguments.
        rows: how many there will be.
        config: plain data that identify the rows, for the manifest.
        file_format: "npy" or "parquet".
        dtype: "float64" or "float32", of inputs and targets.
        shard_rows: rows a shard; by default about 64 MiB.
        progress: is given the number of rows that are written, at first and after every block; where any are missing.

    Returns:
        How many rows were written now: 0 where the folder was complete.

    Raises:
        UserError: the folder holds something else, a number is not finite (which row), the disk is full (what is
            safe, and how to go on), Parquet without pyarrow, or an unknown format or dtype.
    """
    folder = Path(folder)
    manifest = _planned(reader, rows, dict(config), file_format, dtype, shard_rows)
    files = shard_files(manifest, folder)
    if sum(shard.rows for shard in _begun(folder, manifest)) == rows:
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _failed(error, folder, 0, rows) from None
    with Lock(folder, "shard folder", "-o"):
        return _write(reader, folder, manifest, files, progress)


def _write(reader: Reader, folder: Path, manifest: Manifest, files: ShardFiles, progress: Callable[[int], None]) -> int:
    """Writes the shards that are missing, and returns their rows."""
    begun = _begun(folder, manifest)
    shards = {shard.first // manifest.shard_rows: shard for shard in begun}
    manifest = manifest.model_copy(update={"shards": begun})
    before = done = manifest.finished_rows
    progress(done)
    try:
        for leftover in folder.glob(f"*{SUFFIX}"):
            leftover.unlink()
        manifest.write(folder)
        for index in range(manifest.n_shards):
            if index in shards:
                continue
            first, n = manifest.plan(index)
            written = files.write(index, _blocks(reader, first, n, manifest, progress, done))
            shards[index] = Shard(first=first, rows=n, files=written)
            listed = manifest.model_copy(update={"shards": tuple(shards[k] for k in sorted(shards))})
            listed.write(folder)
            manifest, done = listed, listed.finished_rows
    except OSError as error:
        raise _failed(error, folder, done, manifest.rows) from None
    return manifest.rows - before


def _failed(error: OSError, folder: Path, done: int, rows: int) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    safe = f"; {done} of {rows} rows are safe, run the same command again to go on" if done or full else ""
    return UserError(f"{error.filename or folder}: {(error.strerror or str(error)).lower()}{safe}")


def _planned(
    reader: Reader, rows: int, config: dict[str, Any], file_format: str, dtype: str, shard_rows: int | None
) -> Manifest:
    """The manifest of a folder that is to be begun."""
    if file_format not in FILE_FORMATS:
        raise unknown("file format", file_format, FILE_FORMATS)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if not 1 <= rows <= reader.n_rows:
        raise UserError(f"{reader.where} has {reader.n_rows} rows; {rows} of them cannot be written")
    item = np.dtype(dtype).itemsize
    row_bytes = reader.n_inputs * item + (8 if reader.classes else reader.n_targets * item)
    block_rows = block_rows_for(reader.n_inputs + reader.n_targets)
    if shard_rows is None:  # whole blocks
        shard_rows = max(1, SHARD_BYTES // row_bytes // block_rows) * block_rows
    if rows > MOST_SHARDS * shard_rows:
        raise UserError(
            f"{rows} rows in shards of {shard_rows} are more than {MOST_SHARDS} shards; use --shard-rows of at least "
            f"{-(-rows // MOST_SHARDS)}"
        )
    return Manifest.model_validate(
        {
            "config": config,
            "rows": rows,
            "dtype": dtype,
            "n_inputs": reader.n_inputs,
            "n_targets": reader.n_targets,
            "classes": tuple(reader.classes),
            "binary": reader.binary,
            "file_format": file_format,
            "shard_rows": shard_rows,
            "block_rows": block_rows,
        }
    )


def _begun(folder: Path, planned: Manifest) -> tuple[Shard, ...]:
    """The shards of the plan that are in the folder; one that lost a file, or part of it, is to be written again."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another folder")
    if not (folder / MANIFEST).exists():
        # a first manifest may have been left half written
        if folder.exists() and any(path.name not in (MANIFEST + SUFFIX, LOCK) for path in folder.iterdir()):
            raise UserError(f"{folder} has other files in it and no {MANIFEST}; choose another folder")
        return ()
    begun = Manifest.read(folder)
    planned.refuse_other(begun, folder)
    return tuple(shard for shard in begun.shards if _is_whole(folder, shard))


def _is_whole(folder: Path, shard: Shard) -> bool:
    try:
        for file in shard.files:
            _check_size(folder / file.name, file)
    except UserError:
        return False
    return True


def _blocks(
    reader: Reader, first: int, n: int, manifest: Manifest, progress: Callable[[int], None], done: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The n rows from number `first` on as they go into files: inputs and labels or targets, block by block."""
    for start in range(0, n, manifest.block_rows):
        count = min(manifest.block_rows, n - start)
        rows = reader.read(first + start, count)
        inputs = _finite(rows.inputs, manifest.dtype, reader.where, first + start)
        if manifest.classes:
            wanted = np.ascontiguousarray(rows.labels, np.int64)
        else:
            assert rows.targets is not None
            wanted = _finite(rows.targets, manifest.dtype, reader.where, first + start)
        yield inputs, wanted
        progress(done + start + count)


def _finite(numbers: np.ndarray, dtype: str, where: str, first: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # becomes infinity, which is refused
        result = np.ascontiguousarray(numbers, dtype)
    finite = np.isfinite(result)
    if not finite.all():
        row = first + int(np.argwhere(~finite)[0][0])
        raise UserError(f"{where}, row {row} (counting from 0): a NaN or infinity as {dtype}")
    return result


def _check_size(path: Path, file: ShardFile) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {AGAIN} to restore it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if size != file.bytes:
        what = "truncated" if size < file.bytes else "too long"
        raise UserError(f"{path} is {what}: {size} bytes, {MANIFEST} says {file.bytes}; {AGAIN} to restore it")


def _check_sum(path: Path, file: ShardFile) -> None:
    _check_size(path, file)
    crc32, buffer = 0, memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as stream:
        while n := stream.readinto(buffer):
            crc32 = zlib.crc32(buffer[:n], crc32)
    if crc32 != file.crc32:
        raise UserError(
            f"{path} was changed: its checksum is not the one in {MANIFEST}; delete it and {AGAIN} to restore it"
        )
