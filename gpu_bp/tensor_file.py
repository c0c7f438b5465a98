"""Files of named tensors: safetensors, and to read also .npz."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gpu_bp.errors import UserError
from gpu_bp.whole_file import PartFile

DTYPES = {"float64": "F64", "float32": "F32"}  # that are written, and safetensors' names of them


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The named tensors of a safetensors file, or of an .npz. Raises UserError where it is missing or is none."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    kind = "an .npz file" if path.suffix.lower() == ".npz" else "a safetensors file"
    try:
        if kind == "a safetensors file":
            return load_file(path)
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path} is not an .npz file: it is a .npy file")
        with file:
            members = dict(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except TypeError as error:  # bfloat16
        raise UserError(f"{path}: {error}; a type that NumPy has is needed, such as float32") from None
    except (SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is not {kind}: {error}") from None
    if not members or not all(isinstance(member, np.ndarray) for member in members.values()):
        raise UserError(f"{path} is not {kind} of named arrays alone")
    return members


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> str:
    """Writes a safetensors file, whole or not at all, and returns its SHA-256. Raises OSError with its name.

    Not by safetensors' own `save_file`, which writes into a file of a random name that a killed process leaves behind.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with PartFile(path) as file:
        for part in chain((len(text).to_bytes(8, "little"), text), (tensor.tobytes() for _, tensor in ordered)):
            file.write(part)
            digest.update(part)
        file.finish()
    return digest.hexdigest()
