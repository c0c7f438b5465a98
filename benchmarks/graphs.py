"""The first steps of every config, replayed from a CUDA graph and asked for one by one: the same, bit for bit?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import curves
from gpu_bp import Config, Trainer
from gpu_bp.config_data import TableData

STEPS = 100


@dataclass(frozen=True)
class Comparison:
    """Of a config: how many graphs there were, and how many of its parameters and sums differ in a bit after the steps.

    `differing` is None where they could not be compared, for the `reason`; which is also why there was no graph.
    """

    config: str
    precision: str
    steps: int
    graphs: int
    differing: int | None
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.differing == 0 < self.graphs


def trained(config: Config, backend: Any, steps: int) -> np.ndarray:
    """The parameters after so many steps or the first after it that ends a line, and the loss since, as bytes."""
    trainer = Trainer(config, backend)
    for _ in trainer.run(together=True):
        if trainer.steps >= steps:
            break
    parameters = backend.to_host(trainer.model.network.parameters)
    return np.concatenate([parameters.view(np.uint8), np.array([trainer.running_loss()]).view(np.uint8)])


def compare(path: Path, precision: str, backend: type[Any], steps: int = STEPS) -> Comparison:
    """Trains the first steps twice, on a `CupyBackend` that captures and one that does not."""
    try:
        config = curves.read(path, precision, every_step=False)
        if isinstance(config.data, TableData) and not Path(config.data.path).is_file():
            return Comparison(path.stem, precision, 0, 0, None, f"not run: no file {config.data.path}")
        replays = backend(graphs=True)
        one, two = (trained(config, each, steps) for each in (replays, backend(graphs=False)))
        captures = replays.captures
        return Comparison(path.stem, precision, steps, captures.count, int((one != two).sum()), captures.refused)
    except Exception as error:  # a report of everything else is worth more than a traceback
        return Comparison(path.stem, precision, 0, 0, None, f"{type(error).__name__}: {error}")


def run(backend: Any, steps: int = STEPS) -> list[Comparison]:
    """Of every config, in float32 and float64; nothing on a backend that has no graphs."""
    if backend.name != "cupy":
        return []
    return [
        compare(path, precision, type(backend), steps) for path in curves.CONFIGS for precision in curves.TOLERANCES
    ]


def table(comparisons: list[Comparison]) -> str:
    """As a readable table."""
    lines = ["| config | precision | steps | graphs | bytes that differ | |", "|---|---|---|---|---|---|"]
    for c in comparisons:
        verdict = "ok" if c.passed else f"does not pass {c.reason}".strip()
        differing = "" if c.differing is None else c.differing
        lines.append(f"| {c.config} | {c.precision} | {c.steps} | {c.graphs} | {differing} | {verdict} |")
    return "\n".join(lines)
