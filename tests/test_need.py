"""What a training needs of the memory: what is worked out is what is made, and what is said to fit does fit."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.fake_cupy import FakeCupy

from gpu_bp import NumpyBackend, Source, Task, Trainer, UserError, load_data, memory, parse_config, registry
from gpu_bp.cli import main
from gpu_bp.config import Config
from gpu_bp.data import Dataset, own_data
from gpu_bp.data.source import Batch
from gpu_bp.host_memory import free_bytes

Make = Callable[..., Config]


class Measured(NumpyBackend):
    """NumPy's backend with so much memory; it knows how much of it its arrays take."""

    def __init__(self, budget: int = 2**62) -> None:
        super().__init__()
        self.budget = budget
        self.used = 0

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array: np.ndarray = super().zeros(shape, dtype)
        return self._take(array)

    def to_device(self, host: np.ndarray) -> np.ndarray:
        array: np.ndarray = super().to_device(host)
        return self._take(array)

    def free_bytes(self) -> int:
        return self.budget - self.used

    def _take(self, array: np.ndarray) -> np.ndarray:
        if array.nbytes > self.free_bytes():
            raise MemoryError
        self.used += array.nbytes
        weakref.finalize(array, self._give_back, array.nbytes)
        return array

    def _give_back(self, n_bytes: int) -> None:
        self.used -= n_bytes

    @property
    def scratch(self) -> int:
        """What it keeps for itself."""
        return sum(
            array.nbytes
            for scratch in self._scratch.values()
            for array in vars(scratch).values()
            if isinstance(array, np.ndarray)
        )


# each walks some of the options: sections to change of a config of the teacher's 5,000 rows
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "float64": {"train": {"precision": "float64"}},
    "without biases": {"network": {"biases": False, "activation": "silu"}},
    "dropout": {"regularisation": {"dropout": 0.2, "input_noise": 0.1, "l2": 1e-4}},
    "residual": {"network": {"residual": True, "hidden": [12, 12, 12]}},
    "normalise": {"network": {"normalise": True}},
    "everything": {
        "network": {"residual": True, "normalise": True, "hidden": [12, 12]},
        "regularisation": {"dropout": 0.2, "input_dropout": 0.1, "clip_norm": 1.0, "max_norm": 3.0},
        "stopping": {"metric": "average_validation_loss"},
        "train": {"part_rows": 300, "average_decay": 0.9},
    },
    "parts": {"train": {"part_rows": 64}},
    "average": {"train": {"average_decay": 0.9}},
    "stopping": {"stopping": {"patience": 3}},
    "clip and limit": {"regularisation": {"clip_norm": 1.0, "max_norm": 3.0, "weight_decay": 0.1}},
    "generated, shuffled": {"data": {"residency": "host"}},
    "generated, small blocks": {"data": {"residency": "host", "block_rows": 50, "window_blocks": 4}},
    "generated, in order": {"data": {"residency": "host"}, "train": {"sampling": "ordered"}},
    "generated, drawn": {"data": {"residency": "host"}, "train": {"sampling": "replacement"}},
    "drawn": {"train": {"sampling": "replacement", "batch_size": 10_000}},
    "scaled targets": {"data": {"target_scaling": "standard"}},
    "quantiles": {"loss": {"kind": "quantile", "levels": [0.1, 0.5, 0.9]}, "train": {"metrics": ["mae"]}},
    "classes": {"data": {"kind": "double-moon"}, "loss": {"kind": "cross_entropy"}, "train": {"metrics": ["f1"]}},
    "classes that weigh": {
        "data": {"kind": "double-moon"},
        "loss": {"kind": "cross_entropy", "class_weight": "balanced"},
    },
} | {name: {"optimizer": {"kind": name}, "train": {"batch_size": 5000}} for name in registry.UPDATES}


@pytest.fixture
def config() -> Make:
    """A config of generated data, some sections changed."""

    def make(**sections: Any) -> Config:
        kind = {} if "kind" in sections.get("data", {}) else {"kind": "teacher", "n_inputs": 12, "hidden": [30]}
        rows = {"rows": 5000, "validation_rows": 700, "test_rows": 300}
        tables = {
            "data": {**rows, **kind},
            "network": {"hidden": [20, 10]},
            "optimizer": {"kind": "sgd", "learning_rate": 1e-3},
            "train": {"steps": 12, "batch_size": 500},
        }
        changed = {name: {**tables.get(name, {}), **section} for name, section in sections.items()}
        made = {"name": "need", **tables, **changed}
        if made["data"]["kind"] == "own":
            for key in rows:
                del made["data"][key]
        return parse_config(made)

    return make


def trained(config: Config, dataset: Dataset, backend: Any) -> Trainer:
    """A training of one epoch and a bit, evaluated: all that it ever makes is there."""
    trainer = Trainer(config, backend, dataset)
    for _ in islice(trainer.run(), 12):
        pass
    trainer.evaluate()
    trainer.evaluate_average()
    return trainer


def check(config: Config, dataset: Dataset, backend: Measured) -> None:
    """To the byte what is made; and more, but not much more, than the backend keeps for itself."""
    before = backend.used
    need = memory.estimate(config, dataset, backend)
    assert backend.used == before, "nothing is made"
    trainer = trained(config, dataset, backend)
    apart = need.device["scratch"] + need.device["checkpoint"]
    assert need.total - apart == backend.used - before
    assert backend.scratch <= need.device["scratch"]
    network, optimizer = trainer.model.network, trainer._step.optimizer
    copies = 1 + len(optimizer.state) + bool(trainer.average)
    copies += (1 + bool(trainer.average)) * bool(trainer.selection)
    assert need.device["checkpoint"] == copies * network.parameters.nbytes
    assert need.n_parameters == sum(tensor.size for tensor in network.tensors().values())
    assert (need.steps, need.data) == (trainer.total_steps, trainer.where_data)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_counted_is_made(config: Make, name: str) -> None:
    backend, parsed = Measured(), config(**OPTIONS[name])
    check(parsed, load_data(parsed, backend=backend), backend)


class Weighed(Source):
    """Rows of the host, of classes as numbers, with weights."""

    def __init__(self, n_rows: int, block_rows: int) -> None:
        task = Task("argmax", ("a", "b", "c"))
        super().__init__(n_rows, 6, 3, task, indexed=True, weighted=True, block_rows=block_rows)

    def fill(self, rows: Any, batch: Batch) -> None:
        batch.inputs[...] = np.sin(rows)[:, None]
        batch.targets[...] = rows % 3
        batch.weights[...] = 1 + rows % 2


@pytest.mark.parametrize("block_rows", [1, 100])
@pytest.mark.parametrize("residency", ["device", "host"])
@pytest.mark.parametrize("sampling", ["shuffled", "ordered", "replacement"])
def test_rows_of_the_host(config: Make, block_rows: int, residency: str, sampling: str) -> None:
    """Windows, and rows that are read ahead into memory of their own."""
    windows = {"window_blocks": 3} if block_rows > 1 else {}
    parsed = config(
        data={"kind": "own", "residency": residency, **windows},
        loss={"kind": "cross_entropy"},
        train={"sampling": sampling},
    )
    backend = Measured()
    sources = {"train": Weighed(5000, block_rows), "validation": Weighed(700, block_rows)}
    check(parsed, own_data(sources, parsed.loss.record(), backend), backend)
