"""What checkpoints cost: a training with one a second against the same training without.

    python -m benchmarks.checkpoint [--backend auto|numpy|cupy] [--rounds N] [--json FILE]

Rounds of a second alternate between the two, so that what else a machine does falls on both alike. Beside the ratio
stands where the time goes: how long the step waits for its copy, and how long the thread computes that writes it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.options import at_least, backend_for
from gpu_bp import Trainer, parse_config
from gpu_bp.backends import Backend
from gpu_bp.checkpoint import CheckpointFolder
from gpu_bp.run_folder import RunFolder
from gpu_bp.saving import Saving

WIDTH, BATCH, ROUND_SECONDS = 256, 1024, 1.0
CONFIG: dict[str, Any] = {
    "data": {"kind": "teacher", "rows": 16384, "n_inputs": WIDTH, "residency": "device"},
    "network": {"hidden": [WIDTH] * 3},
    "optimizer": {"kind": "adam", "learning_rate": 1e-4},
    "train": {"steps": 10**9, "batch_size": BATCH, "log_every": 10**9},
}


@dataclass(frozen=True)
class Cost:
    """Medians over the rounds: milliseconds a step without and with a checkpoint a second, their ratio, that of the
    fastest rounds, and milliseconds a checkpoint: of the step that waits, and of the thread's own computing."""

    step: float
    step_with: float
    ratio: float
    ratio_of_fastest: float
    waited: float
    computed: float


def measure(backend: Backend, rounds: int) -> Cost:
    """The cost in so many rounds of each kind."""
    config = parse_config(CONFIG)
    trainer = Trainer(config, backend)
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        folder.begin(config)
        described: dict[str, Any] = {"config": {}, "environment": {}, "data": {}}
        with closing(Timed(trainer, folder, CheckpointFolder(folder.path, 2), described)) as saving:
            steps = trainer.run()
            seconds_a_step(backend, steps, None)
            pairs = [
                (seconds_a_step(backend, steps, None), seconds_a_step(backend, steps, saving)) for _ in range(rounds)
            ]
    without, with_them = ([1e3 * x for x in column] for column in zip(*pairs, strict=True))
    return Cost(
        median(without),
        median(with_them),
        median(b / a for a, b in pairs),
        min(with_them) / min(without),
        1e3 * median(saving.waited),
        1e3 * median(saving.computed),
    )


class Timed(Saving):
    """It says how long the steps waited, and how long the thread computed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waited: list[float] = []
        self.computed: list[float] = []

    def save(self) -> None:
        begin = time.perf_counter()
        super().save()
        self.waited.append(time.perf_counter() - begin)

    def _write(self, *arguments: Any) -> None:
        begin = time.thread_time()
        super()._write(*arguments)
        self.computed.append(time.thread_time() - begin)


def seconds_a_step(backend: Backend, steps: Iterator[object], saving: Saving | None) -> float:
    """Over a round that begins with a checkpoint, or has none."""
    backend.synchronize()
    begin, taken = time.perf_counter(), 0
    while taken == 0 or time.perf_counter() - begin < ROUND_SECONDS:
        next(steps)
        taken += 1
        if saving is not None:
            saving.save() if taken == 1 else saving.after_step()
    backend.synchronize()
    return (time.perf_counter() - begin) / taken


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=at_least(1), default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    backend = backend_for(parser, options.backend)
    cost = measure(backend, options.rounds)
    print(f"a step: {cost.step:.3f} ms, with a checkpoint a second {cost.step_with:.3f} ms")
    print(f"ratio {cost.ratio:.4f}, of the fastest rounds {cost.ratio_of_fastest:.4f}")
    print(f"a checkpoint: the step waits {cost.waited:.2f} ms, the thread computes {cost.computed:.2f} ms")
    if options.json:
        options.json.write_text(json.dumps(asdict(cost), indent=2) + "\n")


if __name__ == "__main__":
    main()
