"""What is read of files that anybody may have made: text, and the header of a .npy file.

Nothing is waited for, evaluated, or allocated because a file says so.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

# A .npy file begins with a dictionary in Python's own notation. Of that, what an array of plain numbers has is
# understood, in any order; the rest of the language, which can be nested as deep as one likes, is not.
_HEADER_BYTES = 10_000
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # of the header's length, by the version of the format
_DICTIONARY = re.compile(r"\s*\{(.*)\}\s*", re.DOTALL)
_ITEM = re.compile(
    r"""\s*(['"])(?:descr\1\s*:\s*(?P<quote>['"])(?P<descr>[<>|=]?[?biufcSUVOmM][0-9]{0,4})(?P=quote)"""
    r"""|fortran_order\1\s*:\s*(?P<fortran>True|False)"""
    r"""|shape\1\s*:\s*\((?P<shape>(?:\s*[0-9]{1,18}L?\s*,)*(?:\s*[0-9]{1,18}L?)?)\s*\))\s*(?:,|\Z)\s*"""
)


@dataclass(frozen=True)
class NpyHeader:
    """What a .npy file says of itself; `start`: where its numbers begin."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int

    @property
    def file_bytes(self) -> int:
        """How long the whole file must be; of any size, since nothing bounds what a header says."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(file: IO[bytes]) -> NpyHeader:
    """The header of a .npy file that is open at its beginning.

    Raises:
        ValueError: it is no .npy file, or holds something else than an array of a plain dtype.
    """
    begin = file.read(12)
    length_bytes = _LENGTH_BYTES.get(begin[6], 0) if begin[:6] == b"\x93NUMPY" and len(begin) > 6 else 0
    start = 8 + length_bytes
    if not length_bytes or len(begin) < start:
        raise ValueError("it does not begin as a .npy file")
    length = int.from_bytes(begin[8:start], "little")
    if length > _HEADER_BYTES:
        raise ValueError(f"its header is said to be of {length} bytes")
    header = (begin[start:] + file.read(max(0, start + length - len(begin))))[:length]
    found = _DICTIONARY.fullmatch(header.decode("latin-1"))
    items: dict[str, str] = {}
    place, text = 0, found[1] if found and len(header) == length else ""
    while place < len(text):
        item = _ITEM.match(text, place)
        if item is None:
            break
        items |= {key: value for key, value in item.groupdict().items() if value is not None and key != "quote"}
        place = item.end()
    if place < len(text) or items.keys() != {"descr", "fortran", "shape"}:
        raise ValueError("its header is not that of an array of plain numbers")
    try:
        dtype = np.dtype(items["descr"])
    except TypeError:
        raise ValueError(f"it has numbers of an unknown kind, {items['descr']}") from None
    shape = tuple(int(n.rstrip("L ")) for n in items["shape"].split(",") if n.strip())
    return NpyHeader(dtype, shape, items["fortran"] == "True", start + length)


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file.

    Raises:
        OSError: there is none, or it is a folder, or a pipe or a device, of which the end may never come.
        UnicodeDecodeError: it is not text in that encoding.
    """
    refuse_special(path)
    return path.read_text(encoding=encoding)


def refuse_special(path: Path) -> None:
    """Raises OSError where there is something else than a file or a folder, or nothing."""
    try:
        mode = path.stat().st_mode
    except ValueError:  # a NUL in the name
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
