"""The first steps of every config, on two backends: do their loss curves agree?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpu_bp import Trainer, load_config
from gpu_bp.backends import Backend
from gpu_bp.config import TableData

ROOT = Path(__file__).parents[1]
CONFIGS = tuple(sorted((ROOT / "configs").glob("*.toml")))
STEPS = 500

# How far two curves may be apart: the largest difference of a step's loss, relative to the largest loss of the
# curve. On a CPU, float32 differs from float64 by 1e-7 (encoder) to 1.2e-5 (xor) over these steps, which is float32's
# own rounding, magnified by training; two right backends in float32 may differ by as much, and 1e-4 leaves room for
# other orders of summation. In float64 the same magnification of 1e-16 stays far below 1e-9.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}


@dataclass(frozen=True)
class Comparison:
    """Two loss curves of a config. `difference` is None where its data are not here, for the `reason`."""

    config: str
    precision: str
    steps: int
    difference: float | None
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.difference is None or self.difference <= TOLERANCES[self.precision]


def curve(config: Path, precision: str, backend: Backend, steps: int, overrides: tuple[str, ...] = ()) -> np.ndarray:
    """The training loss of each of the first steps: (steps,)."""
    everything = [*overrides, f"train.precision={precision}", "train.log_every=1"]
    losses: list[float] = []
    for line in Trainer(load_config(config, everything), backend).run():
        if line is not None:
            losses.append(line["train_loss"])
        if len(losses) == steps:
            break
    return np.array(losses)


def compare(
    config: Path, precision: str, backends: tuple[Backend, Backend], steps: int = STEPS, overrides: tuple[str, ...] = ()
) -> Comparison:
    """Trains the first steps on both backends."""
    data = load_config(config, overrides).data
    if isinstance(data, TableData) and not Path(data.path).is_file():
        return Comparison(config.stem, precision, 0, None, f"no file {data.path}")
    one, two = (curve(config, precision, backend, steps, overrides) for backend in backends)
    if len(one) != len(two):
        return Comparison(config.stem, precision, min(len(one), len(two)), float("inf"), "one curve is longer")
    return Comparison(config.stem, precision, len(one), float(np.abs(one - two).max() / np.abs(two).max()))
