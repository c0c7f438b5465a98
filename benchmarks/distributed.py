"""What it costs that a result does not depend on how many ranks computed it, each beside what it costs without.

    python -m benchmarks.distributed [--backend auto|numpy|cupy] [--mpiexec FILE] [--json FILE]

- a step of 3 x 256, batch 4096, that is split into 8 shards, of the plain one, by one process;
- the sum of 100 MiB over 2 ranks in a fixed tree, of MPI's own, with the MPI of this environment (the extra `mpi`), in
  float32 and in place both; the time of a round is that of the slower rank.

Of the ratios of many rounds the median is given and the quartiles, since machines are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from benchmarks.data import Ratio, table
from benchmarks.options import backend_for
from benchmarks.peers.cells import Cell
from benchmarks.peers.ours import Ours
from benchmarks.rounds import each_round
from gpu_bp import Step
from gpu_bp.backends import Backend
from gpu_bp.ranks import join
from gpu_bp.sharding import Sharding

SHARDS = 8
CELL = Cell(3, 256, 4096, "tanh", "adam", "squared_error")
ROUNDS, ROUND_SECONDS = 31, 0.05
RANKS, BYTES, SUMS = 2, 100 * 2**20, 31
MPIEXEC = Path(sys.prefix) / "bin/mpiexec"


def ratio(what: str, pairs: list[list[float]], limit: float) -> Ratio:
    """Of pairs of seconds, ours and theirs."""
    ratios = [ours / theirs for ours, theirs in pairs]
    low, _, high = quantiles(ratios)
    ours, theirs = (1e3 * median(column) for column in zip(*pairs, strict=True))
    return Ratio(what, median(ratios), limit, note=f"{low:.2f} to {high:.2f}; {ours:.1f} ms, of {theirs:.1f} ms")


def sharded(backend: Backend) -> Ratio:
    """A step that is split into shards, of one that is not."""
    plain, split = Ours(CELL, backend), Ours(CELL, backend)
    rows = CELL.batch // SHARDS
    leaf_rows = backend.division(split.network.widths, rows, workers=1).rows
    split.take = Step(split.objective, split.optimizer, sharding=Sharding(SHARDS, leaf_rows, 0, SHARDS))
    taken = each_round(backend, [split.step, plain.step], ROUNDS, ROUND_SECONDS)
    pairs = [list(pair) for pair in zip(*taken, strict=True)]
    return ratio(f"a step in {SHARDS} shards, of one in none: {CELL.shape}", pairs, 1.05)


def tree_sum(mpiexec: Path = MPIEXEC, size: int = BYTES) -> Ratio:
    """The sum in a tree, of MPI's own; measured by ranks that are started for it."""
    what = f"the sum of {size >> 20} MiB over {RANKS} ranks in a tree, of MPI's"
    if find_spec("mpi4py") is None or not mpiexec.exists():
        return Ratio(what, None, 1.2, note="no mpi4py, or no MPI beside it")
    library, pairs = told_by_ranks(mpiexec, ["benchmarks.distributed", "--on-ranks", size])
    return ratio(f"{what}: {library}", pairs, 1.2)


def told_by_ranks(mpiexec: Path, words: Sequence[object], n: int = RANKS, **environment: str) -> Any:
    """What a module with these arguments prints on so many ranks, as JSON.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    # Open MPI asks twice whether root may
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ranks = [str(word) for word in (mpiexec, "-n", n, mpiexec.parent / "python", "-m", *words)]
    done = subprocess.run(
        ranks, env={**os.environ, **root, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def on_ranks(size: int) -> None:
    """What each of those ranks does with an array of so many bytes; rank 0 prints the seconds of each round."""
    with join() as ranks:
        from mpi4py import MPI

        flat = np.zeros(size // 4, np.float32)

        def in_a_tree() -> None:
            ranks.sum_tree(flat)

        def by_mpi() -> None:
            MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, flat)

        def seconds(call: Callable[[], None]) -> float:
            MPI.COMM_WORLD.Barrier()
            begin = time.perf_counter()
            call()
            return max(ranks.all_gather(time.perf_counter() - begin))

        pairs = [[seconds(in_a_tree), seconds(by_mpi)] for _ in range(SUMS + 3)][3:]
        name, version = MPI.get_vendor()
    if ranks.rank == 0:
        print(json.dumps([f"{name} {'.'.join(map(str, version))}", pairs]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--mpiexec", type=Path, default=MPIEXEC)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--on-ranks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.on_ranks:
        on_ranks(options.on_ranks)
        return
    ratios = [sharded(backend_for(parser, options.backend)), tree_sum(options.mpiexec)]
    print(table(ratios))
    if options.json:
        report: list[dict[str, Any]] = [asdict(each) | {"passed": each.passed} for each in ratios]
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
