"""Cells measured: our step and its peers' in turn, and with them the bare matrix products, in each library.

A side counts only where its losses, from the same weights and batches, are ours.
"""

from __future__ import annotations

import math
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Any

from benchmarks.curves import TOLERANCES
from benchmarks.peers.cells import Cell
from benchmarks.peers.process import LeftOut, Process, machine_cpu_seconds
from benchmarks.peers.sides import OURS, PEERS, Peer, cores

# How far losses may be apart, of the largest: all compute in float32, see `benchmarks.curves`.
TOLERANCE = TOLERANCES["float32"]
ROUNDS = 5
SECONDS = 0.06  # a round of one side


@dataclass
class Result:
    """A cell as it was measured. Times are medians over rounds, in seconds a step; names are those of the peers.

    gemm: all matrix products of a step; `peer_gemm_seconds` by library. `quartiles` are the first and the third.
    `ratio` of each peer is its time over ours: above 1 we are faster. `left_out`: peers that do not count, and why.
    `other_cores`: how many cores of the machine were busy with other work meanwhile, on average.
    """

    cell: Cell
    seconds: float
    gemm_seconds: float
    peers: dict[str, float] = field(default_factory=dict)
    peer_gemm_seconds: dict[str, float] = field(default_factory=dict)
    quartiles: dict[str, list[float]] = field(default_factory=dict)
    gemm_quartiles: dict[str, list[float]] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    memory_bytes: dict[str, int | None] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    curve_difference: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    rounds: int = ROUNDS
    other_cores: float | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    def fastest(self, prefix: str) -> float | None:
        """Of the peers whose names begin so."""
        return min((t for name, t in self.peers.items() if name.startswith(prefix)), default=None)

    def ratio(self, prefix: str) -> float | None:
        """The time of the fastest of them, of ours."""
        fastest = self.fastest(prefix)
        return None if fastest is None else fastest / self.seconds

    def report(self) -> dict[str, Any]:
        """Fit for JSON, the cell's names beside the rest."""
        values = asdict(self)
        return {**values.pop("cell"), **values}


def difference(losses: Sequence[float], ours: Sequence[float]) -> float:
    """The largest between two curves, of the largest loss of ours; infinite where one is not finite."""
    if not all(map(math.isfinite, (*losses, *ours))):
        return math.inf
    return max(abs(a - b) for a, b in zip(losses, ours, strict=True)) / max(map(abs, ours))


def summary(results: Sequence[Result], prefix: str) -> tuple[float, Result, float] | None:
    """The smallest ratio to the fastest peer of those names, where it is, and the geometric mean of all."""
    found = [(ratio, result) for result in results if (ratio := result.ratio(prefix)) is not None]
    if not found:
        return None
    worst, where = min(found, key=lambda pair: pair[0])
    return worst, where, geometric_mean([ratio for ratio, _ in found])


class Bench:
    """The processes of all sides. `left_out`: peers that are not measured at all, and why."""

    def __init__(self, device: str, scratch: Path, peers: Sequence[Peer], ours: Peer) -> None:
        self.left_out = {peer.name: f"{peer.package} is not installed" for peer in peers if not peer.installed}
        self.sides = [ours, *(peer for peer in peers if peer.installed)]
        self.processes = {side.name: Process(side, device, scratch) for side in self.sides}
        self.ours = ours.name
        self.machine = self.processes[ours.name].machine() | {"cores": cores()} | _versions(self.sides)

    def measure(self, cell: Cell, rounds: int = ROUNDS, seconds: float = SECONDS) -> Result:
        """A cell. Raises LeftOut where our own side cannot be measured."""
        result = Result(cell, math.nan, math.nan, rounds=rounds, machine=self.machine, left_out=dict(self.left_out))
        losses: list[float] = []
        sides = []
        for side in self.sides:
            with self._or_left_out(side, result):
                begun = self.processes[side.name].begin(cell)
                result.compile_seconds[side.name] = begun.compile_seconds
                result.memory_bytes[side.name] = begun.memory_bytes
                result.threads[side.name] = begun.threads
                if side.name == self.ours:
                    losses = begun.losses
                apart = difference(begun.losses, losses)
                if not apart <= TOLERANCE:
                    self.processes[side.name].end()
                    raise LeftOut(f"its losses differ from ours by {apart:.1e} of the largest, above {TOLERANCE:.0e}")
                result.curve_difference[side.name] = apart
                sides.append(side)
        times: dict[tuple[str, str], list[float]] = {}
        begin, busy, own = time.perf_counter(), machine_cpu_seconds(), self._cpu_seconds()
        for _ in range(rounds):
            for side in list(sides):
                with self._or_left_out(side, result):
                    for what in ("step", "products") if side.products else ("step",):
                        one = self.processes[side.name].seconds(what, seconds)
                        times.setdefault((what, side.name), []).append(one)
                if side.name in result.left_out:
                    sides.remove(side)
        if busy is not None and (now := machine_cpu_seconds()) is not None:
            others = now - busy - (self._cpu_seconds() - own)
            result.other_cores = max(0.0, others / (time.perf_counter() - begin))
        for side in sides:
            self.processes[side.name].end()
        for (what, name), taken in times.items():
            if name not in result.left_out:
                self._enter(result, what, name, taken)
        return result

    def _cpu_seconds(self) -> float:
        """What this benchmark has worked."""
        return time.process_time() + sum(process.cpu_seconds for process in self.processes.values())

    def _enter(self, result: Result, what: str, name: str, taken: list[float]) -> None:
        middle, (first, _, third) = median(taken), quantiles(taken, n=4, method="inclusive")
        mine = name == self.ours
        if what == "step":
            result.quartiles[name] = [first, third]
            if mine:
                result.seconds = middle
            else:
                result.peers[name] = middle
            return
        library = name if mine else next(side.package for side in self.sides if side.name == name)
        result.gemm_quartiles[library] = [first, third]
        if mine:
            result.gemm_seconds = middle
        else:
            result.peer_gemm_seconds[library] = middle

    @contextmanager
    def _or_left_out(self, side: Peer, result: Result) -> Iterator[None]:
        try:
            yield
        except LeftOut as reason:
            if side.name == self.ours:
                raise
            result.left_out[side.name] = str(reason)

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()


@contextmanager
def bench(device: str, peers: Sequence[Peer] = PEERS, ours: Peer = OURS) -> Iterator[Bench]:
    """The processes of this project and of those of the peers that there are for the device."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Bench(device, Path(scratch), [peer for peer in peers if device in peer.devices], ours)
        try:
            yield made
        finally:
            made.stop()


def _versions(sides: Sequence[Peer]) -> dict[str, Any]:
    names = {"sklearn": "scikit-learn"}
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in dict.fromkeys(["gpu_bp", "numpy", "cupy-cuda13x", "cupy-cuda12x", *(s.package for s in sides)]):
        try:
            found[package] = metadata.version(names.get(package, package))
        except metadata.PackageNotFoundError:
            continue
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "versions": found}
