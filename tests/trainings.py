"""Small trainings that together have every kind of state and of data, and what has to be equal of two runs of one.

Tests of exact resume walk this table; `test_state.py` sees to it that every piece of state is in one of them.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gpu_bp
from gpu_bp import parse_config
from gpu_bp.backends import Backend
from gpu_bp.checkpoint import Checkpoint, CheckpointFolder
from gpu_bp.run_folder import RunFolder
from gpu_bp.trainer import Trainer
from gpu_bp.training_state import Tensors, TrainingState, restore, take

OWN = """
import numpy as np
from gpu_bp import Source, Task

class Waves(Source):
    def __init__(self, n_rows, first):
        super().__init__(n_rows, 2, 1, Task("none"), block_rows=8)
        self.first = first

    def fill(self, rows, batch):
        batch.inputs[:] = np.sin(np.multiply.outer(rows + self.first, [1.0, 2.0]))
        batch.targets[:] = np.sin(3 * batch.inputs[:, :1])

train, validation = Waves(50, 0), Waves(20, 50)
"""

COMMON: dict[str, Any] = {
    "seed": 7,
    "data": {"kind": "double-moon", "rows": 50, "validation_rows": 20},
    "network": {"hidden": [6, 6]},
    "optimizer": {"kind": "adam", "learning_rate": 0.02},
    "train": {"epochs": 6, "batch_size": 8},  # 7 steps an epoch, the last of 2 rows
    "checkpoint": {"every_steps": 3},
}
ON_HOST = {"residency": "host", "block_rows": 4, "window_blocks": 3}

# By name: the tables that differ from COMMON. PATH is the folder of `write_data`.
TRAININGS: dict[str, dict[str, Any]] = {
    "noise": {
        "regularisation": {"dropout": 0.3, "input_noise": 0.1, "input_dropout": 0.1, "l2": 0.01, "clip_norm": 1.0},
        "schedule": {"kind": "cosine", "warmup_steps": 9},
        "train": {"average_decay": 0.9, "log_every": 5},
    },
    "plateau": {
        "optimizer": {"kind": "nesterov"},
        "schedule": {"kind": "plateau", "patience": 1, "factor": 0.7, "metric": "validation_loss", "threshold": 0.3},
        "stopping": {"metric": "validation_accuracy"},
        "regularisation": {"max_norm": 1.0},
        "train": {"average_decay": 0.8, "log_every": 4},
    },
    "patience": {
        "optimizer": {"kind": "momentum", "learning_rate": 1.0},
        "stopping": {"metric": "average_validation_loss", "patience": 3},
        "train": {"average_decay": 0.5, "epochs": 500, "log_every": 2},
    },
    "replacement": {
        "data": {"kind": "gaussian-blobs", "rows": 50, "n_classes": 2},
        "loss": {"kind": "cross_entropy", "class_weight": {"0": 3.0}},
        "optimizer": {"kind": "rmsprop", "centered": True, "momentum": 0.5},
        "schedule": {"kind": "one_cycle"},
        "train": {"sampling": "replacement", "epochs": None, "steps": 40},
    },
    "generated": {
        "data": {"kind": "friedman1", "rows": 50, "scaling": "standardise", "target_scaling": "standardise", **ON_HOST},
        "network": {"normalise": True, "residual": True},
        "train": {"sampling": "shuffled"},
    },
    "ordered": {
        "data": {"kind": "linear", "rows": 50, "n_inputs": 3, **ON_HOST},
        "optimizer": {"kind": "nadam"},
        "train": {"sampling": "ordered", "part_rows": 3, "precision": "float64"},
    },
    "files": {
        "data": {
            "kind": "arrays",
            **{name: f"PATH/{name}.npy" for name in ("inputs", "targets", "weights")},
            **ON_HOST,
        },
        "loss": {"kind": "cross_entropy", "class_weight": "balanced"},
        "optimizer": {"kind": "adam", "amsgrad": True, "betas": [0.8, 0.6]},
        "train": {"log_every": 9},
    },
    "shards": {
        "data": {"kind": "arrays", **{name: f"PATH/{name}.npy" for name in ("inputs", "targets", "weights")}},
        "loss": {"kind": "cross_entropy"},
        "regularisation": {"dropout": 0.3, "input_noise": 0.1},
        "train": {"shards": 4},  # the last step's rows are too few for all
    },
    "shards, in parts": {
        "data": {"kind": "friedman1", "rows": 50, **ON_HOST},
        "train": {"shards": 2, "part_rows": 3, "average_decay": 0.9},
    },
    "own": {
        "data": {
            "kind": "own",
            "sources": {name: f"PATH/waves.py:{name}" for name in ("train", "validation")},
            "residency": "host",
            "block_rows": 4,
            "window_blocks": 2,
        },
        "schedule": {"kind": "inverse_time", "after": 20},
        "train": {"part_rows": 5},
    },
}

# Diverges again and again, and goes back to where it was, to the beginning first and later to step 10. Where it goes
# back to is a matter of where its checkpoints are: it is the same run where it is killed, not where it is interrupted.
REWINDS: dict[str, Any] = {
    **COMMON,
    "data": {"kind": "friedman1", "rows": 50, "validation_rows": 20},
    "network": {"hidden": [6, 6], "activation": "identity"},
    "optimizer": {"kind": "sgd", "learning_rate": 4.0},
    "train": {"epochs": 6, "batch_size": 8, "on_divergence": "rewind", "max_rewinds": 9, "log_every": 1},
    "checkpoint": {"every_steps": 5},
}


_FILES = {"kind": "arrays", **{name: f"PATH/{name}.npy" for name in ("inputs", "targets")}}
# Every combination of what a step may be, each with a last batch that is short: for ranks, of which any number is to
# compute the same of all of them.
GRID: dict[str, dict[str, Any]] = {
    f"{optimizer}, {source}, {precision}{', dropout' * dropout}": {
        "data": {"kind": "friedman1", "rows": 50, **ON_HOST} if source == "generated" else _FILES,
        "optimizer": {"kind": optimizer},
        "regularisation": {"dropout": 0.3 * dropout},
        "train": {"precision": precision, "epochs": 2, "batch_size": 20, "log_every": 1},
    }
    for optimizer, source, precision, dropout in itertools.product(
        ("sgd", "adam"), ("files", "generated"), ("float32", "float64"), (False, True)
    )
}

# Products that two threads of OpenBLAS sum in another order than one, and batches that several workers share.
LARGE: dict[str, Any] = {
    "data": {"kind": "teacher", "rows": 9000, "n_inputs": 784, "validation_rows": 5000},
    "network": {"hidden": [300], "weights": {"kind": "orthogonal"}},
    "optimizer": {"kind": "adam", "learning_rate": 1e-3},
    "regularisation": {"clip_norm": 0.1, "max_norm": 1.0, "dropout": 0.1},
    "train": {"steps": 2, "batch_size": 4500, "shards": 4, "log_every": 1, "precision": "float64"},
}


def write_data(folder: Path) -> None:
    """What the trainings read."""
    rng = np.random.default_rng(5)
    np.save(folder / "inputs.npy", rng.standard_normal((70, 3)))
    np.save(folder / "targets.npy", rng.integers(0, 3, 70))
    np.save(folder / "weights.npy", rng.uniform(0.5, 2, 70))
    (folder / "waves.py").write_text(OWN)


def tables(name: str, folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """The config of a training, whose data are in that folder."""
    config = copy.deepcopy(COMMON)
    for section, values in (*(TRAININGS | GRID)[name].items(), *changes.items()):
        # of data of another kind no key but validation_rows is kept
        kept = {"validation_rows": 20} if "kind" in values and section == "data" else config.get(section, {})
        config[section] = {**kept, **values}
    if config["data"]["kind"] == "own":
        del config["data"]["validation_rows"]
    config["train"] = {key: value for key, value in config["train"].items() if value is not None}
    return dict(json.loads(json.dumps(config).replace("PATH", folder.as_posix())))


def numbers(state: TrainingState) -> dict[str, Any]:
    """The numbers of a state that have to be equal: all but the time it took."""
    return state.model_dump(exclude={"seconds"})


def moment(trainer: Trainer, line: dict[str, Any] | None = None) -> dict[str, Any]:
    """All that is to be seen of a training after a step."""
    state, tensors = take(trainer)
    return {"state": numbers(state), "tensors": hexed(tensors), "line": timeless(line) if line else None}


def hexed(tensors: Tensors) -> dict[str, str]:
    """Tensors as text, so that equal is equal in every bit."""
    return {name: f"{x.dtype} {x.shape} {x.tobytes().hex()}" for name, x in tensors.items()}


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics, or a summary, without how long it took."""
    return {key: value for key, value in line.items() if key not in ("seconds", "rows_per_second")}


def last_checkpoint(run: Path) -> Checkpoint:
    """The newest whole checkpoint of a run."""
    found = CheckpointFolder(run, 2).newest()
    assert found is not None
    return found


def outcome(run: Path) -> dict[str, Any]:
    """All that has to be equal of two runs of the same training, however often one of them was stopped."""
    last = last_checkpoint(run)
    files = {path.name: path for path in run.iterdir() if path.is_file()}
    return {
        "files": sorted(files),
        "config": files["config.toml"].read_text(),
        "metrics": [timeless(line) for line in RunFolder(run).metrics()],
        "summary": timeless(json.loads(files["summary.json"].read_text())),
        "state": numbers(last.facts.training),
        "tensors": hexed(last.tensors),
        **{name: path.read_bytes().hex() for name, path in files.items() if path.suffix == ".safetensors"},
    }


# stopped and gone on with -------------------------------------------------------------------------------------

Tiny = Callable[..., dict[str, Any]]
train = functools.partial(gpu_bp.train, pictures=False)
resume = functools.partial(gpu_bp.resume, pictures=False, trust_code=True)
Moments = list[dict[str, Any]]


def after(steps: int) -> Callable[[], bool]:
    """What interrupts a training after so many steps."""
    asked = itertools.count(1)
    return lambda: next(asked) == steps


def new(config: dict[str, Any], backend: Backend) -> Trainer:
    return Trainer(parse_config(config), backend)


def moments(trainer: Trainer, steps: int = -1) -> Moments:
    """What is to be seen after each step: of so many, after which the training pauses, or of all that are left."""
    interrupted = after(steps)
    return [moment(trainer, line) for line in trainer.run(lambda: "pause" if interrupted() else "")]


def other_process(trainer: Trainer, config: dict[str, Any], backend: Backend) -> Trainer:
    """A new trainer that was given the state of this one, by way of text and of tensors of its own."""
    state, tensors = take(trainer)
    made = new(config, backend)
    restore(made, TrainingState.model_validate_json(state.model_dump_json()), tensors)
    return made
