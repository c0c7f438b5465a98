"""A training step against its floor: the bare matrix products of the same step, on the same backend, in the same run.

    python -m benchmarks.step [--backend auto|numpy|cupy] [--json FILE]

A ratio of 1 would be a step whose formulas cost nothing. Rounds alternate between the two, and the median of the
rounds is taken; absolute times say little, since machines are shared.

And what it costs to notice that a training diverges: the look at a step's gradient and loss, as a part of the step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.options import backend_for
from benchmarks.peers.cells import Cell
from benchmarks.peers.ours import Ours
from benchmarks.rounds import alternate
from gpu_bp import Batch, Network, Objective, Optimizer, Step, registry
from gpu_bp.backends import Backend
from gpu_bp.schedule import constant

CELLS = (
    Cell(3, 64, 64, "tanh", "sgd", "squared_error"),
    Cell(3, 64, 1024, "tanh", "adam", "squared_error"),
    Cell(3, 256, 1024, "relu", "sgd", "squared_error"),
    Cell(3, 1024, 1024, "relu", "adam", "cross_entropy"),
)
# Of a network whose steps are watched: widths, batch, and at most what part of a step the watch may take.
WATCHED = (([32, 256, 256, 256, 1], 1024, 0.01), ([2, 20, 1], 1, None))
WATCH_ROUNDS, WATCH_SECONDS = 151, 0.01  # since the difference is small


@dataclass(frozen=True)
class Floor:
    """A step and its bare products: medians over the rounds, in seconds."""

    shape: str
    activation: str
    optimizer: str
    loss: str
    seconds: float
    gemm_seconds: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.gemm_seconds


def measure(backend: Backend, cell: Cell) -> Floor:
    """A step of a network in float32; and its bare products."""
    side = Ours(cell, backend)
    times = alternate(backend, [side.step, side.products()])
    return Floor(cell.shape, cell.activation, cell.optimizer, cell.loss, *times)


def watched(backend: Backend, widths: list[int], batch_size: int, limit: float | None) -> list[data.Ratio]:
    """A step with the watch, of one without; and the watch alone, which other work on the machine hides less."""
    rng, steps = np.random.default_rng(0), []
    for watch in (True, False):
        network = Network(widths, ["tanh"] * (len(widths) - 2) + ["identity"], backend=backend)
        network.load({name: 0.05 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
        optimizer = Optimizer(registry.update("adam"), network, constant(1e-4))
        steps.append(Step(Objective(network, registry.loss("squared_error"), batch_size), optimizer, watch=watch))
    inputs, targets = (rng.standard_normal((batch_size, n)).astype(np.float32) for n in (widths[0], widths[-1]))
    batch = Batch(*(backend.to_device(x) for x in (inputs, targets, np.arange(batch_size))))
    objective, flag, taken = steps[0].objective, steps[0].flag, backend.zeros((1,), np.int64)

    def watch_alone() -> None:
        backend.watch(objective.gradients, objective.total, taken, flag)

    def of_a_bare_step(call: Callable[[], None]) -> float:
        seconds, bare = alternate(backend, [call, lambda: steps[1](batch)], WATCH_ROUNDS, WATCH_SECONDS)
        return seconds / bare

    where = f"{'-'.join(map(str, widths))}, batch {batch_size}"
    return [
        data.Ratio(
            f"a step that is watched, of one that is not: {where}", of_a_bare_step(lambda: steps[0](batch)), None
        ),
        data.Ratio(f"the watch alone, of a step: {where}", of_a_bare_step(watch_alone), limit),
    ]


def table(floors: list[Floor]) -> str:
    """A line each, in Markdown."""
    lines = [
        "| shape | activation | optimizer | loss | step, ms | products, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in floors:
        times = f"{f.seconds * 1e3:.3f} | {f.gemm_seconds * 1e3:.3f} | {f.ratio:.2f}"
        lines.append(f"| {f.shape} | {f.activation} | {f.optimizer} | {f.loss} | {times} |")
    return "\n".join(lines)


def run(backend: Backend) -> list[Floor]:
    """All cells."""
    return [measure(backend, cell) for cell in CELLS]


def run_watched(backend: Backend) -> list[data.Ratio]:
    """What the watch costs, in all networks."""
    return [ratio for network in WATCHED for ratio in watched(backend, *network)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    backend = backend_for(parser, options.backend)
    floors, ratios = run(backend), run_watched(backend)
    print(table(floors), data.table(ratios), sep="\n\n")
    if options.json:
        report: list[dict[str, Any]] = [asdict(floor) | {"ratio": floor.ratio} for floor in floors]
        report += [asdict(ratio) | {"passed": ratio.passed} for ratio in ratios]
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
