"""Inputs and targets from .npy files, of any size: read by ranges of rows, never whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpu_bp.data.source import Rows, block_rows_for
from gpu_bp.errors import UserError
from gpu_bp.plain_file import read_npy_header


class NpyFile:
    """One array of real numbers in a .npy file, of one or two dimensions, read by ranges of rows.

    Raises:
        UserError: missing, empty, shorter than its header says, not a .npy file, or of another kind.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        if not path.is_file():
            raise UserError(f"{what}: no file {path}")
        try:
            with path.open("rb") as file:
                header = read_npy_header(file)
        except OSError as error:
            raise UserError(f"{what}: {path}: {error.strerror or 'not a .npy file'}") from None
        except ValueError as error:
            raise UserError(f"{what}: {path} is not a .npy file of numbers: {error}") from None
        self.shape, self._fortran, self.dtype, self._start = header.shape, header.fortran, header.dtype, header.start
        if self.dtype.kind not in "fiub" or len(self.shape) not in (1, 2):
            raise UserError(
                f"{what}: {path} must hold one array of real numbers with 1 or 2 dimensions, not {self.dtype} of "
                f"shape {self.shape}"
            )
        if 0 in self.shape:
            raise UserError(f"{what}: {path} is empty, its shape is {self.shape}")
        size = path.stat().st_size
        if size < header.file_bytes:
            raise UserError(f"{what}: {path} has {size} bytes, its header promises {header.file_bytes}: it is cut off")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.shape[1] if len(self.shape) == 2 else 1

    def read(self, first: int, n: int) -> np.ndarray:
        """Rows first to first + n, in a new array of the file's own dtype: (n, width), or (n,).

        Raises:
            UserError: a NaN or infinity (in which row), or a file that was cut off meanwhile.
        """
        if self._fortran and len(self.shape) == 2:  # a row's numbers lie far apart
            columns = np.memmap(self.path, self.dtype, "r", self._start, self.shape, order="F")
            rows = np.array(columns[first : first + n], order="C")
        else:
            rows = np.empty((n, *self.shape[1:]), self.dtype)
            read_into(rows, self.path, self._start + first * self.width * self.dtype.itemsize)
        if self.dtype.kind == "f" and not np.isfinite(rows).all():
            row = first + int(np.argwhere(~np.isfinite(rows))[0][0])
            raise UserError(f"{self.what}: {self.path} has a NaN or infinity in row {row} (counting from 0)")
        return rows


def read_into(out: np.ndarray, path: Path, start: int) -> None:
    """Fills an array with the bytes of a file from `start` on.

    It is opened anew each time, so that any number of files and threads needs no open files between reads; and read,
    not mapped, because the pages of a map count as memory of the process.

    Raises:
        UserError: the file ends before.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        view = out.data.cast("B")
        while view:
            n = file.readinto(view)
            if not n:
                raise UserError(f"{path} became shorter while it was read")
            view = view[n:]


def real(rows: np.ndarray) -> np.ndarray:
    """Numbers (n,) or (n, width) as (n, width) of float32 where they are that, else float64."""
    matrix = rows[:, None] if rows.ndim == 1 else rows
    return matrix if matrix.dtype == np.float32 else matrix.astype(np.float64, copy=False)


def read_inputs(path: Path, what: str = "inputs") -> np.ndarray:
    """An (n, n_inputs) float64 array from a .npy file."""
    file = NpyFile(path, what)
    return real(file.read(0, len(file))).astype(np.float64)


class ArrayReader:
    """Rows from a pair of .npy files, with weights perhaps from a third. See `gpu_bp.data.source.Reader`.

    Args:
        inputs, targets: the files; a vector of integers is taken as classes where there are `n_classes`.
        n_classes: how many classes there are, 0 where targets are numbers.
        weights: of the rows, none of them negative.
    """

    def __init__(self, inputs: NpyFile, targets: NpyFile, n_classes: int = 0, weights: NpyFile | None = None) -> None:
        self._inputs = inputs
        self._targets = targets
        self._weights = weights
        self.n_rows = len(inputs)
        self.n_inputs = inputs.width
        self.n_targets = targets.width
        self.classes = tuple(str(k) for k in range(n_classes))
        self.binary = False
        self.weighted = weights is not None
        self.block_rows = block_rows_for(self.n_inputs + self.n_targets)
        self.where = str(targets.path)

    def read(self, first: int, n: int, out: Rows | None = None) -> Rows:
        inputs, targets = real(self._inputs.read(first, n)), self._targets.read(first, n)
        weights = None if self._weights is None else _read_weights(self._weights, first, n)
        if not self.classes:
            return Rows(inputs, targets=real(targets), weights=weights)
        outside = (targets < 0) | (targets >= len(self.classes))
        if outside.any():
            k = int(np.argmax(outside))
            raise UserError(
                f"{self.where}, row {first + k} (counting from 0): class {targets[k]} is out of range; there are "
                f"{len(self.classes)} classes, 0 to {len(self.classes) - 1} (data.n_classes sets how many)"
            )
        return Rows(inputs, labels=targets.astype(np.int64), weights=weights)


def _read_weights(file: NpyFile, first: int, n: int) -> np.ndarray:
    weights = real(file.read(first, n))[:, 0]
    if weights.min() < 0:
        k = int(np.argmin(weights))
        raise UserError(
            f"{file.what}: {file.path}, row {first + k} (counting from 0): the weight is negative, {weights[k]:g}"
        )
    return weights
