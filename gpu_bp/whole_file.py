"""Files that are there whole or not at all: written beside their place, brought to the disk, then renamed."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SUFFIX = ".part"  # of a file that is being written


def part_of(path: Path) -> Path:
    """Where a file is written before it stands in its place."""
    return path.with_name(path.name + SUFFIX)


def write_whole(path: Path, data: bytes | str) -> None:
    """Writes a file (text in UTF-8), whole or not at all. Raises OSError with its name where it cannot be."""
    with PartFile(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.finish()


def put_in_place(path: Path) -> None:
    """Brings the bytes of `part_of(path)` to the disk, and renames it: after a power cut too there is the old file or
    the new one."""
    part = part_of(path)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError within it gets the name of the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


class PartFile(io.RawIOBase):
    """A file being written beside its place: `finish` puts it there; closed before that, it is removed.

    `write` writes all of what it is given, and raises OSError with the name of the file.

    Attributes:
        bytes: its size so far. crc32: their checksum.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.bytes = self.crc32 = 0
        with named(path):
            part_of(path).unlink(missing_ok=True)  # what a killed process left, or a link to what is not ours
            self._file = part_of(path).open("xb", buffering=0)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        n = len(view)
        self.bytes += n
        self.crc32 = zlib.crc32(view, self.crc32)
        with named(self._path):
            while view:
                view = view[self._file.write(view) :]
        return n

    def finish(self) -> None:
        """Puts the file in its place."""
        with named(self._path):
            self._file.close()
            put_in_place(self._path)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):  # a file that could not be opened has nothing to close
            super().close()
            self._file.close()
            part_of(self._path).unlink(missing_ok=True)
