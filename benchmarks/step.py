"""A training step against its floor: the bare matrix products of the same step, on the same backend, in the same run.

    python -m benchmarks.step [--backend auto|numpy|cupy] [--json FILE]

A ratio of 1 would be a step whose formulas cost nothing. Rounds alternate between the two, and the median of the
rounds is taken; absolute times say little, since machines are shared.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rounds import alternate
from gpu_bp import Batch, Network, Objective, Optimizer, Step, registry, select
from gpu_bp.backends import Backend
from gpu_bp.schedule import constant

CELLS = (
    (64, 64, "tanh", "sgd"),
    (64, 1024, "tanh", "adam"),
    (256, 1024, "relu", "momentum"),
    (1024, 1024, "relu", "adam"),
)
LAYERS = 3


@dataclass(frozen=True)
class Cell:
    """One measurement: medians over the rounds, in seconds."""

    width: int
    batch: int
    activation: str
    optimizer: str
    seconds: float
    gemm_seconds: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.gemm_seconds


def measure(backend: Backend, width: int, batch_size: int, activation: str, optimizer: str) -> Cell:
    """A step of a network of `LAYERS` weight layers of that width, float32, squared error; and its bare products."""
    network = Network([width] * (LAYERS + 1), [activation] * LAYERS, backend=backend)
    rng = np.random.default_rng(0)
    shapes = network.layout.shapes.items()
    network.load({name: rng.standard_normal(shape) / np.sqrt(width) for name, shape in shapes})
    objective = Objective(network, registry.loss("squared_error"), batch_size)
    step = Step(objective, Optimizer(registry.update(optimizer), network, constant(1e-4)))
    rows = rng.standard_normal((2, batch_size, width)).astype(np.float32)
    batch = Batch(*(backend.to_device(x) for x in (rows[0], rows[1], np.arange(batch_size))))
    matrices = [layer.weights for layer in network.layers]
    gradient, product = backend.zeros((width, width), np.float32), backend.zeros((batch_size, width), np.float32)

    def products() -> None:
        for k, weights in enumerate(matrices):
            backend.matmul(batch.inputs, weights, product, transpose_b=True)
            backend.matmul(batch.targets, batch.inputs, gradient, transpose_a=True)
            if k:
                backend.matmul(batch.inputs, weights, product)

    seconds = alternate(backend, [lambda: step(batch), products])
    return Cell(width, batch_size, activation, optimizer, *seconds)


def table(cells: list[Cell]) -> str:
    """The cells as a Markdown table."""
    lines = [
        "| width | batch | activation | optimizer | step, ms | products, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        times = f"{c.seconds * 1e3:.3f} | {c.gemm_seconds * 1e3:.3f} | {c.ratio:.2f}"
        lines.append(f"| {c.width} | {c.batch} | {c.activation} | {c.optimizer} | {times} |")
    return "\n".join(lines)


def run(backend: Backend) -> list[Cell]:
    """All cells."""
    return [measure(backend, *cell) for cell in CELLS]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    backend, why = select(options.backend)
    print(why)
    cells = run(backend)
    print(table(cells))
    if options.json:
        report: list[dict[str, Any]] = [asdict(cell) | {"ratio": cell.ratio} for cell in cells]
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
