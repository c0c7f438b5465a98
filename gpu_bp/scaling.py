"""What a step takes on N ranks: a model of what they compute, and of what they say to each other.

A step's n rows are shared out; the update is not, each rank makes the whole of it. With C(m) for the gradient of m
rows, S(N) for the sums over the ranks and U for the update a step takes

    T(N) = C(n / N) + S(N) + U.

A message takes `latency` + bytes / `bytes_per_second` (alpha and beta of the literature), and of what is added
`additions` bytes take a second (gamma). The sum of `tree_sum.py` is recursive halving and doubling: on level k of its
log2 N, from 0 on, b / 2^(k+1) of b bytes go to the partner rank ^ 2^k, as many come and are added, and on the way back
as many go and come again. In all

    S = 2 log2(N) alpha + 2 (N - 1)/N b beta + (N - 1)/N b gamma,

as of Rabenseifner's algorithm in Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in
MPICH" (2005); up to `tree_sum.SMALL` bytes it is log2(N) (alpha + b beta + b gamma). With R ranks a machine the levels
below log2 R stay inside, and (1/R - 1/N) b go from machine to machine, and back. Beside the gradient's there are short
sums: of the loss, and of what the ranks have to agree on.

With overlap, as between GPUs, a layer's gradient is summed as soon as it is there, while the layers below are still
gone through: that takes s_k, and B_k is what is left to compute, k being counted from the lowest layer. The sums go one
after the other; so after the last gradient they go on for the largest of s_0 + ... + s_k - B_k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from gpu_bp.errors import UserError, nearest
from gpu_bp.network import Layout
from gpu_bp.sharded_gradient import TOGETHER, ready
from gpu_bp.tree_sum import SMALL

SHORT = 8  # bytes of a short sum
TURN = 1.7e-4  # seconds, the least that a message takes where ranks take turns on cores: see docs/scaling.md
ENOUGH = 0.8  # efficiency
MOST = 2**10  # times as many rows, or as fast links, are thought of at most


@dataclass(frozen=True)
class Link:
    """What a message takes: seconds, and for its bytes; both ways at once, of one rank while the others send too."""

    latency: float
    bytes_per_second: float

    def faster(self, times: float) -> Link:
        """In both."""
        return Link(self.latency / times, self.bytes_per_second * times)


# memory: measured, as docs/scaling.md says. The others are on paper. Bandwidth by NVIDIA's data sheets: NVLink of an
# H100, 900 GB/s both ways together; NDR InfiniBand, 400 Gb/s, a port for each GPU. Latency as NCCL reckons a message of
# its simple protocol (its src/graph/tuning.cc): 8.4 us for what is launched, 3.4 us by NVLink, 14.0 us by a network.
LINKS = {"memory": Link(8.4e-6, 15e9), "nvlink4": Link(11.8e-6, 450e9), "ndr400": Link(22.4e-6, 50e9)}


def link_of(text: str) -> Link:
    """A link by its name, or by its figures: "20:1.25" has 20 us a message and 1.25 GB/s.

    Raises:
        UserError: it is neither.
    """
    if text in LINKS:
        return LINKS[text]
    try:
        latency, rate = (float(word) for word in text.split(":"))
    except ValueError:
        latency = rate = -1.0
    if not (0 <= latency < inf and 0 < rate < inf):
        raise UserError(f"unknown link {text!r}; {nearest(text, LINKS)}; or MICROSECONDS:GBYTES, such as 20:1.25")
    return Link(latency / 1e6, rate * 1e9)


@dataclass(frozen=True)
class Cluster:
    """What the ranks are on.

    inside, across: the links of ranks of the same machine, and of two. per_machine: ranks of a machine, a power of two.
    additions: bytes that a rank adds a second. at_once: so many ranks of a machine compute at the same time, as there
    are cores for; more than that take turns. A GPU is a rank's own.
    """

    inside: Link
    across: Link
    per_machine: int
    additions: float
    at_once: float = inf

    def turns(self, ranks: int) -> float:
        """How many times as long everything takes, since ranks take turns."""
        return max(1.0, min(ranks, self.per_machine) / self.at_once)

    def sum_seconds(self, n_bytes: float, ranks: int) -> float:
        """Of a sum over the ranks."""
        seconds, part, turns, halved = 0.0, n_bytes, self.turns(ranks), n_bytes > SMALL
        for level in range(ranks.bit_length() - 1):
            link = self.inside if 2**level < self.per_machine else self.across
            part = part / 2 if halved else part
            message = max(link.latency, TURN if turns > 1 else 0.0) + turns * part / link.bytes_per_second
            seconds += (2 if halved else 1) * message + turns * part / self.additions
        return seconds


@dataclass(frozen=True)
class Work:
    """What there is to do in a step.

    rows: of all ranks. compute: by the number of ranks, 1, 2, 4 and so on, the seconds that one of them takes for the
    gradient of its rows. update: seconds. weights: of each layer, so many. parts: bytes of the gradient, those of each
    array that can be summed when a layer is done. leaf_rows: so many are worked on at a time; on the way back of the
    last of them sums can travel. short_sums: so many a step, on average.
    """

    rows: int
    compute: Mapping[int, float]
    update: float
    weights: Sequence[int]
    parts: Sequence[Sequence[int]]
    leaf_rows: int
    short_sums: float = 2.0

    @property
    def n_bytes(self) -> int:
        """Of the gradient."""
        return sum(map(sum, self.parts))

    def seconds(self, ranks: int, times: int) -> float:
        """Of the gradient on one of so many ranks, where a step has `times` the rows."""
        return self.compute[ranks // times] if times <= ranks else self.compute[1] * times / ranks

    def left(self) -> list[float]:
        """B_k of each layer, as a part of what its rows take, by the products: 2 operations a weight and row each for
        the outputs, for the gradient and, but for the lowest layer, for the deltas of the layer below."""
        products, left = 6 * sum(self.weights) - 2 * self.weights[0], [0.0]
        for below, own in pairwise(self.weights):
            left.append(left[-1] + 2 * (own + below) / products)
        return left


@dataclass(frozen=True)
class Point:
    """A step of so many rows on so many ranks: seconds."""

    ranks: int
    rows: int
    compute: float
    sum: float
    update: float

    @property
    def step(self) -> float:
        return self.compute + self.sum + self.update


@dataclass(frozen=True)
class Scaling:
    """The prediction for some work on a cluster, for up to so many ranks, a power of two."""

    work: Work
    cluster: Cluster
    ranks: int
    overlap: bool = False

    def point(self, ranks: int, times: int = 1) -> Point:
        """A step on so many ranks, with `times` the rows; both are powers of two."""
        work, cluster, turns = self.work, self.cluster, self.cluster.turns(ranks)
        compute, rows, sums, after = turns * work.seconds(ranks, times), times * work.rows, 0.0, 0.0
        last_leaf = compute * min(1.0, work.leaf_rows * ranks / rows)
        for parts, left in zip(work.parts if self.overlap else [[work.n_bytes]], work.left(), strict=False):
            sums += sum(cluster.sum_seconds(part, ranks) for part in parts)
            after = max(after, sums - last_leaf * left)
        short = work.short_sums * cluster.sum_seconds(SHORT, ranks)
        return Point(ranks, rows, compute, after + short, turns * work.update)

    def efficiency(self, ranks: int, times: int = 1) -> float:
        """T(1) / (N T(N)) of the same rows: strong scaling."""
        return self.point(1, times).step / (ranks * self.point(ranks, times).step)

    def weak_efficiency(self, ranks: int) -> float:
        """T(1) / T(N) where each rank has as many rows as one had: weak scaling."""
        return self.point(1).step / self.point(ranks, ranks).step

    def falls(self) -> int | None:
        """The first number of ranks whose efficiency is not enough; None where all are."""
        return next((n for n in powers(self.ranks) if self.efficiency(n) < ENOUGH), None)

    def helps(self) -> dict[str, int | float]:
        """What would be enough for all ranks, each by itself: `batch`, so many times the rows; `links`, so many times
        as fast; and the efficiency that they had with `overlap`, or with `cores` for all ranks of a machine. Nothing
        where they have enough."""
        n, cluster = self.ranks, self.cluster
        if self.efficiency(n) >= ENOUGH:
            return {}

        def linked(times: int) -> Scaling:
            inside, across = cluster.inside.faster(times), cluster.across.faster(times)
            return replace(self, cluster=replace(cluster, inside=inside, across=across))

        found: dict[str, int | float | None] = {
            "batch": _least(lambda times: self.efficiency(n, times)),
            "links": _least(lambda times: linked(times).efficiency(n)),
            "overlap": replace(self, overlap=True).efficiency(n),
            "cores": replace(self, cluster=replace(cluster, at_once=inf)).efficiency(n),
        }
        return {name: value for name, value in found.items() if value is not None and value >= ENOUGH}


def parts_of(layout: Layout, layers: int, itemsize: int) -> list[list[int]]:
    """Bytes of a gradient, those of each array that is summed when a layer is done: see `sharded_gradient.ready`."""
    return [[(part.stop - part.start) * itemsize for part in parts] for parts in ready(layout, layers, TOGETHER)]


def powers(most: int) -> list[int]:
    """1, 2, 4, ..., up to `most`."""
    return [1 << k for k in range(most.bit_length())]


def _least(efficiency: Callable[[int], float]) -> int | None:
    """The least power of two beyond 1 for which the efficiency is enough; None where none is."""
    return next((times for times in powers(MOST)[1:] if efficiency(times) >= ENOUGH), None)
