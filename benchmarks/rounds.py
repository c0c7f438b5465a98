"""Timing calls against each other: in turns, so that what else a machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from gpu_bp.backends import Backend

ROUNDS = 7
ROUND_SECONDS = 0.2


def alternate(
    backend: Backend, calls: Sequence[Callable[[], None]], rounds: int = ROUNDS, seconds: float | None = None
) -> list[float]:
    """Seconds a call, the median of rounds that take the calls in turn, for so many seconds each.

    Many short rounds tell small differences where a machine has other work too.
    """
    return [median(column) for column in zip(*in_turns(backend, calls, rounds, seconds), strict=True)]


def in_turns(
    backend: Backend, calls: Sequence[Callable[[], None]], rounds: int = ROUNDS, seconds: float | None = None
) -> list[list[float]]:
    """Likewise, of each round."""
    wanted = ROUND_SECONDS if seconds is None else seconds

    def once(call: Callable[[], None], n: int) -> float:
        begin = time.perf_counter()
        for _ in range(n):
            call()
        backend.synchronize()
        return (time.perf_counter() - begin) / n

    for call in calls:
        once(call, 3)
    counts = [max(1, int(wanted / once(call, 3))) for call in calls]
    return [[once(call, n) for call, n in zip(calls, counts, strict=True)] for _ in range(rounds)]
