"""The first steps of every config, on two backends: do their loss curves agree?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpu_bp import Config, Trainer, load_config
from gpu_bp.backends import Backend
from gpu_bp.config_data import TableData

ROOT = Path(__file__).parents[1]
CONFIGS = tuple(sorted((ROOT / "configs").glob("*.toml")))
STEPS = 500

# How far two curves may be apart. In float64: at each step, relative to its loss. In float32: relative to the largest
# loss of the curve, because a row that is met almost exactly has a loss of a few roundings. On a CPU float32 differs
# from float64 by 1e-7 (encoder) to 1.2e-5 (xor) so measured, which is float32's own rounding, magnified by training;
# two right backends in float32 may differ by as much, and 1e-4 leaves room for other orders of summation.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}


# The points of the two spirals are each other's mirror images. So the gradients of the biases, which start at 0, are 0
# but for rounding, and Adam, which divides by their size, makes large steps of that. With noise they are not.
CHANGED = {"two-spirals": ["data.noise=0.01"]}


@dataclass(frozen=True)
class Comparison:
    """Two loss curves of a config. `difference` is None where they could not be compared, for the `reason`."""

    config: str
    precision: str
    steps: int
    difference: float | None
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.difference is not None and self.difference <= TOLERANCES[self.precision]


def find_bikes() -> Path | None:
    """hour.csv of UCI Bike Sharing: under $GPU_BP_DATA, in data/, or in shared/data/ beside the repository."""
    named = [Path(os.environ["GPU_BP_DATA"])] if "GPU_BP_DATA" in os.environ else []
    folders = [*named, ROOT / "data", ROOT.parent / "shared" / "data"]
    return next((path for folder in folders if (path := folder / "bike-sharing/hour.csv").is_file()), None)


def read(path: Path, precision: str, *, every_step: bool = True) -> Config:
    """A config with a line of metrics at every step, its data where they are, and no end before its length."""
    overrides = [f"train.precision={precision}", *CHANGED.get(path.stem, ())]
    if every_step:
        overrides.append("train.log_every=1")
    if path.stem == "bike-sharing" and (bikes := find_bikes()):
        overrides.append(f"data.path={bikes}")
    config = load_config(path, overrides)
    return config.model_copy(update={"train": config.train.model_copy(update={"stop_at_errors": None})})


def curve(config: Config, backend: Backend, steps: int) -> np.ndarray:
    """The training loss of each of the first steps: (steps,)."""
    losses: list[float] = []
    for line in Trainer(config, backend).run():
        if line is not None:
            losses.append(line["train_loss"])
        if len(losses) == steps:
            break
    return np.array(losses)


def compare(path: Path, precision: str, backends: tuple[Backend, Backend], steps: int = STEPS) -> Comparison:
    """Trains the first steps on both backends. Whatever goes wrong is the reason of the comparison."""
    try:
        config = read(path, precision)
        if isinstance(config.data, TableData) and not Path(config.data.path).is_file():
            return Comparison(path.stem, precision, 0, None, f"not run: no file {config.data.path}")
        one, two = (curve(config, backend, steps) for backend in backends)
        scale = np.abs(two) if precision == "float64" else np.abs(two).max()
        return Comparison(path.stem, precision, len(two), float((np.abs(one - two) / scale).max()))
    except Exception as error:  # a report of everything else is worth more than a traceback
        return Comparison(path.stem, precision, 0, None, f"{type(error).__name__}: {error}")
