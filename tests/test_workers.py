"""Steps that are cut into parts and shared out among workers, and recorded: what they compute does not depend on it."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import tracemalloc
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import random_targets
from hypothesis import given
from hypothesis import strategies as st

from gpu_bp import Batch, Network, NumpyBackend, Objective, Optimizer, Step, registry
from gpu_bp.average import Average
from gpu_bp.backends import host_threads
from gpu_bp.backends.base import Action
from gpu_bp.backends.host_threads import Workers, blas_threads, division
from gpu_bp.divergence import diagnose
from gpu_bp.gradient_in_parts import cut as parts_of
from gpu_bp.noise import Noise
from gpu_bp.spec import FusedLoss, Twin
from gpu_bp.step import SMALL_PLACES

ROWS = 101
SGD = registry.update("sgd").update


class Plain(NumpyBackend):
    """Records nothing: does each time what it is asked, one thing after the other."""

    def record(self, run: Action, worker: int = 0) -> Action:
        return run

    def together(self, actions: Sequence[Action]) -> None:
        for action in actions:
            action()


def cutting(monkeypatch: pytest.MonkeyPatch, workers: int = 3, rows: int = 10) -> NumpyBackend:
    """A backend of so many workers that cuts any batch into parts of so many rows, and the update too."""
    monkeypatch.setattr(host_threads, "WORKER", 1)
    monkeypatch.setattr(host_threads, "WORKER_ROWS", 1)
    monkeypatch.setattr(host_threads, "PART_ROWS", rows)
    monkeypatch.setattr(host_threads, "PART_NUMBERS", 1)
    monkeypatch.setattr("gpu_bp.step.UPDATED", 20)
    backend = NumpyBackend()
    backend._workers.count = workers
    return backend


def step_of(backend: NumpyBackend, loss: str, update: str = "momentum", **options: Any) -> Step:
    record = registry.loss(loss)
    output = record.output_activation if isinstance(record, FusedLoss) else "identity"
    widths = [4, 6, 5, record.n_outputs(3)]
    network = Network(widths, ["tanh", "relu", output], backend=backend, dtype="float64")
    rng = np.random.default_rng(0)
    network.load({name: 0.6 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    of_objective = {name: options.pop(name) for name in ("noise", "class_weights") if name in options}
    if options.pop("average", False):
        options["average"] = Average(network, 0.9)
    optimizer = Optimizer(registry.update(update), network, lambda step: 0.05 / (1 + step), penalties={"l2": 1e-3})
    return Step(Objective(network, record, ROWS, **of_objective), optimizer, **options)


def batches(loss: str, *, weighted: bool = False, parts: tuple[int, ...] = (0, ROWS)) -> list[Batch]:
    """Those of one step, which begin at these places."""
    rng = np.random.default_rng(1)
    x, d = rng.standard_normal((ROWS, 4)), random_targets(registry.loss(loss), ROWS, 3, rng)
    weights = rng.uniform(0, 2, ROWS) if weighted else None
    cuts = [slice(a, b) for a, b in itertools.pairwise(parts)]
    return [
        Batch(x[c], d[c], np.arange(ROWS)[c], None if weights is None else weights[c], c.start, c.stop == ROWS)
        for c in cuts
    ]


def after(step: Step, given: list[Batch], steps: int = 4) -> dict[str, np.ndarray]:
    for _ in range(steps):
        for batch in given:
            step(batch)
    found = {"parameters": step.objective.network.parameters, "gradients": step.objective.gradients}
    if step.average:
        found["average"] = step.average.network.parameters
    return {**found, "loss": np.array(step.objective.mean_loss())}


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "noise": {"noise": Noise(seed=3, dropout=(0.4, 0.2), input_noise=0.3, input_dropout=0.1)},
    "all": {"clip_norm": 0.05, "max_norm": 0.7, "average": True},
    "an average": {"average": True},
    "without a watch": {"watch": False},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("parts", [(0, ROWS), (0, 60, 64, ROWS)])
def test_cut_or_not(parts: tuple[int, ...], option: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the same step on one worker and in one part gives it: in float64 to 1e-12."""
    loss = "squared_error"
    given = batches(loss, weighted=weighted, parts=parts)
    whole = after(step_of(NumpyBackend(), loss, **OPTIONS[option]), given)
    step = step_of(cutting(monkeypatch), loss, **OPTIONS[option])
    assert len(step._gradient.shares) == 3
    for name, found in after(step, given).items():
        np.testing.assert_allclose(found, whole[name], rtol=1e-12, atol=1e-14, err_msg=name)
    assert "signals" not in vars(step.objective), "arrays for the whole batch were made"


@pytest.mark.parametrize("loss", registry.LOSSES)
def test_every_loss(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = after(step_of(NumpyBackend(), loss), batches(loss))
    for name, found in after(step_of(cutting(monkeypatch), loss), batches(loss)).items():
        np.testing.assert_allclose(found, whole[name], rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("update", registry.UPDATES)
@pytest.mark.parametrize("option", OPTIONS)
def test_recorded_or_not_the_bits_are_the_same(option: str, update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one part and in many: every update, with a rate that falls."""
    given = batches("cross_entropy")
    for workers in (1, 3):
        with monkeypatch.context() as patched:
            made = [NumpyBackend(), Plain()]
            if workers > 1:
                for backend in made:
                    backend._workers.count = cutting(patched, workers)._workers.count
            one, two = (after(step_of(b, "cross_entropy", update, **OPTIONS[option]), given) for b in made)
            for name, found in one.items():
                np.testing.assert_array_equal(found, two[name], err_msg=name)


def test_the_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which worker is first is chance; what they give is not."""
    found = [after(step_of(cutting(monkeypatch), "huber"), batches("huber"))["parameters"].tobytes() for _ in range(5)]
    assert len(set(found)) == 1


@pytest.mark.parametrize("cut", [False, True])
def test_arrays_may_be_others_each_time(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are remembered; and arrays that are gone, whose place in memory others take."""
    loss, rng = "squared_error", np.random.default_rng(5)
    backends = [cutting(monkeypatch), cutting(monkeypatch)] if cut else [NumpyBackend(), Plain()]
    one, two = (step_of(backend, loss) for backend in backends)
    kept = Batch(np.empty((ROWS, 4)), np.empty((ROWS, 3)), np.arange(ROWS))
    for _ in range(3 * SMALL_PLACES):
        x, d = rng.standard_normal((ROWS, 4)), rng.standard_normal((ROWS, 3))
        one(Batch(x.copy(), d.copy(), np.arange(ROWS)))
        kept.inputs[...], kept.targets[...] = x, d
        two(kept)
        np.testing.assert_array_equal(one.objective.network.parameters, two.objective.network.parameters)


def test_batches_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings do not pile up, and those that were dropped are made again."""
    monkeypatch.setattr("gpu_bp.step.RECORDINGS", 7)
    (whole,) = batches("squared_error")
    sizes = [ROWS, 40, 3, 1, 17, 99, 5, 64, 2, ROWS, 40]
    one, two = step_of(cutting(monkeypatch), "squared_error"), step_of(NumpyBackend(), "squared_error")
    for n in sizes:
        for step in (one, two):
            step(whole.part(0, n))
        np.testing.assert_allclose(one.objective.network.parameters, two.objective.network.parameters, rtol=1e-12)
        assert len(one._recorded) <= 7 + 40


def test_a_row_that_goes_wrong_is_seen_in_any_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in (0, 50, ROWS - 1):
        step, (batch,) = step_of(cutting(monkeypatch), "squared_error"), batches("squared_error")
        step(batch)
        before = step.objective.network.parameters.copy()
        batch.targets[row] = np.inf
        with np.errstate(all="ignore"):
            step(batch)
            step(batch)
        assert step.diverged() == 2
        np.testing.assert_array_equal(step.objective.network.parameters, before)


# Memory --------------------------------------------------------------------------------------------------------------


def test_a_step_in_parts_makes_no_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    step, given = step_of(cutting(monkeypatch, rows=40), "squared_error", average=True), batches("squared_error")
    after(step, given)
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        for batch in given:
            step(batch)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < 40 * 6 * 8 * 10, "of a part's array of a hidden layer"


def test_memory_does_not_grow_with_the_batch() -> None:
    """The arrays of a step are those of a part, whatever the batch."""
    taken = []
    for rows in (20_000, 80_000):
        network = Network([64] * 4, ["tanh"] * 3)
        network.load({name: np.zeros(shape) for name, shape in network.layout.shapes.items()})
        step = Step(
            Objective(network, registry.loss("squared_error"), rows),
            Optimizer(registry.update("sgd"), network, lambda step: 0.1),
        )
        batch = Batch(*np.zeros((2, rows, 64), np.float32), np.arange(rows))
        tracemalloc.start()
        step(batch)
        taken.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert taken[1] < 1.2 * taken[0] < 80_000 * 64 * 4


# The rules -----------------------------------------------------------------------------------------------------------


@given(
    widths=st.lists(st.integers(1, 5000), min_size=2, max_size=6),
    rows=st.integers(1, 2**24),
    workers=st.integers(1, 200),
)
def test_division(widths: list[int], rows: int, workers: int) -> None:
    """All rows are taken once, by workers that have enough to do."""
    part, taken = division(widths, rows, workers)
    assert 1 <= taken <= workers
    assert 1 <= part <= rows
    cuts = [cut for k in range(taken) for cut in parts_of(rows, taken, k, part)] if rows / part < 10_000 else []
    if cuts:
        assert cuts[0][0] == 0
        assert cuts[-1][1] == rows
        assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
        assert all(0 < end - start <= part for start, end in cuts)
    if taken > 1:
        multiplications = 3 * sum(a * b for a, b in itertools.pairwise(widths))
        assert rows / taken * (multiplications + host_threads.FORMULAS * sum(widths[1:])) >= host_threads.WORKER
    assert division(widths, rows, 1).workers == 1


def test_small_products_are_not_for_many_threads() -> None:
    assert blas_threads(2**20) == 1
    assert blas_threads(2**30) > 100


def test_all_run_at_once() -> None:
    """Each waits for the others."""
    workers = Workers()
    workers.count = 4
    barrier, seen = threading.Barrier(4), []

    def action(k: int) -> None:
        barrier.wait(60)
        seen.append(k)

    for _ in range(3):
        workers.together([lambda k=k: action(k) for k in range(4)])  # type: ignore[misc]
    assert sorted(seen) == sorted([0, 1, 2, 3] * 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_workers_of_its_own() -> None:
    workers = Workers()
    workers.count = 2
    workers.together([lambda: None] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is risky to fork where there are threads
        child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            workers.together([lambda: None] * 2)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("which", [0, 1])
def test_an_error_comes_through(which: int) -> None:
    """After the others have ended; and BLAS has its threads again."""
    workers, ended = Workers(), []
    workers.count = 2
    before = workers._blas and workers._blas.get_num_threads()

    failed = threading.Event()

    def fails() -> None:
        failed.set()
        raise MemoryError("here")

    def ends(k: int) -> None:
        failed.wait(60)
        np.linalg.svd(np.ones((300, 300)))  # which takes a while
        ended.append(k)

    actions = [lambda: ends(1), lambda: ends(2)]
    actions[which] = fails
    with pytest.raises(MemoryError, match="here"):
        workers.together(actions)
    assert ended == [2 - which]
    assert (workers._blas and workers._blas.get_num_threads()) == before


def test_what_numpy_is_told_of_overflows_holds_for_workers() -> None:
    workers, big = Workers(), np.full(3, 3e38, np.float32)
    workers.count = 2
    with np.errstate(over="ignore"):
        workers.together([lambda: None, lambda: np.multiply(big, big)])
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        workers.together([lambda: None, lambda: np.multiply(big, big)])


def test_threads_of_blas() -> None:
    workers = Workers()
    if workers._blas is None or workers.count < 2:
        pytest.skip("this BLAS has a single thread, or cannot be told")
    with workers.at_most(1):
        assert workers._blas.get_num_threads() == 1
        with workers.at_most(5):
            assert workers._blas.get_num_threads() == 1
    assert workers._blas.get_num_threads() == workers.count


# What could go unnoticed ---------------------------------------------------------------------------------------------


def test_another_average_takes_the_place_of_one_that_is_gone() -> None:
    step, given = step_of(NumpyBackend(), "squared_error", average=True), batches("squared_error")
    after(step, given)
    for _ in range(20):  # one of them stands where the first stood
        step.average = None
        step.average = Average(step.objective.network, 0.5)
        after(step, given, 3)
        assert step.average.network.parameters.any()


def test_a_twin_cannot_change_the_numbers_of_all_steps() -> None:
    def twin(w: np.ndarray, g: np.ndarray, s: object, rate: np.ndarray) -> None:
        rate *= 2.0

    step = step_of(NumpyBackend(), "squared_error", "sgd")
    object.__setattr__(step.optimizer.record, "update", Twin("", twin))
    try:
        with pytest.raises(ValueError, match="read-only"):
            after(step, batches("squared_error"))
    finally:
        object.__setattr__(step.optimizer.record, "update", SGD)


@pytest.mark.parametrize("row", [0, ROWS - 1])
@pytest.mark.parametrize("cut", [False, True])
def test_after_a_step_that_failed(cut: bool, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All goes on as if it had not been; nothing of it is in the gradient or the number of the steps."""
    found = []
    for fails in (False, True):
        step = step_of(cutting(monkeypatch) if cut else NumpyBackend(), "cross_entropy", "adam")
        x = np.random.default_rng(0).standard_normal((ROWS, 4))
        batch = Batch(x, np.arange(ROWS) % 3, np.arange(ROWS))
        step(batch)
        if fails:
            batch.targets[row] = 10**6
            with pytest.raises(IndexError):
                step(batch)
            batch.targets[row] = row % 3
            step.reset_flag()
        step(batch)
        assert step.optimizer.steps == 2
        assert step.diverged() is None
        found.append(step.objective.network.parameters.tobytes())
    assert found[0] == found[1]


def test_arrays_with_gaps_are_not_recorded() -> None:
    """Noise on inputs that are some columns of what changes."""
    noise = Noise(seed=1, input_noise=0.3)
    one, two = (step_of(NumpyBackend(), "squared_error", noise=noise) for _ in range(2))
    wide, rng = np.empty((ROWS, 8)), np.random.default_rng(0)
    targets, view = rng.standard_normal((ROWS, 3)), wide[:, :4]
    for _ in range(3):
        wide[...] = rng.standard_normal(wide.shape)
        one(Batch(view, targets, np.arange(ROWS)))
        two(Batch(view.copy(), targets, np.arange(ROWS)))
    np.testing.assert_array_equal(one.objective.network.parameters, two.objective.network.parameters)


def test_limits_of_two_threads_do_not_outlive_them() -> None:
    workers = Workers()
    if workers._blas is None:
        pytest.skip("this BLAS cannot be told")
    before = workers._blas.get_num_threads()
    outer, inner = workers.at_most(2), workers.at_most(1)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert workers._blas.get_num_threads() == 1
    inner.__exit__(None, None, None)
    assert workers._blas.get_num_threads() == before


def test_a_divergence_is_looked_at_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arrays that the step has, and no more; it names the rows by their numbers."""
    step, (batch,) = step_of(cutting(monkeypatch), "squared_error"), batches("squared_error")
    batch.targets[[7, 95]] = np.inf
    with np.errstate(all="ignore"):
        step(batch)
        found = diagnose(step.objective_of_parts, step.cut([batch]), 1)
    assert (found.what, found.rows, len(found.batch)) == ("a target", (7, 95), ROWS)
    assert "signals" not in vars(step.objective)


def test_what_another_thread_asks_for_is_not_recorded() -> None:
    backend, out = NumpyBackend(), np.zeros(3)

    def run() -> None:
        other = threading.Thread(target=backend.copy, args=(np.ones(3), out))
        other.start()
        other.join()

    play = backend.record(run)
    np.testing.assert_array_equal(out, 1)
    out[...] = 5
    play()
    np.testing.assert_array_equal(out, 5)
