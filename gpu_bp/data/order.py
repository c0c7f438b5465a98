"""Which row stands at which place of an epoch: a pure function of (sampling, seed, epoch), with no index array.

"ordered": row i at place i. "shuffled": each row once, by a pseudo-random permutation of its own an epoch.
"replacement": each place draws its row anew.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from gpu_bp.backends import Backend
from gpu_bp.formula import Columns, Draws, Program
from gpu_bp.registry import Permutations, Purpose
from gpu_bp.spec import Array

Sampling = Literal["shuffled", "ordered", "replacement"]

# Places that are computed at once: enough that the calls of a short epoch cost nothing, few enough to fit the cache.
CHUNK = 16384
EPOCHS = 256  # at once, at most: on a GPU each is a kernel call


class Order:
    """The order of the epochs of `n_rows` rows (drawn with replacement: of `length` places), on a backend.

    `most` is how many places are asked for at once, at most.
    """

    def __init__(self, backend: Backend, sampling: Sampling, seed: int, n_rows: int, length: int, most: int) -> None:
        self._backend = backend
        self._sampling = sampling
        self._seed = seed
        self._n_rows = n_rows
        self._length = length
        # one chunk of an epoch, or as many epochs as a chunk holds
        self._chunk = min(length, max(most, CHUNK))
        several = self._chunk == length and sampling != "ordered"
        self._epochs = min(EPOCHS, max(1, CHUNK // length)) if several else 1
        self._places = backend.zeros((self._epochs, self._chunk), np.int64)
        self._held: tuple[int, int] | None = None  # the first epoch and place that stand in `_places`
        draw = Draws(Purpose.ORDER, 1)
        self._drawn = Program((Columns(1, lambda at: np.floor(at.uniform(draw, 0) * n_rows)),))

    def rows(self, epoch: int, start: int, n: int) -> Array:
        """The rows at the places start to start + n of an epoch: (n,) int64 on the device, until the next call."""
        first = epoch - epoch % self._epochs
        if self._held is None or self._held[0] != first or not 0 <= start - self._held[1] <= self._chunk - n:
            self._held = first, start if self._chunk < self._length else 0
            self._compute(*self._held)
        place = start - self._held[1]
        return self._places[epoch - first, place : place + n]

    def _compute(self, epoch: int, start: int) -> None:
        places = self._places[:, : min(self._chunk, self._length - start)]
        if self._sampling == "shuffled":
            permutations = Permutations.of(self._seed, Purpose.ORDER, self._n_rows, epoch, self._epochs)
            self._backend.permute(permutations, start, places)
            return
        following = places.reshape(-1)  # the places of several epochs follow each other, as their draws do
        self._backend.count(start, following)
        if self._sampling == "replacement":
            self._backend.generate(self._drawn, self._seed, epoch * self._length, following, (following,))
