"""A step in shards: its bits are those of a tree that is computed here, whoever computes it and however it comes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from conftest import random_targets
from hypothesis import given
from hypothesis import strategies as st
from test_sharding import shardings, sum_in_tree

from gpu_bp import Batch, Network, NumpyBackend, Objective, Optimizer, Sharding, Step, registry
from gpu_bp.average import Average
from gpu_bp.backends import Backend, host_threads
from gpu_bp.divergence import diagnose
from gpu_bp.gradient_in_parts import GradientInParts
from gpu_bp.noise import Noise
from gpu_bp.share import Share
from gpu_bp.spec import FusedLoss

ROWS = 101
SHARDING = Sharding(8, 5, 0, 8)
# Batches of full size, of fewer rows, with empty shards, and of a single row.
SIZES = (ROWS, 37, 3, ROWS, 1, 37)


def working(monkeypatch: pytest.MonkeyPatch, workers: int) -> NumpyBackend:
    """A backend of so many workers, who all work on a batch of any size, and each on a range of the parameters."""
    monkeypatch.setattr(host_threads, "WORKER", 1)
    monkeypatch.setattr(host_threads, "WORKER_ROWS", 1)
    monkeypatch.setattr("gpu_bp.step.UPDATED", 20)
    backend = NumpyBackend()
    backend._workers.count = workers
    return backend


def step_of(
    backend: Backend,
    loss: str = "squared_error",
    dtype: str = "float64",
    update: str = "momentum",
    sharding: Sharding | None = SHARDING,
    **options: Any,
) -> Step:
    record = registry.loss(loss)
    output = record.output_activation if isinstance(record, FusedLoss) else "identity"
    of_network = {name: options.pop(name) for name in ("normalise", "residual") if name in options}
    widths = [4, 6, 6, record.n_outputs(3)]
    network = Network(widths, ["tanh", "silu", output], backend=backend, dtype=dtype, **of_network)
    rng = np.random.default_rng(0)
    network.load({name: 0.6 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    of_objective = {name: options.pop(name) for name in ("noise", "class_weights") if name in options}
    if options.pop("average", False):
        options["average"] = Average(network, 0.9)
    optimizer = Optimizer(registry.update(update), network, lambda step: 0.05 / (1 + step), penalties={"l2": 1e-3})
    return Step(Objective(network, record, ROWS, **of_objective), optimizer, sharding=sharding, **options)


def batch_of(step: Step, n: int, *, weighted: bool = False) -> Batch:
    network, rng = step.objective.network, np.random.default_rng(n)
    x = rng.standard_normal((n, 4)).astype(network.dtype)
    d = random_targets(step.objective.loss, n, 3, rng)
    weights = rng.uniform(0, 2, n).astype(network.dtype) if weighted else None
    to_device = network.backend.to_device
    d = to_device(d if d.ndim == 1 else d.astype(network.dtype))
    return Batch(to_device(x), d, to_device(np.arange(n)), None if weights is None else to_device(weights))


def cut(step: Step, batch: Batch) -> Iterable[Batch]:
    """As batches come that are smaller than a step."""
    return (replace(part, rows_in_step=batch.n) for part in step.cut([batch]))


def after(
    step: Step, *, weighted: bool = False, in_leaves: bool = False, sizes: tuple[int, ...] = SIZES
) -> dict[str, Any]:
    """What is to be seen after some steps."""
    batches = {n: batch_of(step, n, weighted=weighted) for n in sizes}
    for n in sizes:
        for batch in cut(step, batches[n]) if in_leaves else [batches[n]]:
            step(batch)
    to_host, average = step.objective.network.backend.to_host, step.average
    found = {
        "parameters": to_host(step.objective.network.parameters),
        "gradients": to_host(step.objective.gradients),
        **({"average": to_host(average.network.parameters)} if average else {}),
        **{name: to_host(array) for name, array in step.optimizer.state.items()},
    }
    assert step.diverged() is None
    return {**found, "loss": np.array(step.objective.mean_loss())}


def assert_same_bits(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, array in wanted.items():
        assert found[name].tobytes() == array.tobytes(), name


class Reference:
    """The gradient of a step by an objective of each leaf's own, its products on one thread, and the tree from here."""

    part_rows = used = 0

    def __init__(self, step: Step) -> None:
        self.objective = step.objective
        self._steps = step._steps
        self.shares = [Share(step.objective, step._steps)]

    def __call__(self, batch: Batch) -> None:
        whole = self.objective

        def sums(start: int, end: int) -> list[np.ndarray]:
            table = whole._table
            own = Objective(whole.network, whole.loss, end - start, noise=whole.noise, class_weights=table)
            part = replace(batch.part(start, end), place=start)
            with host_threads.Workers().at_most(1):
                own.forward_at(part, self._steps)
                own.backward_at(part, self._steps, add=False)
            return [own.gradients, own.total, own.weight]

        zero = [np.zeros_like(array) for array in (whole.gradients, whole.total, whole.weight)]
        add: Callable[..., list[np.ndarray]] = lambda one, two: [a + b for a, b in zip(one, two, strict=True)]  # noqa: E731
        gradients, total, weight = sum_in_tree(sums, zero, batch.n, SHARDING, add)
        self.used = 1
        whole.gradients[...] = gradients
        whole.total += total
        whole.weight += weight
        self.shares[0].weight[...] = weight
        whole.count(batch)


NOISE = Noise(seed=3, dropout=(0.4, 0.2), input_noise=0.3, input_dropout=0.1)
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "noise": {"noise": NOISE},
    "normalise": {"normalise": True, "residual": True},
    "clip": {"clip_norm": 0.05},
    "all": {"clip_norm": 0.05, "max_norm": 0.7, "average": True, "noise": NOISE, "normalise": True, "residual": True},
    "an average": {"average": True, "update": "adam"},
    "without a watch": {"watch": False},
    "classes": {"loss": "cross_entropy", "class_weights": np.array([0.5, 2.0, 1.0])},
    "grouped": {"loss": "quantile"},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_bits_are_those_of_the_tree(option: str, dtype: str, weighted: bool) -> None:
    wanted = step_of(NumpyBackend(), dtype=dtype, **OPTIONS[option])
    wanted._gradient = cast(GradientInParts, Reference(wanted))
    one = step_of(NumpyBackend(), dtype=dtype, **OPTIONS[option])
    assert_same_bits(after(one, weighted=weighted), after(wanted, weighted=weighted))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_as_the_plain_step_but_for_rounding(backend: Backend, option: str, weighted: bool) -> None:
    """The noise of a row is that of its place in the whole batch."""
    for dtype, rtol in (("float64", 1e-12), ("float32", 1e-5)):
        one = after(step_of(backend, dtype=dtype, **OPTIONS[option]), weighted=weighted)
        plain = after(step_of(backend, dtype=dtype, sharding=None, **OPTIONS[option]), weighted=weighted)
        for name, found in one.items():
            np.testing.assert_allclose(found, plain[name], rtol=10 * rtol, atol=10 * rtol, err_msg=name)


@pytest.mark.parametrize("loss", registry.LOSSES)
def test_every_loss(loss: str) -> None:
    one, plain = (after(step_of(NumpyBackend(), loss, sharding=s)) for s in (SHARDING, None))
    for name, found in one.items():
        np.testing.assert_allclose(found, plain[name], rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_whoever_computes_it(option: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker or several, of whom a power of two takes part; and batches that come whole or leaf by leaf."""
    wanted = after(step_of(NumpyBackend(), **OPTIONS[option]), weighted=weighted)
    for workers, taken, in_leaves in ((2, 2, False), (5, 4, False), (40, 8, False), (1, 1, True), (3, 1, True)):
        with monkeypatch.context() as patched:
            step = step_of(working(patched, workers), **OPTIONS[option])
            assert_same_bits(after(step, weighted=weighted, in_leaves=in_leaves), wanted)
            assert len(step._gradient._slots) == taken  # type: ignore[union-attr]


@pytest.mark.parametrize("update", registry.UPDATES)
def test_every_update_whoever_computes_it(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = after(step_of(working(monkeypatch, 1), update=update, sharding=SHARDING))
    assert_same_bits(after(step_of(working(monkeypatch, 2), update=update)), one)


@given(sharding=shardings(), sizes=st.lists(st.integers(1, ROWS), min_size=1, max_size=3))
def test_any_sharding(sharding: Sharding, sizes: list[int]) -> None:
    """Whole or leaf by leaf, and the plain step's but for rounding."""
    sharding = replace(sharding, first=0, count=sharding.shards)
    one, two, plain = (
        after(step_of(NumpyBackend(), sharding=s, noise=NOISE), in_leaves=in_leaves, sizes=tuple(sizes))
        for s, in_leaves in ((sharding, False), (sharding, True), (None, False))
    )
    assert_same_bits(two, one)
    for name, found in one.items():
        np.testing.assert_allclose(found, plain[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_several_steps_at_once_are_taken_one_by_one(backend: Backend) -> None:
    found = []
    for steps in (2, 1):
        step = step_of(backend)
        batch = replace(batch_of(step, 40), steps=2)
        for each in [batch] if steps == 2 else batch.of_steps():
            step(each)
        found.append(backend.to_host(step.objective.network.parameters))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("update", ["sgd", "adam"])
def test_batches_of_any_size(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings do not pile up, nor plans, and those that were dropped are made again."""
    sizes = (*range(1, 60, 3), *range(ROWS, 1, -7))
    wanted = after(step_of(NumpyBackend(), update=update, noise=NOISE), sizes=sizes)
    monkeypatch.setattr("gpu_bp.step.RECORDINGS", 30)
    step = step_of(NumpyBackend(), update=update, noise=NOISE)
    assert_same_bits(after(step, sizes=sizes), wanted)
    assert len(step._recorded) <= 30 + 60
    assert len(step._gradient._plans) < 5


# What fails ----------------------------------------------------------------------------------------------------------


def take(step: Step, whole: Batch, places: list[tuple[int, int, int, bool]]) -> None:
    for start, end, n, last in places:
        step(replace(whole.part(start, end), place=start, last=last, rows_in_step=n))


@pytest.mark.parametrize(
    "places",
    [
        [(0, 50, 0, False), (50, ROWS, 0, True)],  # without rows_in_step
        [(0, 12, ROWS, False), (12, 13, ROWS, False)],  # which is no leaf's end
        [(0, 14, ROWS, False)],
        [(0, 12, ROWS, False), (25, 37, ROWS, False)],  # a gap
        [(12, 25, ROWS, False)],  # without a beginning
        [(0, 12, ROWS, True)],  # an end too early
        [(0, ROWS, ROWS, False)],  # or none
        [(0, 12, ROWS, False), (12, 25, ROWS - 1, False)],  # of another step
    ],
)
def test_batches_that_are_no_leaves(places: list[tuple[int, int, int, bool]]) -> None:
    """Refused, and the next step is as if they had not been."""
    step, other = (step_of(NumpyBackend(), sharding=Sharding(8, 13, 0, 8)) for _ in range(2))
    whole = batch_of(step, ROWS)
    with pytest.raises(ValueError, match="cut it as Sharding.leaves does"):
        take(step, whole, places)
    for each in (step, other):
        each(whole)
    assert step.optimizer.steps == 1
    assert step.objective.mean_loss() == other.objective.mean_loss()
    np.testing.assert_array_equal(step.objective.network.parameters, other.objective.network.parameters)


def test_a_step_that_was_not_finished_is_forgotten(backend: Backend) -> None:
    step, other = (step_of(backend, noise=NOISE) for _ in range(2))
    whole = batch_of(step, ROWS, weighted=True)
    for batch in list(cut(step, whole))[:9]:
        step(batch)
    for each in (step, other):
        for batch in cut(step, whole):
            each(batch)
    assert step.objective.mean_loss() == other.objective.mean_loss()
    a, b = (backend.to_host(each.objective.network.parameters) for each in (step, other))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("row", [0, 50, ROWS - 1])
def test_after_a_step_that_failed(row: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for fails in (False, True):
        step = step_of(working(monkeypatch, workers), "cross_entropy", update="adam")
        batch = replace(batch_of(step, ROWS), targets=np.arange(ROWS) % 3)
        step(batch)
        if fails:
            batch.targets[row] = 10**6
            with pytest.raises(IndexError):
                step(batch)
            batch.targets[row] = row % 3
            step.reset_flag()
        else:
            step.objective.forget_loss()
        step(batch)
        assert step.optimizer.steps == 2
        found.append((step.objective.network.parameters.tobytes(), step.objective.mean_loss()))
    assert found[0] == found[1]


@pytest.mark.parametrize("row", [0, 50, ROWS - 1])
def test_a_row_that_goes_wrong(row: int, backend: Backend) -> None:
    """It is seen, nothing changes any more, and the row is named, with no other arrays than the step has."""
    step = step_of(backend)
    batch = batch_of(step, ROWS)
    step(batch)
    before = backend.to_host(step.objective.network.parameters)
    host = backend.to_host(batch.targets)
    host[row] = np.inf
    backend.copy(backend.to_device(host), batch.targets)
    with np.errstate(all="ignore"):
        step(batch)
        step(batch)
        assert step.diverged() == 2
        np.testing.assert_array_equal(backend.to_host(step.objective.network.parameters), before)
        found = diagnose(step.objective_of_parts, step.cut([batch]), 2)
    assert (found.what, found.rows, len(found.batch)) == ("a target", (row,), ROWS)
    assert "signals" not in vars(step.objective)
    assert step.objective_of_parts.signals is step._gradient._slots[0][0].objective.signals  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [1, 2])
def test_no_array_is_made_after_the_first_step(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(
        working(monkeypatch, workers), sharding=Sharding(2, 40, 0, 2), average=True, noise=Noise(1, (0.2, 0.1))
    )
    batch = batch_of(step, ROWS)
    step(batch)
    step(batch)
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        step(batch)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < 40 * 6 * 8 * 10, "of a leaf's array of a hidden layer"
