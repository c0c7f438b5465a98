"""A long training with checkpoints: whether it gains memory, open files or threads as it goes on.

    python -m benchmarks.soak [STEPS] [--backend auto|numpy|cupy]

Prints a JSON object: `begin`, after a hundredth of the steps, and `end`, each with `memory` (resident, in bytes),
`files` and `threads`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_bp
from benchmarks.options import at_least
from gpu_bp.runs import Lines

CONFIG: dict[str, Any] = {
    "data": {"kind": "double-moon", "rows": 1000, "validation_rows": 100},
    "network": {"hidden": [8]},
    "loss": {"kind": "binary_cross_entropy"},
    "regularisation": {"dropout": 0.1},
    "optimizer": {"kind": "adam", "learning_rate": 1e-3},
    "train": {"batch_size": 8, "log_every": 500},
    "checkpoint": {"every_steps": 250},
}


def now() -> dict[str, int]:
    """What this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def soak(steps: int, backend: str) -> dict[str, dict[str, int]]:
    """Trains for so many steps."""
    held = {}

    def watch(trainer: gpu_bp.Trainer, lines: Lines) -> Iterator[dict[str, Any] | None]:
        for line in lines:
            if trainer.steps in (steps // 100, steps):
                held["begin" if trainer.steps < steps else "end"] = now()
            yield line

    config = {**CONFIG, "train": {**CONFIG["train"], "steps": steps}}
    with tempfile.TemporaryDirectory() as name:
        gpu_bp.train(config, backend=backend, run=Path(name) / "run", watch=watch, pictures=False)
    return held


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=at_least(100), nargs="?", default=10**6)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args(arguments)
    try:
        held = soak(options.steps, options.backend)
    except gpu_bp.UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps(held))


if __name__ == "__main__":
    main()
