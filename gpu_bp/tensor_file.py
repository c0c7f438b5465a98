"""Files of named tensors: safetensors, and to read also .npz."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gpu_bp.errors import UserError
from gpu_bp.whole_file import part_of, put_in_place


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


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all. Raises UserError where it cannot be written."""
    try:
        save_file(dict(tensors), part_of(path), metadata=metadata)
        put_in_place(path)
    except (OSError, SafetensorError) as error:
        part_of(path).unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}") from None
