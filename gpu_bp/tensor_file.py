"""Files of named tensors: safetensors, and to read also .npz.

`read_shapes` tells from the headers what a file has, and that its size bears it out: what is then wanted of it is read
with `read_tensors`, by whom it fits.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from gpu_bp.errors import UserError
from gpu_bp.plain_file import NpyHeader, read_npy_header
from gpu_bp.whole_file import PartFile

Shapes = Mapping[str, tuple[int, ...]]
# A byte of what deflate makes stands for at most so many.
MOST_DEFLATED = 1032
WRITTEN = {"float64": "F64", "float32": "F32"}  # dtypes that are written, and safetensors' names of them
DTYPES = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, {} where it has none. Raises UserError as `read_tensors`."""
    with _readable(path), safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of a safetensors or .npz file. Raises UserError as `read_tensors`."""
    with _readable(path):
        if _is_npz(path):
            with zipfile.ZipFile(path) as archive:
                return {name: header.shape for name, (_, header) in _members(archive).items()}
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The named tensors of a safetensors file, or of an .npz; by default all.

    Raises:
        UserError: it is missing, not a regular file or none of these; or a tensor is of a dtype that NumPy lacks.
    """
    with _readable(path):
        if _is_npz(path):
            with zipfile.ZipFile(path) as archive:
                members = _members(archive)
                wanted = members if names is None else names
                return {name: _read_member(archive, *members[name]) for name in wanted}
        with safe_open(path, framework="numpy") as file:
            wanted = file.keys() if names is None else names
            for name in wanted:
                if (dtype := file.get_slice(name).get_dtype()) not in DTYPES:
                    raise UserError(
                        f"{path}: tensor {name} is of {dtype}; a type that NumPy has is needed, such as F32"
                    )
            return {name: file.get_tensor(name) for name in wanted}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> str:
    """Writes a safetensors file, whole or not at all, and returns its SHA-256. Raises OSError with its name.

    Not by safetensors' own `save_file`, which writes into a file of a random name that a killed process leaves behind.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": WRITTEN[tensor.dtype.name], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with PartFile(path) as file:
        head: tuple[bytes | memoryview, ...] = len(text).to_bytes(8, "little"), text
        for part in chain(head, (_bytes_of(tensor) for _, tensor in ordered)):
            file.write(part)
            digest.update(part)
        file.finish()
    return digest.hexdigest()


def _bytes_of(tensor: np.ndarray) -> memoryview:
    """Not a copy, which would be made while no other thread runs."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a file that is missing or broken makes of it within becomes a UserError."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    kind = "an .npz file" if _is_npz(path) else "a safetensors file"
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory") from None
    except (SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is not {kind}: {error}") from None


def _members(archive: zipfile.ZipFile) -> dict[str, tuple[zipfile.ZipInfo, NpyHeader]]:
    """The arrays of an .npz, by name. Raises ValueError where one is none, or cannot be as large as it says."""
    found = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed in another way than NumPy does")
        with archive.open(info) as file:
            header = read_npy_header(file)
        if info.file_size != header.file_bytes or header.file_bytes > MOST_DEFLATED * (info.compress_size + 1):
            raise ValueError(f"{name} is said to have the shape {header.shape}, which does not fit its size")
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = info, header
    if not found:
        raise ValueError("there are no arrays in it")
    return found


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: NpyHeader) -> np.ndarray:
    if header.dtype.kind not in "biuf":
        raise ValueError(f"{info.filename} has no real numbers, but {header.dtype}")
    flat = np.empty(int(np.prod(header.shape, dtype=np.int64)), header.dtype)
    with archive.open(info) as file:
        file.read(header.start)
        _fill(file, flat.data.cast("B") if flat.size else memoryview(b""))
        file.read()  # to the end, where the checksum is verified
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


def _fill(file: IO[bytes], view: memoryview) -> None:
    while view:
        part = file.read(min(len(view), 2**20))
        if not part:
            raise EOFError("it ends too early")
        view[: len(part)] = part
        view = view[len(part) :]
