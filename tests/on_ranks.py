"""What test_ranks.py starts on several ranks, by itself or under a launcher: `python tests/on_ranks.py CASE`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# The package without all that its __init__ imports: for these few modules each of a hundred processes takes a tenth of
# a second rather than one.
sys.modules["gpu_bp"] = types.ModuleType("gpu_bp")
sys.modules["gpu_bp"].__path__ = [str(Path(__file__).parents[1] / "gpu_bp")]

from gpu_bp.errors import Diverged, UserError  # noqa: E402
from gpu_bp.ranks import Ranks, join, write_line  # noqa: E402

# an empty array, odd ones, those around the size up to which all is swapped, and one of several pieces
SIZES = (0, 1, 3, 5, 1001, 4095, 4096, 4097, 1_000_003)


def terms_of(rank: int, n: int, dtype: str) -> np.ndarray:
    """Numbers whose sum depends on the order."""
    rng = np.random.default_rng([rank, n])
    return (rng.standard_normal(n) * 10 ** rng.uniform(-4, 4, n)).astype(dtype)


def in_a_tree(terms: list[np.ndarray]) -> np.ndarray:
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def sums(ranks: Ranks) -> dict[str, Any]:
    """Where the sum over the ranks is not to the bit that of one process, and how much a sum allocates."""
    wrong = []
    for dtype in ("float32", "float64"):
        for n in SIZES:
            flat = terms_of(ranks.rank, n, dtype)
            ranks.sum_tree(flat)
            if flat.tobytes() != in_a_tree([terms_of(rank, n, dtype) for rank in range(ranks.size)]).tobytes():
                wrong.append(f"{n} {dtype} on rank {ranks.rank}")
    huge = np.full(3, 3e38, np.float32)  # and no warning
    ranks.sum_tree(huge)
    small = np.ones(4096, np.float32)
    tracemalloc.start()
    ranks.sum_tree(small)
    allocated = tracemalloc.get_traced_memory()[1]
    ranks.sum_tree(flat)
    return {
        "wrong": ranks.all_gather(wrong),
        "infinite": bool(np.isinf(huge).all()),
        "allocated": ranks.all_gather([allocated, tracemalloc.get_traced_memory()[1]]),
    }


def segments() -> list[str]:
    """The files in shared memory that MPICH would leave behind if the process were killed now."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return [line for line in maps if "mpich_shm" in line and "(deleted)" not in line]


def facts(ranks: Ranks) -> dict[str, Any]:
    """What the ranks know of themselves and each other."""
    if "gpu_bp.mpi" in sys.modules:
        sys.modules["gpu_bp.mpi"].LARGEST = 1_000_001  # type: ignore[attr-defined]  # and arrays go in several messages
    square = np.arange(12.0).reshape(3, 4).T if ranks.rank == 0 else np.zeros(1)
    arrays = [
        ranks.broadcast(x)
        for x in (
            square,
            np.full((), 1.0 * ranks.rank),
            np.zeros((0, 2), np.float16),
            np.arange(2.0**20) * (ranks.rank == 0),
        )
    ]
    kept = arrays[0] is square
    return {
        "seen": ranks.all_gather([ranks.rank, ranks.size, ranks.local_rank]),
        "told": ranks.all_gather(ranks.broadcast({"rank": ranks.rank})),
        "kept": ranks.all_gather(kept),
        "arrays": ranks.all_gather([hashlib.sha256(x.tobytes()).hexdigest() for x in arrays]),
        "segments": ranks.all_gather(segments()),
        "pids": ranks.all_gather(os.getpid()),
        "kinds": ranks.all_gather([f"{x.dtype} {x.shape}" for x in arrays]),
        **sums(ranks),
    }


def go_on(ranks: Ranks) -> None:
    """Sums until the job is ended."""
    flat = np.zeros(1_000_003, np.float32)
    while True:
        ranks.sum_tree(flat)


def on_one(fault: Callable[[Ranks], object], others: Callable[[Ranks], None] = go_on) -> Callable[[Ranks], None]:
    """A fault on rank 1; what the others do meanwhile."""

    def case(ranks: Ranks) -> None:
        ranks.sum_tree(np.zeros(5000))
        fault(ranks) if ranks.rank == 1 else others(ranks)

    return case


def go_on_small(ranks: Ranks) -> None:
    while True:
        ranks.sum_tree(np.zeros(1))


def go_on_telling(ranks: Ranks) -> None:
    while True:
        ranks.broadcast(np.zeros(100))


def impatient(fault: Callable[[Ranks], object]) -> Callable[[Ranks], None]:
    """Who fails does not wait for the others to end too."""

    def case(ranks: Ranks) -> None:
        sys.modules["gpu_bp.mpi"].PATIENCE = 1.0  # type: ignore[attr-defined]
        fault(ranks)

    return case


def on_devices(case: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
    """Ranks may wait for each other unseen, for which who fails has little patience."""

    def act(ranks: Ranks) -> None:
        sys.modules["gpu_bp.mpi"].ON_DEVICES = 1.0  # type: ignore[attr-defined]
        ranks.wait_on_devices()
        case(ranks)

    return act


def saves(ranks: Ranks) -> None:
    time.sleep(3)
    write_line("saved")


def raises(error: BaseException) -> Callable[[Ranks], None]:
    def fault(ranks: Ranks) -> None:
        raise error

    return fault


def is_killed(ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


BROKEN = "rows.csv: line 3\nis broken"

CASES: dict[str, Callable[[Ranks], dict[str, Any] | None]] = {
    "facts": facts,
    "integers": lambda ranks: ranks.sum_tree(np.arange(3)),
    "raise": on_one(raises(KeyError("a bug"))),
    "user-error": on_one(raises(UserError(BROKEN))),
    "no-file": on_one(lambda ranks: Path("no/such/file").read_text()),
    "exit-0": on_one(lambda ranks: sys.exit(0)),
    "exit-3": on_one(lambda ranks: sys.exit(3)),
    "interrupted": on_one(raises(KeyboardInterrupt())),
    "return": on_one(lambda ranks: None, go_on_small),
    "return-while-told": on_one(lambda ranks: None, go_on_telling),
    "killed": on_one(is_killed),
    "user-error-at-the-end": on_one(raises(UserError(BROKEN)), lambda ranks: None),
    "user-error-meanwhile": on_one(impatient(raises(UserError(BROKEN))), lambda ranks: time.sleep(1000)),
    "user-error-while-one-saves": on_one(raises(UserError(BROKEN)), saves),
    "user-error-on-devices": on_devices(on_one(raises(UserError(BROKEN)), lambda ranks: time.sleep(1000))),
    "diverged-on-devices-while-one-saves": on_devices(on_one(raises(Diverged(BROKEN)), saves)),
    "all-interrupted": lambda ranks: sys.exit(143),
    "user-error-on-all": raises(UserError(BROKEN)),
    "aborted": on_one(lambda ranks: ranks.abort("no reason", 7)),
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with join() as ranks:
            found = CASES[sys.argv[1]](ranks)
    except UserError as error:
        write_line(f"error: {error}")
        sys.exit(2)
    if ranks.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
