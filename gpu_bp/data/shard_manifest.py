"""The manifest of a shard folder, and files that are there whole or not at all.

A shard folder holds rows in shards of `shard_rows` rows, and `manifest.json`, which says what the rows are and lists
every shard that is finished with the size and the checksum of each of its files. What is listed is whole, at any time.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpu_bp.errors import UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MANIFEST = "manifest.json"
AGAIN = "run `gpu-bp generate` again"


class _Record(BaseModel):
    """A JSON object: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShardFile(_Record):
    """A finished file: its name in the folder, its size, and the CRC-32 of its bytes."""

    name: str
    bytes: int
    crc32: int


class Shard(_Record):
    """A finished shard: `rows` rows from number `first` on, and the files they are in."""

    first: int = Field(ge=0)
    rows: int = Field(ge=1)
    files: tuple[ShardFile, ...]


class Manifest(_Record):
    """What is in a shard folder.

    `config` is plain data that identifies what was generated. `rows` are planned in all; the folder is complete
    once the shards have as many. Inputs and targets are numbers of `dtype`. With `classes`, a row's target is a
    label, int64, and n_targets is 1; `binary` targets are 0 and 1. `block_rows` are written together, and best read
    together.
    """

    format: Literal[1] = 1
    config: dict[str, Any]
    rows: int = Field(ge=1)
    dtype: Literal["float64", "float32"]
    n_inputs: int = Field(ge=1)
    n_targets: int = Field(ge=1)
    classes: tuple[str, ...]
    binary: bool
    file_format: Literal["npy", "parquet"]
    shard_rows: int = Field(ge=1)
    block_rows: int = Field(ge=1)
    shards: tuple[Shard, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            UserError: there is none, or it is not a manifest of this format (which key is wrong).
        """
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
            raw = json.loads(text)
        except FileNotFoundError:
            what = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
            raise UserError(f"{folder} is not a shard folder: {what}") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise UserError(f"{path} is not JSON") from None
        if not isinstance(raw, dict) or "format" not in raw:
            raise UserError(f"{path} is not the manifest of a shard folder: it has no key format")
        if raw["format"] != 1:
            raise UserError(f"{path}: its format is {raw['format']!r}, this version of gpu_bp reads format 1")
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise UserError(f"{path}, {'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}") from None
        for shard in manifest.shards:
            index = shard.first // manifest.shard_rows
            first, rows = manifest.plan(index)
            if (shard.first, shard.rows) != (first, rows):
                raise UserError(
                    f"{path}: no shard has {shard.rows} rows from row {shard.first} on; with shard_rows = "
                    f"{manifest.shard_rows} one has {rows} from row {first} on"
                )
        if any(a.first >= b.first for a, b in itertools.pairwise(manifest.shards)):
            raise UserError(f"{path}: its shards are not in the order of their rows")
        return manifest

    def write(self, folder: Path) -> None:
        """Replaces the folder's manifest, whole or not at all."""
        with PartFile(folder / MANIFEST) as file:
            file.write((self.model_dump_json(indent=1) + "\n").encode())
            file.finish()

    @property
    def n_shards(self) -> int:
        """Shards of the complete folder."""
        return -(-self.rows // self.shard_rows)

    @property
    def finished_rows(self) -> int:
        """Rows of the shards that are finished."""
        return sum(shard.rows for shard in self.shards)

    def plan(self, index: int) -> tuple[int, int]:
        """The first row of a shard, and how many rows it has."""
        first = index * self.shard_rows
        return first, min(self.shard_rows, self.rows - first)

    def refuse_other(self, other: Manifest, folder: Path) -> None:
        """Raises UserError where the folder's manifest `other` is of other rows or of another layout."""
        ours, theirs = (_flat(manifest.model_dump(exclude={"shards"}, mode="json")) for manifest in (self, other))
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{folder} holds other rows: {key} is {theirs.get(key)} there and {ours.get(key)} here; "
                    "choose another folder, or remove it"
                )


class PartFile(io.RawIOBase):
    """A file being written as `*.part`: `finish` gives it its name; closed before that, it is removed.

    `write` writes all of what it is given, and raises OSError with the name of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._bytes = self._crc32 = 0
        self._file = self._part.open("wb", buffering=0)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        n = len(view)
        self._bytes += n
        self._crc32 = zlib.crc32(view, self._crc32)
        with self._named():
            while view:
                view = view[self._file.write(view) :]
        return n

    def finish(self) -> ShardFile:
        """Brings the bytes to the disk, then renames: after a power cut too there is the old file or the new one."""
        with self._named():
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(self._path)
            if os.name == "posix":  # elsewhere a folder cannot be opened
                folder = os.open(self._path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        return ShardFile(name=self._path.name, bytes=self._bytes, crc32=self._crc32)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):  # a file that could not be opened has nothing to close
            super().close()
            self._file.close()
            self._part.unlink(missing_ok=True)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, member in value.items() for k, v in _flat(member, f"{key}.{name}" if key else name).items()}
