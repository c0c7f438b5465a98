"""How much of an array the NumPy backend works on at a time, and the arrays that its twins may use meanwhile."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

# Elements that a formula works on at a time: its few arrays then stay in a core's second-level cache.
BLOCK = 2**16
# Elements of biases that are added at a time.
TILE = 2048
# Elements that are looked at a time, where nothing is written.
LOOK = BLOCK


class Scratch:
    """Scratch arrays of one shape and dtype, made when first used. See `gpu_bp.spec.Scratch`."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._shape = shape
        self._dtype = dtype

    def _new(self) -> np.ndarray:
        return np.empty(self._shape, self._dtype)

    a = cached_property(_new)
    b = cached_property(lambda self: self._new())
    c = cached_property(lambda self: self._new())
    mask = cached_property(lambda self: np.empty(self._shape, np.bool_))
    bits = cached_property(lambda self: self.a.view(f"i{self._dtype.itemsize}"))
    zeros = cached_property(lambda self: np.zeros(self._shape, self._dtype))
    uniforms = cached_property(lambda self: np.empty(self._shape))
    one = cached_property(lambda self: np.ones((), self._dtype))
    half = cached_property(lambda self: np.full((), 0.5, self._dtype))
    ones = cached_property(lambda self: np.ones(self._shape, self._dtype))
    tile = cached_property(lambda self: np.empty((TILE // self._shape[0], self._shape[0]), self._dtype))
    row_a = cached_property(lambda self: np.empty((self._shape[0], 1), self._dtype))
    row_b = cached_property(lambda self: np.empty((self._shape[0], 1), self._dtype))
    row_index = cached_property(lambda self: np.empty(self._shape[0], np.int64))
    column_ones = cached_property(lambda self: np.ones((self._shape[1], 1), self._dtype))
    row_start = cached_property(lambda self: np.arange(self._shape[0]) * self._shape[1])


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows of an array that a formula works on at a time."""
    rows, n = shape[0], math.prod(shape)
    step = max(1, rows) if n <= BLOCK else max(1, BLOCK * rows // n)
    tile = TILE * rows // n if n else 0  # rows of a tile of biases: whole ones
    return step // tile * tile if n > BLOCK and 1 < tile <= step else step
