"""The look at a step: it flags one that is not finite and no other, and what is asked for once the flag is set does
nothing. (Trainings whose steps go wrong: test_divergence.py.)"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from conftest import random_targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from update_rules import VARIANTS, numbers

from gpu_bp import Batch, Network, Objective, Optimizer, Step, registry
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.backends.host_scratch import LOOK
from gpu_bp.spec import FusedLoss

ROWS = 8
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


# The flag --------------------------------------------------------------------------------------------------


def flag_after(b: Backend, gradients: np.ndarray, total: float, flag: int = -1, step: int = 7) -> int:
    on_device = b.to_device(np.array([flag]))
    b.watch(b.to_device(gradients), b.to_device(np.array([total])), b.to_device(np.array([step - 1])), on_device)
    return int(b.to_host(on_device)[0])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@dtypes
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_flag_is_set_where_anything_is_not_finite(backend: Backend, dtype: str, data: st.DataObject) -> None:
    """At any place of the gradients, at and about the borders of blocks, or in the total."""
    block = LOOK
    size = data.draw(st.integers(1, 70) | st.sampled_from([block - 1, block, block + 1, 2 * block + 3]))
    info = np.finfo(dtype)
    finite = st.sampled_from([0.0, -0.0, 1.5, info.max, -info.max, info.tiny, info.smallest_subnormal])
    gradients = np.full(size, data.draw(finite), dtype)
    places = st.integers(0, size - 1) | st.sampled_from([0, size - 1, min(block, size) - 1, min(block, size - 1)])
    broken = st.sampled_from([np.inf, -np.inf, np.nan])
    for place, value in data.draw(st.lists(st.tuples(places, broken | finite), max_size=3)):
        gradients[place] = value
    total = data.draw(broken | st.floats(width=64))
    wrong = not (np.isfinite(gradients).all() and np.isfinite(total))
    assert flag_after(backend, gradients, total) == (7 if wrong else -1)


def test_a_flag_that_is_set_stays(backend: Backend) -> None:
    bad, good = np.full(5, np.nan), np.zeros(5)
    assert flag_after(backend, bad, 0.0, flag=3) == flag_after(backend, good, 0.0, flag=3) == 3
    assert flag_after(backend, bad, 0.0, flag=0) == 0


@dtypes
def test_numpy_looks_without_an_array_of_its_own(dtype: str) -> None:
    b, total, flag = NumpyBackend(), np.zeros(1), np.full(1, -1)
    gradients = np.ones(10**6, dtype)
    b.watch(gradients, total, np.array([0]), flag)
    tracemalloc.start()
    b.watch(gradients, total, np.array([1]), flag)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2000


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_does_nothing_once_the_flag_is_set(backend: Backend, variant: str) -> None:
    """And what it does without a flag where it is not set."""
    record, rng, b = VARIANTS[variant], np.random.default_rng(0), backend
    penalties = [*registry.PENALTIES.values()]
    own = {name: value for name, value in record.values.items() if name != "weight_decay"}
    scalars = record.scalars(2, 0.1, **own) | dict.fromkeys(registry.PENALTIES, 0.1)
    before = [rng.uniform(1, 2, 50).astype(np.float32) for _ in range(2 + len(record.state))]
    after = {}
    for flag in (None, -1, 0, 5):
        w, g, *state = map(b.to_device, before)
        on_device = None if flag is None else b.to_device(np.array([flag]))
        b.update(record, penalties, w, g, state, numbers(b, record, penalties, 0.5, scalars), 30, None, on_device)
        after[flag] = [b.to_host(x).tobytes() for x in (w, *state)]
    unchanged = [x.tobytes() for k, x in enumerate(before) if k != 1]
    assert after[0] == after[5] == unchanged
    assert after[-1] == after[None] != unchanged


def test_max_norm_and_average_do_nothing_once_the_flag_is_set(backend: Backend) -> None:
    b, rng = backend, np.random.default_rng(0)
    before = [rng.standard_normal((5, 40)) for _ in range(2)]
    after = {}
    for flag in (None, -1, 0, 5):
        on_device = None if flag is None else b.to_device(np.array([flag]))
        weights, average = map(b.to_device, before)
        b.average(weights, average, 0.5, on_device)
        b.limit_norms(weights, 1.0, on_device)
        after[flag] = [b.to_host(x).tobytes() for x in (weights, average)]
    unchanged = [x.tobytes() for x in before]
    assert after[0] == after[5] == unchanged
    assert after[-1] == after[None]
    assert all(one != two for one, two in zip(after[-1], unchanged, strict=True))


# Steps that are well -------------------------------------------------------------------------------------


def ordinary(b: Backend, loss_name: str, update: str, steps: int, weights: np.ndarray | None = None) -> Step:
    loss, rng = registry.loss(loss_name), np.random.default_rng(0)
    output = loss.output_activation if isinstance(loss, FusedLoss) else "identity"
    network = Network([3, 5, loss.n_outputs(2)], ["tanh", output], backend=b)
    network.load({name: 0.3 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    step = Step(Objective(network, loss, ROWS), Optimizer(registry.update(update), network, lambda step: 0.01))
    targets = random_targets(loss, ROWS, 2, rng)
    targets = targets if targets.dtype == np.int64 else targets.astype(np.float32)
    inputs = b.to_device(rng.standard_normal((ROWS, 3)).astype(np.float32))
    on_device = None if weights is None else b.to_device(weights.astype(np.float32))
    batch = Batch(inputs, b.to_device(targets), b.to_device(np.arange(ROWS)), on_device)
    for _ in range(steps):
        step(batch)
    return step


@pytest.mark.parametrize(
    ("loss", "update"),
    [*((loss, "momentum") for loss in registry.LOSSES), *(("squared_error", update) for update in registry.UPDATES)],
)
def test_ordinary_steps_are_not_flagged(backend: Backend, loss: str, update: str) -> None:
    steps = 1000 if backend.name == "numpy" else 50
    assert ordinary(backend, loss, update, steps).diverged() is None


def test_rows_that_weigh_nothing_are_no_divergence(backend: Backend) -> None:
    """Their mean loss is no number, and they have none."""
    step = ordinary(backend, "squared_error", "sgd", 3, np.zeros(ROWS))
    assert step.diverged() is None
    assert np.isnan(step.objective.mean_loss())
