"""The model of `gpu_bp/scaling.py`: its constants on this machine, and its predictions beside steps on several ranks.

    python -m benchmarks.scaling [--rounds 7] [--seconds 1] [--mpiexec FILE] [--json FILE]
    python -m benchmarks.scaling --paper

The first starts 1, 2 and 4 ranks with the MPI of this environment (the extra `mpi`), each with one thread of BLAS, in
rounds: what messages and additions take, sums of several sizes, and steps of two networks; what a rank computes is
measured by one process alone. Of all rounds the fastest counts, since what else a machine does only adds to it; the
medians are given beside.
The second measures nothing: it prints the tables of docs/scaling.md for GPUs, from data sheets.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.distributed import MPIEXEC, told_by_ranks
from benchmarks.options import at_least
from gpu_bp import NumpyBackend, Trainer, parse_config
from gpu_bp.bench import endless
from gpu_bp.memory import size
from gpu_bp.network import layout_of
from gpu_bp.ranks import Ranks, join
from gpu_bp.scaling import ENOUGH, LINKS, SHORT, Cluster, Link, Scaling, Work, parts_of, powers
from gpu_bp.scaling_here import cores, measure, verdict
from gpu_bp.tree_sum import PIECE, TreeSum

RANKS = (2, 4)
TAG = 3
CALLS, CALLED = 50, 2**25  # calls a try, or as many as have so many bytes in all


class Amount(NamedTuple):
    """How much is measured.

    cells: networks of 3 weight layers by name, their width and the rows of a step; one that computes much for each byte
    of its gradient, and one that does not. sizes: bytes that are summed. moved: bytes of a sum whose messages alone are
    timed. tries: of each, the fastest of which counts.
    """

    cells: Mapping[str, tuple[int, int]]
    sizes: tuple[int, ...]
    moved: int
    tries: int


FULL = Amount({"3 x 256, batch 2048": (256, 2048), "3 x 1024, batch 256": (1024, 256)}, (2**10, 2**20, 2**24), 2**24, 5)
LITTLE = Amount({"3 x 8, batch 16": (8, 16)}, (2**10, 2**20), 2**21, 1)


def config_of(width: int, batch: int) -> Any:
    """A training of such a network on random rows."""
    return parse_config(
        {
            "data": {"kind": "linear", "rows": 2 * batch, "n_inputs": width, "n_targets": width, "noise": 0.1},
            "network": {"hidden": [width, width], "activation": "tanh"},
            "loss": {"kind": "squared_error"},
            "optimizer": {"kind": "adam", "learning_rate": 0.001},
            "train": {"steps": 1, "batch_size": batch, "shards": max(RANKS)},
        }
    )


# What ranks do -------------------------------------------------------------------------------------------------------


class Messages(TreeSum):
    """Those of a sum, and nothing is added."""

    def _add(self, own: np.ndarray, got: np.ndarray, partner: int) -> None:
        pass


def constants(ranks: Ranks, amount: Amount) -> dict[str, float]:
    """Seconds of sums of so many bytes, of the messages of one alone, of additions, and of agreeing whether to stop; of
    the slower rank."""
    from mpi4py import MPI

    def taken(call: Callable[[], object], n_bytes: int) -> float:
        calls, tries = max(1, min(CALLS, CALLED // n_bytes)), []
        for _ in range(1 + amount.tries):
            MPI.COMM_WORLD.Barrier()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            tries.append(max(ranks.all_gather(time.perf_counter() - begin)) / calls)
        return min(tries[1:])

    def summed(n_bytes: int, sum_tree: Callable[[np.ndarray], None]) -> float:
        flat = np.zeros(n_bytes // 4, np.float32)
        return taken(lambda: sum_tree(flat), n_bytes)

    def add() -> None:
        for piece in pieces:
            np.add(piece, came, out=piece)

    came, pieces = np.zeros(PIECE // 4, np.float32), np.zeros((amount.moved // PIECE, PIECE // 4), np.float32)
    return {
        "messages": summed(amount.moved, Messages(MPI.COMM_WORLD, TAG)),
        "additions": taken(add, amount.moved),
        "agreement": taken(lambda: ranks.all_gather(""), SHORT),
        **{str(n_bytes): summed(n_bytes, ranks.sum_tree) for n_bytes in (SHORT, *amount.sizes)},
    }


def link(found: dict[str, float], moved: int, ranks: int) -> Link:
    """What a message takes, with what Python does for it."""
    levels = ranks.bit_length() - 1
    latency = found[str(SHORT)] / levels
    return Link(latency, 2 * (1 - 1 / ranks) * moved / (found["messages"] - 2 * levels * latency))


def steps(ranks: Ranks, amount: Amount, seconds: float) -> dict[str, float]:
    """Seconds of a step of each network."""
    return {name: seconds_a_step(config_of(*cell), ranks, seconds) for name, cell in amount.cells.items()}


def seconds_a_step(config: Any, ranks: Ranks, seconds: float) -> float:
    trainer = Trainer(endless(config), NumpyBackend(), ranks=ranks)

    def take(seconds: float) -> float:
        begin, before = time.perf_counter(), trainer.steps
        for _ in trainer.run(lambda: "enough" if time.perf_counter() - begin >= seconds else ""):
            pass  # all ranks pause after the same step
        return (time.perf_counter() - begin) / (trainer.steps - before)

    take(seconds / 10)
    return max(ranks.all_gather(take(seconds)))


def alone(amount: Amount, seconds: float) -> dict[str, Any]:
    """What there is to do in a step of each network, as `gpu-bp scaling` measures it; `compute` with the update."""
    found = {}
    for name, cell in amount.cells.items():
        work = measure(config_of(*cell), NumpyBackend(), max(RANKS), seconds)
        whole = {n: compute + work.update for n, compute in work.compute.items()}
        found[name] = {**vars(work), "compute": whole}
    return found


def on_ranks(what: str, amount: Amount, seconds: float) -> None:
    """Rank 0 prints what was measured."""
    if what == "alone":
        print(json.dumps(alone(amount, seconds)))
        return
    with join() as ranks:
        found = constants(ranks, amount) if what == "constants" else steps(ranks, amount, seconds)
    if ranks.rank == 0:
        print(json.dumps(found))


# The check ----------------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """What was predicted, and what was measured: the fastest of all rounds, and their median. Seconds."""

    what: str
    ranks: int
    predicted: float
    measured: float
    usual: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def start(mpiexec: Path, ranks: int, what: str, amount: Amount, seconds: float) -> Any:
    """What so many ranks have measured."""
    words = [
        "benchmarks.scaling",
        "--on-ranks",
        what,
        "--seconds",
        seconds,
        *(["--little"] if amount is LITTLE else []),
    ]
    return told_by_ranks(
        mpiexec, words, ranks, OPENBLAS_NUM_THREADS="1", PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe"
    )


def fastest(found: list[Any]) -> Any:
    """The least of numbers; of tables and lists each entry's."""
    if isinstance(found[0], dict):
        return {key: fastest([each[key] for each in found]) for key in found[0]}
    if isinstance(found[0], list):
        return [fastest(list(each)) for each in zip(*found, strict=True)]
    return min(found)


def check(amount: Amount, rounds: int, seconds: float, mpiexec: Path = MPIEXEC) -> dict[str, Any]:
    """The constants, and what is predicted from them, beside what was measured; all of it in each round."""
    found: dict[str, list[Any]] = {}
    for _ in range(rounds):
        for what, ranks in (("constants", RANKS), ("alone", (1,)), ("steps", (1, *RANKS))):
            for n in ranks:
                found.setdefault(f"{what} {n}", []).append(start(mpiexec, n, what, amount, seconds))
    best = {key: fastest(values) for key, values in found.items()}
    links = {n: link(best[f"constants {n}"], amount.moved, n) for n in RANKS}
    memory, added = links[min(RANKS)], amount.moved / best[f"constants {min(RANKS)}"]["additions"]
    cluster = Cluster(memory, memory, max(RANKS), added, cores())
    checks = []
    for n in RANKS:
        for n_bytes in amount.sizes:
            taken = [each[str(n_bytes)] for each in found[f"constants {n}"]]
            checks.append(checked(f"sum of {size(n_bytes)}", n, cluster.sum_seconds(n_bytes, n), taken))
    for name in amount.cells:
        facts = best["alone 1"][name]
        compute = {int(n): whole - facts["update"] for n, whole in facts["compute"].items()}
        work = Work(**{**facts, "compute": compute})
        for n in (1, *RANKS):
            taken = [each[name] for each in found[f"steps {n}"]]
            checks.append(checked(f"step of {name}", n, Scaling(work, cluster, n).point(n).step, taken))
    agreement = {n: best[f"constants {n}"]["agreement"] for n in RANKS}
    return {"links": links, "additions": added, "agreement": agreement, "checks": checks}


def checked(what: str, ranks: int, predicted: float, taken: list[float]) -> Check:
    return Check(what, ranks, predicted, min(taken), median(taken))


def table(checks: list[Check]) -> str:
    """As it stands in docs/scaling.md."""
    rows = []
    for c in checks:
        predicted, measured, usual = (f"{1e3 * x:.3g}" for x in (c.predicted, c.measured, c.usual))
        rows.append(f"| {c.what} | {c.ranks} | {predicted} | {measured} | {c.ratio:.2f} | {usual} |")
    head = "| what | ranks | predicted, ms | measured, ms | ratio | median, ms |\n|---|---|---|---|---|---|"
    return "\n".join([head, *rows])


# On paper -----------------------------------------------------------------------------------------------------------

# NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s in TF32 of sparse matrices, half of that of others, and 3.35 TB/s.
FLOPS, MEMORY = 494.5e12, 3.35e12
REACHED = 0.5  # of these and of the links' bandwidth: an assumption
GPUS, PER_MACHINE = (1, 8, 64, 1024), 8
NETWORKS = ((3, 1024, 65536), (3, 4096, 65536), (3, 4096, 2**20))  # layers, width, rows of a step


def on_paper(layers: int, width: int, rows: int, overlap: bool = False) -> Scaling:
    """A network with Adam, products in TF32, on machines of eight GPUs; nothing of it was measured.

    A product takes what its operations or what its bytes take, whichever is more (the roofline of Williams, Waterman &
    Patterson, 2009), an operation on numbers what its bytes take.
    """
    flops, memory = REACHED * FLOPS, REACHED * MEMORY

    def gradient(m: float) -> float:
        product = max(2 * m * width**2 / flops, 4 * (2 * m * width + width**2) / memory)
        formulas = 4 * 5 * m * width / memory  # activation: one array read, one written; delta: two read, one written
        return (3 * layers - 1) * product + layers * formulas

    parts = parts_of(layout_of([width] * (layers + 1)), layers, 4)
    work = Work(
        rows=rows,
        compute={n: gradient(rows / n) for n in powers(max(GPUS))},
        update=8
        * sum(map(sum, parts))
        / memory,  # watched; parameters, gradient and two moments read, all but the gradient written
        weights=[width**2] * layers,
        parts=parts,
        leaf_rows=rows,
        short_sums=1,
    )
    nvlink, network = (
        replace(LINKS[name], bytes_per_second=REACHED * LINKS[name].bytes_per_second) for name in ("nvlink4", "ndr400")
    )
    return Scaling(work, Cluster(nvlink, network, PER_MACHINE, memory / 3), max(GPUS), overlap)


def paper() -> Iterator[str]:
    """A table of each network."""
    for layers, width, rows in NETWORKS:
        plain, overlapped = (on_paper(layers, width, rows, overlap) for overlap in (False, True))
        yield f"{layers} x {width}, {rows:,} rows a step, a gradient of {size(plain.work.n_bytes)}:\n"
        columns = "rows each | gradient, ms | sums, ms | update, ms | efficiency | with overlap | weak | 80 % with"
        yield f"| GPUs | {columns} |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for n in GPUS:
            point = plain.point(n)
            seconds = (f"{1e3 * x:.3g}" for x in (point.compute, point.sum, point.update))
            parts = (plain.efficiency(n), overlapped.efficiency(n), overlapped.weak_efficiency(n))
            cells = (f"{n:,}", f"{rows // n:,}", *seconds, *(f"{part:.0%}" for part in parts), enough(overlapped, n))
            yield f"| {' | '.join(cells)} |"
        yield f"\n{verdict(overlapped)[0]}\n"


def enough(scaling: Scaling, n: int) -> str:
    """What gives so many GPUs 80 %, with overlap."""
    if scaling.efficiency(n) >= ENOUGH:
        return "-"
    helps = replace(scaling, ranks=n).helps()
    said = {"batch": "{:,} times the rows", "links": "links {:,} times as fast"}
    return ", or ".join(said[name].format(value) for name, value in helps.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--seconds", type=at_least(0.0, float), default=1.0, help="of steps, each time")
    parser.add_argument("--mpiexec", type=Path, default=MPIEXEC)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--paper", action="store_true", help="the tables for GPUs")
    parser.add_argument("--little", action="store_true", help="small networks and arrays, to try it out")
    parser.add_argument("--on-ranks", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.paper:
        print("\n".join(paper()))
        return
    amount = LITTLE if options.little else FULL
    if options.on_ranks:
        on_ranks(options.on_ranks, amount, options.seconds)
        return
    if find_spec("mpi4py") is None or not options.mpiexec.exists():
        parser.exit(2, "error: no mpi4py, or no MPI beside it: pip install 'gpu_bp[mpi]'\n")
    report = check(amount, options.rounds, options.seconds, options.mpiexec)
    for n, found in report["links"].items():
        agreement = f"{1e6 * report['agreement'][n]:.3g} us to agree whether to stop"
        rate = f"{found.bytes_per_second / 1e9:.3g} GB/s"
        print(f"{n} ranks: {1e6 * found.latency:.3g} us a message, {rate}; {agreement}")
    print(f"{report['additions'] / 1e9:.3g} GB/s added")
    print(table(report["checks"]))
    if options.json:
        report["links"] = {n: asdict(found) for n, found in report["links"].items()}
        report["checks"] = [each._asdict() for each in report["checks"]]
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
