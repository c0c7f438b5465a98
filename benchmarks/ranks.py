"""A step in shards, by one rank and by several, on the devices that are here: the same, bit for bit?

    python -m benchmarks.ranks [--backend auto|numpy|cupy] [--mpiexec FILE]

By one rank; by one rank through a communicator of NCCL, which has nobody to send to; by two ranks that mpiexec starts,
with the MPI of this environment, which share a GPU where there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.distributed import MPIEXEC, RANKS, SHARDS, told_by_ranks
from benchmarks.options import backend_for
from benchmarks.peers.cells import Cell
from benchmarks.peers.ours import Ours
from gpu_bp import Step, select
from gpu_bp.backends import Backend
from gpu_bp.exchange import Exchange
from gpu_bp.ranks import Alone, Ranks, join
from gpu_bp.sharding import Sharding

CELL = Cell(3, 512, 1003, "tanh", "adam", "squared_error")
STEPS = 20


@dataclass(frozen=True)
class Way:
    """By whom a step was taken, what summed over ranks, and of which bits everything was after some steps.

    `digest` is None where it was not taken, for the `reason`; `wanted` is that of one rank.
    """

    what: str
    by: str
    digest: str | None
    wanted: str
    reason: str = ""

    @property
    def passed(self) -> bool:
        """What cannot be tried here is no fault."""
        return self.digest == self.wanted or (self.digest is None and self.reason.startswith("not run"))


def digest(backend: Backend, ranks: Ranks, exchange: Exchange | None) -> str:
    """Of parameters, optimizer state and loss after some steps in shards, of which this rank works on its own."""
    ours = Ours(CELL, backend)
    rows = CELL.batch // SHARDS
    leaf_rows = backend.division(ours.network.widths, rows, workers=1).rows
    sharding = Sharding.of_rank(SHARDS, leaf_rows, ranks.rank, ranks.size)
    first, end = sharding.rows(CELL.batch)
    batch = replace(next(ours.batches).part(first, end), place=first, rows_in_step=CELL.batch)
    step = Step(ours.objective, ours.optimizer, sharding=sharding, exchange=exchange)
    for _ in range(STEPS):
        step(batch)
    arrays = [ours.network.parameters, *ours.optimizer.state.values()]
    found = hashlib.sha256(b"".join(backend.to_host(array).tobytes() for array in arrays))
    found.update(repr(ours.objective.mean_loss()).encode())
    return found.hexdigest()


def run(backend: Backend, mpiexec: Path = MPIEXEC) -> list[Way]:
    """Each way that can be tried, that of one rank first."""
    found: list[Way] = []

    def tried(what: str, take: Callable[[], tuple[str, str]]) -> None:
        wanted = found[0].digest or "" if found else ""
        try:
            by, bits = take()
            found.append(Way(what, by, bits, wanted or bits))
        except Exception as error:  # a report of everything else is worth more than a traceback
            found.append(Way(what, "", None, wanted, f"{type(error).__name__}: {error}"))

    def through_nccl() -> tuple[str, str]:
        exchange = backend.exchange(Alone())
        return exchange.by, digest(backend, Alone(), exchange)

    tried("one rank", lambda: ("", digest(backend, Alone(), None)))
    if backend.name == "cupy":
        tried("one rank, with a communicator", through_nccl)
    if find_spec("mpi4py") is None or not mpiexec.exists():
        found.append(Way(f"{RANKS} ranks", "", None, "", "not run: no mpi4py, or no MPI beside it"))
    else:
        words: list[object] = ["benchmarks.ranks", "--on-ranks", "--backend", backend.name]
        tried(f"{RANKS} ranks", lambda: tuple(told_by_ranks(mpiexec, words)))
    return found


def on_ranks(name: str) -> None:
    """What each of several ranks does; rank 0 prints what sums, and the digest."""
    with join() as ranks:
        backend, _ = select(name, ranks.local_rank)
        exchange = backend.exchange(ranks)
        digests = ranks.all_gather(digest(backend, ranks, exchange))
    if len(set(digests)) > 1:
        raise ValueError(f"the ranks differ: {digests}")
    if ranks.rank == 0:
        print(json.dumps([exchange.by, digests[0]]))


def table(ways: list[Way]) -> str:
    lines = ["| steps in shards | sums over ranks | bits | |", "|---|---|---|---|"]
    for way in ways:
        bits = way.reason if way.digest is None else way.digest[:16]
        verdict = ("ok" if way.digest else "") if way.passed else "does not pass"
        lines.append(f"| {way.what} | {way.by} | {bits} | {verdict} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--mpiexec", type=Path, default=MPIEXEC)
    parser.add_argument("--on-ranks", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.on_ranks:
        on_ranks(options.backend)
        return 0
    ways = run(backend_for(parser, options.backend), options.mpiexec)
    print(table(ways))
    return 0 if all(way.passed for way in ways) else 1


if __name__ == "__main__":
    sys.exit(main())
