"""How the sums of a step come from rank to rank.

    exchange.begin([gradients[a:b]])     # as soon as nothing is added to these here any more
    ...                                  # what is asked of the device meanwhile may be done at the same time
    exchange.end()                       # what is asked of it from here on finds the sums over all ranks

Sums are those of the tree of `tree_sum.py`, so that it does not matter what they are cut into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from gpu_bp.ranks import Ranks
from gpu_bp.spec import Array


class Exchange(Protocol):
    """Makes arrays the sums over all ranks.

    Attributes:
        by: how, in words. beside: whether the device does it by itself, beside what else it is asked for, so that it
            can be recorded; else the host does, and waits for it.
    """

    by: str
    beside: bool

    def begin(self, arrays: Sequence[Array]) -> None:
        """Flat arrays of float32 or float64; nobody touches them until the end."""

    def end(self) -> None:
        """Of all that was begun."""


class ThroughHost:
    """Sums in the host's memory, by the ranks themselves.

    Args:
        to_host, to_device: of a backend. why: no device does it, to be said in words.
    """

    beside = False

    def __init__(
        self,
        ranks: Ranks,
        to_host: Callable[[Array], np.ndarray],
        to_device: Callable[[np.ndarray], Array],
        why: str = "",
    ) -> None:
        self._ranks = ranks
        self._to_host = to_host
        self._to_device = to_device
        self.by = "through the host's memory" + (f", since {why}" if why else "")

    def begin(self, arrays: Sequence[Array]) -> None:
        for array in arrays:
            if isinstance(array, np.ndarray):
                self._ranks.sum_tree(array)
                continue
            host = self._to_host(array)
            self._ranks.sum_tree(host)
            array[...] = self._to_device(host)

    def end(self) -> None:
        pass
