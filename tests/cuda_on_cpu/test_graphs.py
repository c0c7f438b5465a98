"""Steps that are captured in a CUDA graph and replayed: the same bits as steps that are asked for one by one, whatever
the step has in it. (What fails on the way there: test_graph_faults.py.)"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.fake_cupy import FakeCupy
from cuda_on_cpu.steps import assert_same_bits, backends, make_batch, make_step, state_of
from gpu_bp import Network, Objective, Optimizer, Sharding, Step, Trainer, parse_config, registry
from gpu_bp.average import Average
from gpu_bp.data.source import Batch
from gpu_bp.errors import Diverged
from gpu_bp.noise import Noise
from gpu_bp.schedule import linear

pytestmark = pytest.mark.kernels

# Each number of rows often enough to be captured, and replayed; one not.
ROWS = (8, 8, 5, 8, 5, 8, 5, 8, 1, 8)


@pytest.mark.parametrize("update", list(registry.UPDATES))
@pytest.mark.parametrize("loss", list(registry.LOSSES))
def test_every_loss_and_update(loss: str, update: str) -> None:
    """Ten steps at a falling rate, shorter batches among them."""
    states = []
    for b, cupy in backends():
        step = make_step(b, loss, update, rate=linear(0.1, 0.01, 10))
        batches = {rows: make_batch(b, loss, rows) for rows in set(ROWS)}
        for rows in ROWS:
            step(batches[rows])
        assert cupy.device.counts["graphs"] == (7 if not states else 0)
        states.append(state_of(step))
    assert_same_bits(*states)


# What a step can have beside, and how its batches come.
OPTIONS: dict[str, dict[str, Any]] = {
    "noise": {"noise": Noise(seed=3, dropout=(0.4, 0.2), input_noise=0.3, input_dropout=0.1)},
    "clipping": {"clip_norm": 0.05},
    "max-norm": {"max_norm": 0.9},
    "average": {"average": 0.9},
    "weights": {"weighted": True},
    "weights, clipped": {"weighted": True, "clip_norm": 0.05, "average": 0.9, "max_norm": 0.9},
    "class weights": {"class_weights": np.array([0.5, 2.0])},
    "parts": {"parts": (0, 3, 6, 8)},
    "noisy parts": {"parts": (0, 3, 6, 8), "noise": Noise(seed=3, dropout=(0.4, 0.2)), "clip_norm": 0.05},
    "weighted parts": {"parts": (0, 5, 8), "weighted": True, "average": 0.9},
    "no watch": {"watch": False},
    "shards": {"sharding": Sharding(4, 2, 0, 4)},
    "noisy shards of parts": {
        "sharding": Sharding(2, 3, 0, 2),
        "noise": Noise(seed=3, dropout=(0.4, 0.2)),
        "average": 0.9,
    },
    "weighted shards": {"sharding": Sharding(2, 4, 0, 2), "weighted": True, "clip_norm": 0.05, "max_norm": 0.9},
}


def steps_with(b: Any, *, weighted: bool = False, parts: tuple[int, ...] = (0, 8), **options: Any) -> Iterator[Step]:
    """A step after each time it was taken: normalised, with a shortcut, and with those options."""
    loss = registry.loss("cross_entropy")
    network = Network([4, 4, 4, 2], ["tanh", "silu", "softmax"], normalise=True, residual=True, backend=b)
    rng = np.random.default_rng(0)
    network.load({name: 0.6 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    of_objective = {name: options.pop(name) for name in ("noise", "class_weights") if name in options}
    objective = Objective(network, loss, 8, **of_objective)
    optimizer = Optimizer(registry.update("adam"), network, linear(0.1, 0.01, 12), penalties={"l2": 1e-3})
    average = Average(network, options.pop("average")) if "average" in options else None
    step = Step(objective, optimizer, average=average, **options)
    x, w = rng.standard_normal((8, 4)).astype(np.float32), rng.uniform(0, 2, 8).astype(np.float32)
    whole = Batch(*map(b.to_device, (x, np.arange(8) % 2, np.arange(8))), b.to_device(w) if weighted else None)
    cut = list(itertools.pairwise(parts))
    batches = [
        Batch.of(whole.part(start, end).filled, whole.rows[start:end], place=start, last=end == 8) for start, end in cut
    ]
    for _ in range(8):
        for batch in batches:
            step(batch)
        yield step


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name: str, lazy: bool) -> None:
    """Also where the device is as late as it may be: what a replay reads must be there, and still be."""
    states = []
    for b, cupy in backends(lazy=lazy):
        *_, step = steps_with(b, **OPTIONS[name])
        assert (cupy.device.counts["graphs"] > 0) == (not states)
        states.append(state_of(step))
    assert_same_bits(*states)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_replay_allocates_nothing_and_waits_for_nobody(name: str) -> None:
    cupy = FakeCupy()
    steps = steps_with(cupy_backend_module(cupy).CupyBackend(), **OPTIONS[name])
    for _ in range(4):
        next(steps)
    cupy.device.counts.clear()
    cupy.bindings.calls.clear()
    next(steps)
    counts = {name: n for name, n in cupy.device.counts.items() if name not in ("launches", "device copies")}
    parts, graphs = len(OPTIONS[name].get("parts", (0, 8))) - 1, counts.pop("graphs")
    assert graphs == parts
    assert counts == {"asynchronous copies": 1}
    assert cupy.bindings.calls == []


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", [name for name in OPTIONS if "parts" not in OPTIONS[name]])
def test_several_steps_at_once(name: str, lazy: bool) -> None:
    """In a single graph: the same bits as one by one, which they are where the average has not begun, or elsewhere."""
    states = []
    for b, cupy in backends(lazy=lazy):
        step, one = next(steps_with(b, **OPTIONS[name])), b.steps_at_once == 1
        cupy.device.counts.clear()
        for seed in range(6):
            rng = np.random.default_rng(seed)
            arrays = [rng.standard_normal((24, 4)), rng.integers(0, 2, 24), np.arange(24), rng.uniform(0, 2, 24)]
            kept = [b.to_device(x.astype(np.float32) if x.dtype.kind == "f" else x) for x in arrays]
            if seed == 0:
                batch = Batch(*kept[:3], weights=kept[3] if name.startswith("weights") else None, steps=3)
            elif seed < 5:
                for old, new in zip(
                    batch.arrays, [*kept[:2], *kept[3:][: len(batch.filled) - 2], kept[2]], strict=True
                ):
                    b.copy(new, old)
            else:
                batch = Batch(*kept[:3], weights=kept[3] if name.startswith("weights") else None, steps=3)
            for each in batch.of_steps() if one else [batch]:
                step(each)
        assert step.optimizer.steps == 1 + 6 * 3
        assert b.to_host(step._steps)[0] == step.optimizer.steps
        if not one:
            assert cupy.device.counts["graphs"] >= 4
        states.append(state_of(step))
    assert_same_bits(*states)


def test_a_replay_of_several_steps_costs_one_copy() -> None:
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend()
    step = make_step(b, "squared_error", "adam", rate=linear(0.1, 0.01, 99))
    batch = Batch(b.zeros((40, 3), "float64"), b.zeros((40, 2), "float64"), b.zeros((40,), np.int64), steps=5)
    for _ in range(2):
        step(batch)
    cupy.device.counts.clear()
    step(batch)
    assert (cupy.device.counts.pop("launches") - 1) % 5 == 0  # the copy, and five times the same
    assert cupy.device.counts == {"graphs": 1, "asynchronous copies": 1}


TRAININGS: dict[str, dict[str, Any]] = {
    "generated": {"data": {"residency": "host"}},
    "in order": {"data": {"residency": "host"}, "train": {"sampling": "ordered"}},
    "drawn": {"train": {"sampling": "replacement"}},
    "windows": {"data": {"residency": "host", "block_rows": 50, "window_blocks": 4}},
    "average and noise": {"train": {"average_decay": 0.9}, "regularisation": {"dropout": 0.3, "clip_norm": 0.1}},
    "a schedule": {"schedule": {"kind": "cosine", "warmup_steps": 30}, "optimizer": {"kind": "adam"}},
    "often": {"train": {"log_every": 7}},
    "parts": {"train": {"part_rows": 3}},
    "shards": {"train": {"shards": 4}, "regularisation": {"dropout": 0.3}},
    "shards, in parts": {"train": {"shards": 2, "part_rows": 3}},
    "a plateau": {"schedule": {"kind": "plateau", "patience": 0, "factor": 0.5}, "train": {"log_every": 25}},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings(name: str) -> None:
    """Lines and parameters of three epochs of 62 steps and a shorter one, also where they pause and go on."""
    results = []
    for b, cupy in backends():
        sections = {section: dict(keys) for section, keys in TRAININGS[name].items()}
        tables = {
            "name": "graphs",
            "data": {"kind": "double-moon", "rows": 500, "validation_rows": 20} | sections.pop("data", {}),
            "network": {"hidden": [4]},
            "optimizer": {"kind": "momentum", "learning_rate": 0.05} | sections.pop("optimizer", {}),
            "train": {"epochs": 3, "batch_size": 8} | sections.pop("train", {}),
        }
        trainer = Trainer(parse_config(tables | sections), b)
        lines, runs, asked = [], [], 0

        def stop() -> str:
            nonlocal asked
            asked += 1
            return "pause" if asked == 3 else ""

        while trainer.steps < trainer.total_steps:
            before = trainer.steps
            for line in trainer.run(stop, together=True):
                runs.append(trainer.steps - before)
                before = trainer.steps
                if line:
                    line.pop("seconds")
                    lines.append(line)
        assert max(runs) == (b.steps_at_once if name not in ("often", "parts", "shards", "shards, in parts") else 1)
        assert sum(runs) == trainer.total_steps == trainer.step.optimizer.steps
        average = trainer.average.network.parameters if trainer.average else trainer.model.network.parameters
        results.append((lines, [b.to_host(x) for x in (trainer.model.network.parameters, average)]))
        assert (cupy.device.counts["graphs"] > 0) == (len(results) == 1)
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])


def test_a_divergence_within_a_replay() -> None:
    """It is told as of its own step, whatever the number of steps that are taken at once."""
    messages = []
    for b, _ in backends():
        tables = {
            "name": "graphs",
            "data": {"kind": "friedman1", "rows": 400},
            "network": {"hidden": [4], "activation": "identity"},
            "optimizer": {"kind": "sgd", "learning_rate": 0.15},
            "train": {"epochs": 9, "batch_size": 4, "precision": "float32"},
        }
        trainer = Trainer(parse_config(tables), b)
        with pytest.raises(Diverged) as caught:
            list(trainer.run(together=True))
        messages.append((str(caught.value), b.to_host(trainer.model.network.parameters).tobytes(), trainer.steps))
    assert messages[0] == messages[1]


def test_batches_from_ever_other_arrays() -> None:
    """They are copied to where a graph finds them."""
    states = []
    for b, cupy in backends():
        step = make_step(b, "squared_error", "momentum")
        for rows in 3 * ROWS:  # more than are worked on where they lie
            step(make_batch(b, "squared_error", rows))
        assert (cupy.device.counts["graphs"] > 3) == (not states)
        states.append(state_of(step))
    assert_same_bits(*states)


def test_going_back_after_a_divergence() -> None:
    """The flag stops a replay too; then steps are counted from an earlier one, at half the rate."""
    states = []
    for b, _ in backends():
        step = make_step(b, "squared_error", "adam", rate=linear(0.1, 0.01, 20))
        batch = make_batch(b, "squared_error", 8)
        for _ in range(4):
            step(batch)
        before = state_of(step)[0]
        batch.inputs[0] = np.inf
        for _ in range(3):
            step(batch)
        assert step.diverged() == 5
        assert_same_bits([before], state_of(step)[:1])
        batch.inputs[0] = 0.5
        step.reset_flag()
        step.optimizer.steps, step.optimizer.rate_factor = 2, 0.5
        for _ in range(4):
            step(batch)
        assert step.diverged() is None
        assert b.to_host(step._steps)[0] == 6
        states.append(state_of(step))
    assert_same_bits(*states)


def test_what_others_ask_of_the_device_keeps_its_place() -> None:
    """On the stream that is the current one, whichever it is; between replays as between steps."""
    states = []
    for b, cupy in backends(lazy=True):
        step, batch = make_step(b, "squared_error", "sgd"), make_batch(b, "squared_error", 8)
        parameters = step.objective.network.parameters
        for _ in range(4):
            step(batch)
            parameters *= 0.5
        b.synchronize()
        with cupy.cuda.Stream():
            for _ in range(2):
                step(batch)
                parameters *= 0.5
            states.append(state_of(step))
    assert_same_bits(*states)
