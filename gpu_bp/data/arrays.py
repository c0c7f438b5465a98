"""Inputs and targets from a pair of .npy files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpu_bp.errors import UserError


def read_npy(path: Path, what: str) -> np.ndarray:
    """The array in a .npy file: finite numbers, one or two dimensions, no pickle.

    Raises:
        UserError: missing, empty, not a .npy file, of another kind, or with a NaN or infinity (which row).
    """
    if not path.is_file():
        raise UserError(f"{what}: no file {path}")
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except OSError as error:
        raise UserError(f"{what}: {path}: {error.strerror or 'not a .npy file'}") from None
    except Exception:  # whatever a broken header makes of it
        raise UserError(f"{what}: {path} is not a .npy file of numbers") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.ndim not in (1, 2):
        held = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"{what}: {path} must hold one array of real numbers with 1 or 2 dimensions, not {held}")
    if array.size == 0:
        raise UserError(f"{what}: {path} is empty, its shape is {array.shape}")
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            raise UserError(f"{what}: {path} has a NaN or infinity in row {row} (counting from 0)")
    return np.asarray(array)


def read_inputs(path: Path, what: str = "inputs") -> np.ndarray:
    """An (n, n_inputs) float64 array from a .npy file."""
    array = read_npy(path, what).astype(np.float64)
    return array[:, None] if array.ndim == 1 else array


def read_pair(inputs: Path, targets: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (n, n_inputs) float64 and targets: (n,) integers as they are, anything else (n, n_targets) float64."""
    x = read_inputs(inputs, "data.inputs")
    d = read_npy(targets, "data.targets")
    if len(x) != len(d):
        raise UserError(f"data.inputs has {len(x)} rows and data.targets has {len(d)}; they must be equal")
    if d.ndim == 1 and d.dtype.kind in "iu":
        return x, d
    d = d.astype(np.float64)
    return x, d[:, None] if d.ndim == 1 else d
