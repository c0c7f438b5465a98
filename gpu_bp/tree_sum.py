"""The sum of an array over ranks, in a fixed binary tree: ((r0 + r1) + (r2 + r3)) + ..., as the shards of a step are.

So a rank that has a power of two of consecutive shards sums its own subtree, this the rest, and the bits do not depend
on how many ranks there are. It is recursive halving with doubling distance: with the partner rank ^ 1, then ^ 2, ^ 4,
each half of the range that is still shared is summed by one of the two. A rank is left with its part of the whole
sum; the way back, in reverse, spreads it. The traffic is that of MPI's own sum, 2 (N - 1) / N of the array a rank, most
of it between neighbours, thus inside a machine; nothing is copied, and what comes is added while it is in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

PIECE = 2**20  # bytes that are sent and added at a time
SMALL = 2**14  # bytes; up to here a message costs its latency: partners swap all, in half as many messages


class Level(NamedTuple):
    """With which partner; the range that this rank goes on to sum, and that which the partner does."""

    partner: int
    mine: slice
    theirs: slice


def halving(n: int, rank: int, size: int) -> list[Level]:
    """The levels of a sum of n numbers over so many ranks, a power of two, as one of them sees it."""
    levels, start, stop, bit = [], 0, n, 1
    while bit < size:
        middle = (start + stop) // 2
        mine, theirs = slice(start, middle), slice(middle, stop)
        if rank & bit:
            mine, theirs = theirs, mine
        levels.append(Level(rank ^ bit, mine, theirs))
        start, stop, bit = mine.start, mine.stop, 2 * bit
    return levels


class TreeSum:
    """Sums over the ranks of an MPI communicator, in messages with this tag; its scratch, two pieces, is kept."""

    def __init__(self, comm: Any, tag: int) -> None:
        self._comm = comm
        self._tag = tag
        self._scratch = np.empty((2, PIECE), np.uint8)

    def __call__(self, flat: np.ndarray) -> None:
        """Puts the sum into `flat` (n,), float32 or float64, on every rank."""
        if flat.ndim != 1 or not flat.flags.c_contiguous or flat.dtype.name not in ("float32", "float64"):
            raise ValueError(f"a flat array of float32 or float64 is summed, not {flat.dtype} {flat.shape}")
        levels = halving(len(flat), self._comm.rank, self._comm.size)
        with np.errstate(over="ignore", invalid="ignore"):  # a sum that is not finite is the trainer's to notice
            if flat.nbytes <= SMALL:
                for partner, _, _ in levels:
                    self._swap_and_add(flat, partner)
                return
            for level in levels:
                self._halve(flat, *level)
        for partner, mine, theirs in reversed(levels):
            self._swap(flat[mine], flat[theirs], partner)

    def _swap(self, given: np.ndarray, got: np.ndarray, partner: int) -> None:
        self._comm.Sendrecv(given, partner, self._tag, recvbuf=got, source=partner, recvtag=self._tag)

    def _swap_and_add(self, flat: np.ndarray, partner: int) -> None:
        got = self._scratch[0].view(flat.dtype)[: len(flat)]
        self._swap(flat, got, partner)
        self._add(flat, got, partner)

    def _halve(self, flat: np.ndarray, partner: int, mine: slice, theirs: slice) -> None:
        """Piece k + 1 is on its way while piece k is added, and nobody waits for the partner piece by piece."""
        comm, tag, scratch = self._comm, self._tag, self._scratch.view(flat.dtype)
        width = scratch.shape[1]
        sends = [comm.Isend(flat[piece], partner, tag) for piece in _pieces(theirs, width)]
        kept = [flat[piece] for piece in _pieces(mine, width)]
        got = [scratch[k % 2, : len(piece)] for k, piece in enumerate(kept)]
        coming = [comm.Irecv(piece, partner, tag) for piece in got[:2]]
        for k, piece in enumerate(kept):
            coming[k].Wait()
            self._add(piece, got[k], partner)
            if k + 2 < len(kept):
                coming.append(comm.Irecv(got[k + 2], partner, tag))
        for send in sends:
            send.Wait()

    def _add(self, own: np.ndarray, got: np.ndarray, partner: int) -> None:
        """The lower rank's is the left one, as in the tree."""
        lower, upper = (own, got) if self._comm.rank < partner else (got, own)
        np.add(lower, upper, out=own)


def _pieces(part: slice, width: int) -> list[slice]:
    return [slice(start, min(start + width, part.stop)) for start in range(part.start, part.stop, width)]
