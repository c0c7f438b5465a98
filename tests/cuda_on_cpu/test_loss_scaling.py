"""The scale of the loss in float16: steps that are left out, its growth, and its end. See gpu_bp/loss_scaling.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cuda_on_cpu.backend import cupy_on_cpu
from cuda_on_cpu.test_precisions import made
from gpu_bp import Step, registry
from gpu_bp.average import Average
from gpu_bp.backends import NumpyBackend
from gpu_bp.data.source import Batch
from gpu_bp.loss_scaling import FIRST, GROWS_AFTER, LEAST, MOST, LossScaling
from gpu_bp.optimizer import Optimizer
from gpu_bp.schedule import constant

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]


def step_of(backend: Any, *, rate: float = 0.1, **options: Any) -> tuple[Step, Batch]:
    objective, batch = made("plain", "float16", backend)
    return Step(objective, Optimizer(registry.update("momentum"), objective.network, constant(rate)), **options), batch


def scale_of(step: Step) -> float:
    assert step.scaling is not None
    return float(step.scaling.state()["scale"])


def test_a_gradient_that_overflows_is_left_out() -> None:
    """With the deltas times 2^16 some overflow: parameters and state stay as they are, the scale is halved; then a step
    is one by the gradient that it is without a scale, clipped or not."""
    for options in ({}, {"clip_norm": 0.5}):
        backend = cupy_on_cpu()
        step, batch = step_of(backend, **options)
        network, (velocity,) = step.objective.network, step.optimizer.state.values()
        start, skipped = backend.to_host(network.parameters), 0
        batch = Batch(batch.inputs, backend.to_device(2.0 * backend.to_host(batch.targets)), batch.rows)
        while (backend.to_host(network.parameters) == start).all():
            assert not backend.to_host(velocity).any()
            assert scale_of(step) == FIRST / 2**skipped
            step(batch)
            skipped += 1
            assert skipped < 12
        assert skipped > 1
        assert scale_of(step) == FIRST / 2 ** (skipped - 1)
        assert step.diverged() is None
        assert step.optimizer.steps == skipped
        unscaled = made("plain", "float32", backend)[0]
        unscaled.forward(batch)
        unscaled.backward(batch)
        mean = backend.to_host(unscaled.gradients) / 20
        if options:
            mean *= 0.5 / np.linalg.norm(mean)
        np.testing.assert_allclose(
            start - backend.to_host(network.parameters), 0.1 * mean, atol=0.004 * abs(mean).max()
        )


@pytest.mark.parametrize("max_norm", [0.0, 100.0])
def test_an_average_begins_with_a_step_that_is_left_out(max_norm: float) -> None:
    """It is then that of the parameters as they are, and no average of nothing."""
    backend = cupy_on_cpu()
    objective, batch = made("plain", "float16", backend)
    network = objective.network
    average = Average(network, 0.5)
    optimizer = Optimizer(registry.update("sgd"), network, constant(0.1))
    step = Step(objective, optimizer, average=average, max_norm=max_norm)
    start = backend.to_host(network.parameters)
    step(Batch(batch.inputs, backend.to_device(2.0 * backend.to_host(batch.targets)), batch.rows))
    assert scale_of(step) == FIRST / 2
    assert (backend.to_host(average.network.parameters) == start).all()


def test_a_loss_that_is_not_finite_is_no_affair_of_the_scale() -> None:
    backend = cupy_on_cpu()
    step, batch = step_of(backend)
    for _ in range(3):
        step(batch)
    before, scale = backend.to_host(step.objective.network.parameters), scale_of(step)
    targets = backend.to_host(batch.targets)
    targets[3, 1] = np.inf
    step(Batch(batch.inputs, backend.to_device(targets), batch.rows))
    step(batch)
    assert step.diverged() == 4
    assert scale_of(step) == scale
    assert (backend.to_host(step.objective.network.parameters) == before).all()


def test_a_scale_too_small_is_a_divergence() -> None:
    """Where even the least scale is too large; nothing changes any more, though later gradients were finite."""
    backend = cupy_on_cpu()
    step, batch = step_of(backend)
    before, n = backend.to_host(step.objective.network.parameters), int(np.log2(FIRST / LEAST)) + 1
    large = Batch(batch.inputs, backend.to_device(1e6 * backend.to_host(batch.targets)), batch.rows)
    for k in range(n):
        assert step.diverged() is None, k
        step(large)
    assert step.diverged() == n
    assert scale_of(step) == LEAST
    step(batch)
    assert (backend.to_host(step.objective.network.parameters) == before).all()


@pytest.mark.parametrize("make", [cupy_on_cpu, NumpyBackend])
def test_the_scale_grows(make: Callable[[], Any]) -> None:
    """After so many good steps in a row, up to the most; the same on both backends."""
    backend, flag = make(), np.full(1, -1)
    scaling, steps, unset = LossScaling(backend), backend.zeros((1,), np.int64), backend.to_device(flag)
    seen = []
    for good in (GROWS_AFTER - 1, GROWS_AFTER, GROWS_AFTER - 1):
        for _ in range(3):
            scaling.restore({"scale": 2.0, "good": good - 2 if good == GROWS_AFTER else good})
            scaling.end(steps, unset)
        seen.append(tuple(scaling.state().values()))
    assert seen == [(4.0, 0), (2.0, GROWS_AFTER - 1), (4.0, 0)]
    scaling.restore({"scale": MOST, "good": GROWS_AFTER - 1})
    scaling.end(steps, unset)
    assert tuple(scaling.state().values()) == (MOST, 0)
    backend.fill(scaling.skip, 7)
    scaling.restore({"scale": 8.0, "good": 5})
    scaling.end(steps, unset)
    assert tuple(scaling.state().values()) == (4.0, 0)
    scaling.restore({"scale": LEAST, "good": 5})
    backend.fill(steps, 41)
    scaling.end(steps, unset)
    assert (float(backend.to_host(scaling.scale)[0]), int(backend.to_host(unset)[0])) == (LEAST, 42)
