"""`gpu-bp scaling`: what a config's ranks compute, as measured here, and what the model of `scaling.py` makes of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from math import inf
from typing import Any, cast

from gpu_bp.backends import Backend
from gpu_bp.bench import MUCH, SECONDS, TRIES, endless, measure_sums, take_apart, take_steps
from gpu_bp.config import Config
from gpu_bp.data import load_data
from gpu_bp.errors import UserError
from gpu_bp.exchange import Exchange
from gpu_bp.memory import size
from gpu_bp.precision import PRECISIONS
from gpu_bp.ranks import Alone, Ranks
from gpu_bp.scaling import ENOUGH, Cluster, Link, Scaling, Work, link_of, parts_of, powers
from gpu_bp.spec import Array
from gpu_bp.timing import Timing
from gpu_bp.trainer import Trainer

HEADER = (
    *("ranks", "rows a rank", "compute ms", "sum ms", "update ms", "step ms"),
    *("rows/s", "speed-up", "efficiency", "weak"),
)
HELPS: dict[str, Callable[[Scaling, float], str]] = {
    "batch": lambda scaling, x: f"train.batch_size={x * scaling.work.rows}, {x} times as many rows",
    "links": lambda _, x: f"links {x} times as fast",
    "overlap": lambda _, x: f"sums on their way during the way back, {x:.1%}",
    "cores": lambda _, x: f"cores for all ranks, {x:.1%}",
}


class OneOf(Alone):
    """Rank 0 of so many, of which the others are not there: it works on its own shards."""

    def __init__(self, size: int) -> None:
        self.size = size


class Unheard:
    """A backend that sums nothing over ranks, and does all else that another does."""

    by = "not at all"

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.beside = backend.name != "numpy"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def exchange(self, ranks: Ranks) -> Exchange:
        return self

    def begin(self, arrays: Sequence[Array]) -> None:
        pass

    def end(self) -> None:
        pass


def predict(
    config: Config,
    backend: Backend,
    ranks: int,
    *,
    inside: str = "memory",
    across: str | None = None,
    per_machine: int | None = None,
    overlap: bool | None = None,
    seconds: float = SECONDS,
) -> Scaling:
    """Measures what there is to do in a step of a config, and predicts how it scales.

    Args:
        inside, across: the links within a machine and between two, as `link_of` takes them. per_machine: ranks of a
            machine, all of which are like this one; by default all ranks.
        overlap: whether sums travel while the way back is gone; by default where devices send them themselves.
        seconds: how long steps are taken, of all numbers of ranks together; half as long again for their parts.

    Raises:
        UserError: as a training; or there cannot be so many ranks.
    """
    per_machine = per_machine or ranks
    for option, number in (("--ranks", ranks), ("--per-machine", per_machine)):
        if number < 1 or number & (number - 1):
            near = 1 << (max(1, number).bit_length() - 1)
            raise UserError(f"{option} is {number}, and must be a power of two, such as {near}")
    if ranks > config.train.shards:
        raise UserError(
            f"--ranks is {ranks}, and train.shards is {config.train.shards}; give train.shards={ranks}, or fewer ranks"
        )
    if per_machine < ranks and across is None:
        raise UserError(f"--per-machine is {per_machine}; say what links the machines, such as --across ndr400")
    links = link_of(inside), link_of(across or inside)
    moved, _ = measure_sums(backend, PRECISIONS[config.train.precision].dtype)
    at_once = cores() / backend.division(*MUCH).workers if backend.name == "numpy" else inf
    cluster = Cluster(*links, per_machine, moved / 3, at_once)  # a sum reads two arrays and writes one
    overlap = backend.name != "numpy" if overlap is None else overlap
    return Scaling(measure(config, backend, ranks, seconds), cluster, ranks, overlap)


def measure(config: Config, backend: Backend, ranks: int, seconds: float) -> Work:
    """The work of 1, 2, 4, ... ranks, as the first of them does it by itself; of several tries the fastest."""
    config, sizes, backend = endless(config), powers(ranks), cast(Backend, Unheard(backend))
    dataset, taken = load_data(config, backend=backend), {}
    for n in sizes:
        trainer = Trainer(config, backend, dataset, OneOf(n))
        tries = [take_steps(trainer, seconds / len(sizes) / TRIES) for _ in range(TRIES)]
        taken[n] = min(each["seconds"] / each["steps"] for each in tries)
    timing = Timing(backend)
    phases = take_apart(Trainer(config, cast(Backend, timing), ranks=OneOf(ranks)), timing, seconds / 2)
    update = taken[ranks] * phases["update"].seconds / sum(phase.seconds for phase in phases.values())
    network = trainer.model.network
    return Work(
        rows=trainer.step_rows,
        compute={n: max(0.0, step - update) for n, step in taken.items()},
        update=update,
        weights=[a * b for a, b in pairwise(network.widths)],
        parts=parts_of(network.layout, len(network.layers), network.dtype.itemsize),
        leaf_rows=trainer.step.objective_of_parts.batch_size,
        short_sums=1 + 1 / backend.read_every,  # the loss; and whether to go on
    )


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_json(scaling: Scaling) -> dict[str, Any]:
    """A prediction, and what it was made of."""
    work, falls = scaling.work, scaling.falls()
    return {
        "batch_size": work.rows,
        "gradient_bytes": work.n_bytes,
        "leaf_rows": work.leaf_rows,
        "cluster": {**asdict(scaling.cluster), "at_once": min(scaling.cluster.at_once, scaling.cluster.per_machine)},
        "overlap": scaling.overlap,
        "points": [_facts(scaling, n) for n in powers(scaling.ranks)],
        "falls_at": falls,
        "helps": scaling.helps() if falls else {},
    }


def _facts(scaling: Scaling, n: int) -> dict[str, float]:
    point, efficiency = scaling.point(n), scaling.efficiency(n)
    return {
        "ranks": n,
        "rows_a_rank": -(-point.rows // n),
        "compute_seconds": point.compute,
        "sum_seconds": point.sum,
        "update_seconds": point.update,
        "step_seconds": point.step,
        "rows_per_second": point.rows / point.step,
        "speed_up": n * efficiency,
        "efficiency": efficiency,
        "weak_efficiency": scaling.weak_efficiency(n),
    }


def lines(scaling: Scaling) -> list[str]:
    """The same, to be read."""
    work, cluster, n = scaling.work, scaling.cluster, scaling.ranks
    said = [
        f"a step of {work.rows:,} rows, and a gradient of {size(work.n_bytes)}, added at {_rate(cluster.additions)}",
        f"ranks of a machine: {_link(cluster.inside)}",
    ]
    if cluster.per_machine < n:
        said.append(f"{cluster.per_machine} a machine; between machines: {_link(cluster.across)}")
    if cluster.turns(n) > 1:
        said.append(
            f"of a machine's ranks {cluster.at_once:g} at a time have its cores (OPENBLAS_NUM_THREADS=1: one each)"
        )
    return [*said, "", _row(HEADER), *(_row(_cells(_facts(scaling, k))) for k in powers(n)), "", *verdict(scaling)]


def verdict(scaling: Scaling) -> list[str]:
    """Where the efficiency falls, and what would help."""
    n, falls, helps = scaling.ranks, scaling.falls(), scaling.helps()
    if falls is None:
        return [f"The efficiency stays at {ENOUGH:.0%} or above."]
    point, few = scaling.point(falls), falls // 2
    sums, update = (part / point.step for part in (point.sum, point.update))
    said = [
        f"The efficiency falls under {ENOUGH:.0%} at {falls:,} ranks, to {scaling.efficiency(falls):.1%}: of a step "
        f"there the sums take {sums:.0%}, the update {update:.0%}."
    ]
    if scaling.efficiency(n) < ENOUGH:
        found = "; ".join(HELPS[name](scaling, value) for name, value in helps.items())
        said.append(f"Enough for {n:,} ranks, each by itself: {found or 'none of ' + ', '.join(HELPS)}.")
    return [*said, f"Enough as it is: {few:,} rank{'s' if few > 1 else ''}."]


def _cells(facts: dict[str, float]) -> tuple[str, ...]:
    seconds = (f"{1e3 * facts[f'{name}_seconds']:.4g}" for name in ("compute", "sum", "update", "step"))
    return (
        f"{facts['ranks']:,}",
        f"{facts['rows_a_rank']:,}",
        *seconds,
        f"{facts['rows_per_second']:,.0f}",
        f"{facts['speed_up']:.2f}",
        f"{facts['efficiency']:.0%}",
        f"{facts['weak_efficiency']:.0%}",
    )


def _row(cells: tuple[str, ...]) -> str:
    return "  ".join(f"{cell:>{max(9, len(name))}}" for cell, name in zip(cells, HEADER, strict=True))


def _link(link: Link) -> str:
    return f"{1e6 * link.latency:.3g} us a message, {_rate(link.bytes_per_second)}"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g} GB/s"
