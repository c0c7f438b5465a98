"""Sums over rows: of chunks of them first, a thread each, then of these; the order of the terms is always the same."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpu_bp.backends import cuda_kernels as kernels
from gpu_bp.backends.cuda_launch import compiled, cupy, launch
from gpu_bp.spec import Array


def _chunks(rows: int) -> int:
    """Into how many sums rows are divided: about the root, so that there are as many threads as terms in each."""
    return math.isqrt(max(0, rows - 1)) + 1


class Sums:
    """Sums of an array's elements x[k], or of other terms of one or two arrays; those of the chunks are kept."""

    def __init__(self) -> None:
        self._partial: dict[tuple[int, Any], Array] = {}

    def of_columns(self, x: Array, out: Array, *y: Array, of: str = "x[k]") -> None:
        """out (n,) = the sums of the columns of x (rows, n)."""
        partial, chunks = self._of_chunks(x, len(x), x.shape[1], *y, of=of)
        compiled(kernels.chunk_sums())(partial, chunks, x.shape[1], 1, out)

    def of_all(self, x: Array, total: Array, *, of: str = "x[k]") -> None:
        """total (1,) += the sum of x."""
        partial, chunks = self._of_chunks(x, x.size, 1, of=of)
        compiled(kernels.add_to_total())(partial, chunks, total)

    @staticmethod
    def n_bytes(shapes: Iterable[tuple[int, ...]], dtype: Any) -> int:
        """What is kept for arrays of these shapes, at most."""
        sums = {(n, math.prod(shape) // n) for shape in shapes for n in (shape[0], math.prod(shape))}
        item: int = np.dtype(dtype).itemsize
        return item * sum({_chunks(rows) * columns for rows, columns in sums})

    def _of_chunks(self, x: Array, rows: int, columns: int, *y: Array, of: str) -> tuple[Array, int]:
        """The sums of the chunks of each column, and how many chunks."""
        chunks = _chunks(rows)
        dtype = np.float32 if x.dtype.itemsize == 2 else x.dtype  # what is stored in fewer bits is summed in float32
        key = (chunks * columns, np.dtype(dtype))
        if key not in self._partial:
            self._partial[key] = cupy.empty(*key)
        partial = self._partial[key]
        launch(kernels.chunk_sums(of), x, *y, rows, columns, chunks, partial)
        return partial, chunks
