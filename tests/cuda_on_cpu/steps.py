"""Steps of a small network, on the stand-in and elsewhere, and whether two of them come to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.fake_cupy import FakeCupy
from gpu_bp import Batch, Network, Objective, Optimizer, Step, registry
from gpu_bp.backends import Backend
from gpu_bp.schedule import constant
from gpu_bp.spec import FusedLoss


def make_step(b: Backend, loss_name: str, update: str, *, rate: Any = None, dtype: str = "float64") -> Step:
    """A step of a network 3-4-2 whose parameters and loss are the same on every backend."""
    loss = registry.loss(loss_name)
    last = loss.output_activation if isinstance(loss, FusedLoss) else "identity"
    network = Network([3, 4, loss.n_outputs(2)], ["silu", last], backend=b, dtype=dtype)
    rng = np.random.default_rng(1)
    network.load({name: 0.5 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    optimizer = Optimizer(registry.update(update), network, rate or constant(0.1))
    return Step(Objective(network, loss, 8), optimizer)


def make_batch(b: Backend, loss_name: str, rows: int, dtype: str = "float64") -> Batch:
    """Up to 8 rows for it; the first are the same however many there are."""
    rng = np.random.default_rng(2)
    inputs = rng.standard_normal((8, 3)).astype(dtype)[:rows]
    classes = registry.loss(loss_name).targets == "classes"
    targets = np.arange(8)[:rows] % 2 if classes else rng.uniform(0, 1, (8, 2)).astype(dtype)[:rows]
    return Batch(b.to_device(inputs), b.to_device(targets), b.to_device(np.arange(rows)))


def backends(**options: Any) -> Iterator[tuple[Any, FakeCupy]]:
    """One that captures, and one that does not."""
    for graphs in (True, False):
        cupy = FakeCupy(**options)
        yield cupy_backend_module(cupy).CupyBackend(graphs=graphs), cupy


def state_of(step: Step) -> list[np.ndarray]:
    """All that a training goes on with, on the host."""
    network, average = step.objective.network, step.average
    arrays = [network.parameters, step.objective.gradients, *step.optimizer.state.values()]
    arrays += [average.network.parameters] if average else []
    return [*map(network.backend.to_host, arrays), np.array(step.objective.mean_loss(reset=False))]


def assert_same_bits(one: list[np.ndarray], two: list[np.ndarray]) -> None:
    for a, b in zip(one, two, strict=True):
        assert a.tobytes() == b.tobytes()
