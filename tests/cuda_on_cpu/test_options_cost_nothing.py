"""What is off costs nothing: a training step launches the same kernels as one that knows of no options at all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.fake_cupy import FakeCupy
from gpu_bp import Batch, Network, Objective, Optimizer, Step, parse_config, registry
from gpu_bp.config_regularisation import RegularisationSection
from gpu_bp.trainer import Trainer

pytestmark = pytest.mark.kernels

WIDTHS, ROWS = [2, 5, 5, 1], 16
OFF: dict[str, dict[str, Any]] = {
    "network": {"normalise": False, "residual": False},
    "regularisation": {key: field.default for key, field in RegularisationSection.model_fields.items()},
    "train": {"part_rows": 1000},
}
ON: list[dict[str, dict[str, Any]]] = [
    {"network": {"normalise": True}},
    {"network": {"residual": True}},
    *(
        {"regularisation": {key: 0.1, **({"l2": 0.1} if key == "biases" else {})}}
        for key in RegularisationSection.model_fields
        if key != "biases"
    ),
    {"train": {"part_rows": 5}},
    {"train": {"average_decay": 0.9}},
    {"loss": {"class_weight": {"upper": 2.0}}},
]


class Counted:
    """The CuPy backend on a device where nothing runs, and what a call launches."""

    def __init__(self) -> None:
        self.cupy = FakeCupy(dry=True)
        self.backend = cupy_backend_module(self.cupy).CupyBackend()

    def launches(self, step: Any) -> tuple[Counter[str], set[str]]:
        """What the third of three steps does on the device, and the kernels of all three."""
        for _ in range(3):
            self.cupy.device.counts.clear()
            step()
        return Counter(self.cupy.device.counts), {kernel.text for kernel in self.cupy.device.kernels}


def by_config(**sections: Any) -> tuple[Counter[str], set[str]]:
    """The launches of a step of the trainer's."""
    counted = Counted()
    config = {
        "data": {"kind": "double-moon", "rows": ROWS},
        "network": {"hidden": WIDTHS[1:-1]},
        "loss": {"kind": "binary_cross_entropy"},
        "optimizer": {"kind": "momentum", "learning_rate": 0.1},
        "train": {"steps": 10, "batch_size": ROWS},
    }
    config = {key: {**config.get(key, {}), **sections.get(key, {})} for key in {**config, **sections}}
    step = Trainer(parse_config(config), counted.backend).step
    size = step.objective.losses.shape[0]
    batches = [batch(counted, start, min(start + size, ROWS)) for start in range(0, ROWS, size)]
    return counted.launches(lambda: [step(part) for part in batches])


def batch(counted: Counted, start: int, end: int) -> Batch:
    zeros = counted.backend.zeros
    inputs, targets = zeros((end - start, WIDTHS[0]), np.float32), zeros((end - start, 1), np.float32)
    return Batch(inputs, targets, zeros((end - start,), np.int64), place=start, last=end == ROWS)


def by_hand() -> tuple[Counter[str], set[str]]:
    """Those of a step that was made without any option."""
    counted = Counted()
    network = Network(WIDTHS, ["tanh", "tanh", "logistic"], backend=counted.backend)
    objective = Objective(network, registry.loss("binary_cross_entropy"), ROWS)
    step = Step(objective, Optimizer(registry.update("momentum"), network, lambda step: 0.1))
    whole = batch(counted, 0, ROWS)
    return counted.launches(lambda: step(whole))


def test_a_step_launches_what_the_derivation_needs() -> None:
    """Three layers: products, activations, deltas, gradients, one update, and no allocation or wait."""
    counts, _ = by_hand()
    products = 3 + 3 + 2  # W y a layer; delta y^T a layer; W^T delta of all but the first
    elementwise = 3 + 1 + 2  # b and phi a layer; loss and delta of the output; deltas of the hidden ones
    watch, update, count = 1, 1, 1  # of what is finite; of all parameters; of the steps
    sums = 3 + 1  # biases' gradients, the loss
    launches = products + elementwise + 2 * sums + watch + update + count  # a sum takes two kernels
    assert counts == {"launches": launches, "graphs": 1}


def test_what_is_off_launches_nothing() -> None:
    counts, kernels = by_config()
    off, off_kernels = by_config(**OFF)
    assert (off, off_kernels) == (counts, kernels)
    hand, hand_kernels = by_hand()
    assert counts == hand
    assert hand_kernels <= kernels


@pytest.mark.parametrize("sections", ON, ids=str)
def test_what_is_on_is_seen(sections: dict[str, dict[str, Any]]) -> None:
    """Each option changes the launches or the kernels: so the counts would show one that is not off."""
    assert by_config(**sections) != by_config()
