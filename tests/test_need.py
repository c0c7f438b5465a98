"""What a training needs of the memory: what is worked out is what is made, and what is said to fit does fit."""

from __future__ import annotations

import json
import re
import tracemalloc
import weakref
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_bp import (
    NumpyBackend,
    Source,
    Task,
    Trainer,
    UserError,
    dump_config,
    load_data,
    memory,
    parse_config,
    registry,
)
from gpu_bp.build import network_of_zeros
from gpu_bp.cli import main
from gpu_bp.config import Config
from gpu_bp.data import Dataset, own_data
from gpu_bp.data.source import Batch
from gpu_bp.initial import host_bytes
from gpu_bp.ranks import Ranks


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
            for kept in self._scratch_of.values()
            for scratch in kept.values()
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
    "shards": {"train": {"shards": 8}},
    "shards of a batch of parts": {"train": {"shards": 4, "part_rows": 60}, "regularisation": {"input_noise": 0.1}},
    "more shards than rows": {"train": {"shards": 32, "batch_size": 20}},
    "more shards than parts": {"train": {"shards": 32, "batch_size": 20, "part_rows": 2}},
    "shards of classes that weigh": {
        "data": {"kind": "double-moon"},
        "loss": {"kind": "cross_entropy", "class_weight": "balanced"},
        "train": {"shards": 2},
    },
    "average": {"train": {"average_decay": 0.9}},
    "stopping": {"stopping": {"patience": 3}},
    "clip and limit": {"regularisation": {"clip_norm": 1.0, "max_norm": 3.0, "weight_decay": 0.1}},
    "generated, shuffled": {"data": {"residency": "host"}},
    "generated, small blocks": {"data": {"residency": "host", "block_rows": 50, "window_blocks": 4}},
    "generated, in order": {"data": {"residency": "host"}, "train": {"sampling": "ordered"}},
    "generated, drawn": {"data": {"residency": "host"}, "train": {"sampling": "replacement"}},
    "drawn": {"train": {"sampling": "replacement", "batch_size": 10_000}},
    "scaled targets": {"data": {"target_scaling": "standardise"}},
    "quantiles": {"loss": {"kind": "quantile", "levels": [0.1, 0.5, 0.9]}, "train": {"metrics": ["mae"]}},
    "classes": {
        "data": {"kind": "double-moon"},
        "loss": {"kind": "cross_entropy"},
        "train": {"metrics": ["macro_f1", "auc"]},
    },
    "classes that weigh": {
        "data": {"kind": "double-moon"},
        "loss": {"kind": "cross_entropy", "class_weight": "balanced"},
    },
} | {name: {"optimizer": {"kind": name}, "train": {"batch_size": 5000}} for name in registry.UPDATES}


def make(**sections: Any) -> Config:
    """A config of generated data, some sections changed."""
    kind = {} if "kind" in sections.get("data", {}) else {"kind": "teacher", "n_inputs": 12, "hidden": [30]}
    rows = {"rows": 5000, "validation_rows": 700, "test_rows": 300}
    tables: dict[str, dict[str, Any]] = {
        "data": rows | kind,
        "network": {"hidden": [20, 10]},
        "optimizer": {"kind": "sgd", "learning_rate": 1e-3},
        "train": {"steps": 12, "batch_size": 500},
    }
    made = tables | {name: tables.get(name, {}) | section for name, section in sections.items()}
    if made["data"]["kind"] == "own":
        made["data"] = {key: value for key, value in made["data"].items() if key not in rows}
    return parse_config({"name": "need", **made})


def trained(config: Config, dataset: Dataset, backend: Any, ranks: Ranks | None = None) -> Trainer:
    """A training of one epoch and a bit, evaluated: all that it ever makes is there."""
    trainer = Trainer(config, backend, dataset, ranks)
    for _ in islice(trainer.run(together=True), 12):
        pass
    trainer.evaluate()
    trainer.evaluate_average()
    return trainer


def check(config: Config, dataset: Dataset, backend: Measured, ranks: Ranks | None = None) -> None:
    """To the byte what is made; and more, but not much more, than the backend keeps for itself."""
    before = backend.used
    need = memory.estimate(config, dataset, backend, ranks)
    assert backend.used == before, "nothing is made"
    trainer = trained(config, dataset, backend, ranks)
    apart = sum(need.device.get(name, 0) for name in ("scratch", "checkpoint", "initial weights"))
    assert need.total - apart == backend.used - before
    assert backend.scratch <= need.device["scratch"]
    network, optimizer = trainer.model.network, trainer.step.optimizer
    copies = 1 + len(optimizer.state) + bool(trainer.average)
    copies += (1 + bool(trainer.average)) * bool(trainer.selection)
    assert need.device["checkpoint"] == copies * network.parameters.nbytes
    assert need.n_parameters == sum(tensor.size for tensor in network.tensors().values())
    assert (need.steps, need.data) == (trainer.total_steps, trainer.where_data)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_counted_is_made(name: str) -> None:
    backend, parsed = Measured(), make(**OPTIONS[name])
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
def test_rows_of_the_host(block_rows: int, residency: str, sampling: str) -> None:
    """Windows, and rows that are read ahead into memory of their own."""
    windows = {"window_blocks": 3} if block_rows > 1 else {}
    parsed = make(
        data={"kind": "own", "residency": residency, **windows},
        loss={"kind": "cross_entropy"},
        train={"sampling": sampling},
    )
    backend = Measured()
    sources = {"train": Weighed(5000, block_rows), "validation": Weighed(700, block_rows)}
    check(parsed, own_data(sources, parsed.loss.record(), backend), backend)


@pytest.mark.parametrize(("hidden", "rows"), [([1500, 1500], 50), ([100], 600_000)])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_peak(hidden: list[int], rows: int, kind: str) -> None:
    """Python's and NumPy's own count of all memory, from before the training to its third step, is within 8 %.

    Of a large network and few rows, the peak may be the drawing of the weights; a checkpoint is not written here.
    """
    parsed = make(
        data={"rows": rows, "validation_rows": 10, "test_rows": 0},
        network={"hidden": hidden},
        optimizer={"kind": kind},
        train={"batch_size": rows},
    )
    backend = NumpyBackend()
    dataset = load_data(parsed, backend=backend)
    need = memory.estimate(parsed, dataset, backend).device
    assert ("initial weights" in need) == (kind == "sgd" and rows == 50)
    steady = sum(need.values()) - need.get("initial weights", 0) - need["checkpoint"]
    expected = max(steady, need["parameters"] + host_bytes(network_of_zeros(parsed, dataset, backend)))
    tracemalloc.start()
    trainer = Trainer(parsed, backend, dataset)
    for _ in islice(trainer.run(), 3):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak == pytest.approx(expected, rel=0.08)


DEVICE = ["everything", "generated, shuffled", "generated, in order", "classes that weigh"]
LOW = [("everything", precision) for precision in ("tf32", "bfloat16", "float16")] + [("without biases", "bfloat16")]


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "precision"), [*((name, "float32") for name in (*DEVICE, "rows of the host")), *LOW])
def test_on_a_device(name: str, precision: str) -> None:
    """All that the backend has on the device is at most 3 % less; and the host's memory that it copies from."""
    from cuda_on_cpu.backend import cupy_backend_module
    from cuda_on_cpu.fake_cupy import FakeCupy

    cupy = FakeCupy()
    backend = cupy_backend_module(cupy).CupyBackend()
    if name == "rows of the host":
        data = {"kind": "own", "residency": "host", "window_blocks": 3}
        parsed = make(data=data, loss={"kind": "cross_entropy"})
        dataset = own_data({"train": Weighed(5000, 100)}, parsed.loss.record(), backend)
    else:
        options = OPTIONS[name]
        parsed = make(**{**options, "train": {**options.get("train", {}), "precision": precision}})
        dataset = load_data(parsed, backend=backend)
    device = cupy.device
    free = backend.free_bytes()  # without the workspace of the products, which is there now
    used, pinned = device.used_bytes, device.pinned_bytes
    need = memory.estimate(parsed, dataset, backend)
    assert (device.used_bytes, device.pinned_bytes) == (used, pinned), "nothing is made"
    trainer = trained(parsed, dataset, backend)
    assert 0.97 * need.total <= device.used_bytes - used <= need.total
    assert free - backend.free_bytes() == device.used_bytes - used
    staged = sum(need.host.values()) - need.host["checkpoint"] - need.host.get("initial weights", 0)
    scalars = trainer.step.optimizer._numbers._rows.nbytes
    assert device.pinned_bytes - pinned - scalars == staged
    assert (staged > 0) == (name == "rows of the host")
    assert trainer.steps == 12


@pytest.mark.kernels
def test_free_memory_of_a_device() -> None:
    """What the device has, with what CuPy keeps for later; and no more than CuPy was allowed."""
    from cuda_on_cpu.backend import cupy_backend_module
    from cuda_on_cpu.fake_cupy import FakeCupy

    cupy, limits = FakeCupy(), [0, 1000, 10_000]
    backend = cupy_backend_module(cupy).CupyBackend()
    cupy.cuda.runtime.memGetInfo = lambda: (5000, 8000)
    pools = [
        SimpleNamespace(free_bytes=lambda: 200, used_bytes=lambda: 700, get_limit=lambda limit=limit: limit)
        for limit in limits
    ]
    for pool, expected in zip(pools, (5200, 300, 5200), strict=True):
        cupy.get_default_memory_pool = lambda pool=pool: pool  # type: ignore[method-assign]
        assert backend.free_bytes() == expected


# what does not fit ---------------------------------------------------------------------------------------------------


def proposals(message: str) -> list[list[str]]:
    """The overrides that a line says would fit."""
    text = message.partition("; ")[2].removesuffix(" would fit").replace(" (the same but for rounding)", "")
    return [change.replace(" = ", "=").split(" with ") for change in text.split(" or ")]


def changed(config: Config, change: list[str]) -> Config:
    """A config with overrides."""
    tables = config.model_dump(exclude_none=True)
    for assignment in change:
        (section, key), value = assignment.split("=")[0].split("."), assignment.split("=")[1]
        tables[section][key] = json.loads(value)
    return parse_config(tables)


def start(config: Config, budget: int) -> None:
    """The first step of a training that has so much memory."""
    backend = Measured(budget)
    next(Trainer(config, backend, load_data(config, backend=backend)).run())


LARGE: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "a batch": (
        {"data": {"rows": 2_400_000, "residency": "host"}, "train": {"batch_size": 2_400_000}},
        [["train.part_rows"], ["train.batch_size"]],
    ),
    "parts": (
        {"data": {"rows": 2_400_000, "residency": "host"}, "train": {"batch_size": 2_400_000, "part_rows": 1_800_000}},
        [["train.part_rows"], ["train.batch_size"]],
    ),
    "all rows": (
        {
            "data": {"rows": 2_400_000, "residency": "host"},
            "optimizer": {"kind": "rprop"},
            "train": {"batch_size": 2_400_000},
        },
        [["train.part_rows"]],
    ),
    "shards": (
        {
            "data": {"rows": 2_400_000, "residency": "host"},
            "train": {"batch_size": 2_400_000, "shards": 4},
        },
        [["train.part_rows"], ["train.batch_size"]],
    ),
    "rows": ({"data": {"rows": 2_000_000, "residency": "device"}}, [["data.residency"]]),
    "both": (
        {"data": {"rows": 2_000_000, "residency": "device"}, "train": {"batch_size": 1_900_000}},
        [["data.residency", "train.part_rows"], ["data.residency", "train.batch_size"]],
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_proposed_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And half as many rows again do not, where nobody asks beforehand."""
    sections, expected = LARGE[name]
    parsed, budget = make(**sections), 80 * 2**20
    with pytest.raises(UserError, match=r"the training needs .* 80.0 MiB are free and .* are missing; ") as caught:
        start(parsed, budget)
    assert "\n" not in str(caught.value)
    found = proposals(str(caught.value))
    assert [[part.partition("=")[0] for part in change] for change in found] == expected
    for change in found:
        start(changed(parsed, change), budget)
    monkeypatch.setattr("gpu_bp.trainer.refuse_too_large", lambda *_: None)
    for change in found:
        key, _, number = change[-1].partition("=")
        if number.isdigit():
            with pytest.raises((MemoryError, UserError)):
                start(changed(parsed, [*change[:-1], f"{key}={int(number) * 3 // 2}"]), budget)
    with pytest.raises((MemoryError, UserError)):
        start(parsed, budget)


@given(budget=st.integers(2**21, 2**26), n_rows=st.integers(1, 10**6), hidden=st.lists(st.integers(1, 99), max_size=3))
def test_the_largest_is_proposed(budget: int, n_rows: int, hidden: list[int]) -> None:
    """It leaves a twentieth of the memory free, and one row more does not."""
    train = {"batch_size": n_rows, "average_decay": 0.9}
    parsed = make(data={"rows": 10**6, "residency": "host"}, network={"hidden": hidden}, train=train)
    backend = Measured(budget)
    dataset = load_data(parsed, backend=backend)
    need = memory.estimate(parsed, dataset, backend)
    message = memory.too_large(parsed, dataset, backend, need, budget)
    assert bool(message) == (need.total > budget)
    if not message or "only a smaller network" in message:
        return
    for change in proposals(message):
        key, _, number = change[0].partition("=")
        needs = [
            memory.estimate(changed(parsed, [f"{key}={n}"]), dataset, backend).total
            for n in (int(number), int(number) + 1)
        ]
        assert needs[0] <= 0.95 * budget < needs[1]


def test_no_batch_is_small_enough() -> None:
    parsed = make(network={"hidden": [1000, 1000]}, optimizer={"kind": "adam"})
    with pytest.raises(UserError, match=r"no batch is small enough: a single row needs (.*) MiB, 15.5 MiB") as caught:
        start(parsed, 10 * 2**20)
    least = re.search(r"a single row needs (.*?) MiB", str(caught.value))
    assert least
    start(changed(parsed, ["train.batch_size=1", "train.steps=1"]), int(float(least[1]) * 2**20) + 2**20)


def test_out_of_memory_at_a_step() -> None:
    """Where others take what was free: less than was needed is there, and what is proposed fits into that."""
    sections = {"data": {"rows": 2_400_000, "residency": "host"}, "network": {"hidden": [200, 200]}}
    parsed = make(**sections, train={"batch_size": 800_000, "part_rows": 400_000})
    backend = Measured()
    dataset = load_data(parsed, backend=backend)
    trainer = Trainer(parsed, backend, dataset)
    backend.budget = backend.used + 1_000_000  # the arrays of a step are yet to come
    with pytest.raises(MemoryError):
        next(trainer.run())
    budget, error = backend.budget, memory.out_of_memory(parsed, dataset, backend, trainer.steps)
    assert re.match(
        r"out of memory at step 0: the training needs about .*, and about .* were there for it; ", str(error)
    )
    for change in proposals(str(error)):
        start(changed(parsed, change), budget)
    backend.budget = 2**62  # free, but in pieces: less was there than is needed
    again = str(memory.out_of_memory(parsed, dataset, backend, trainer.steps))
    needed = memory.size(memory.estimate(parsed, dataset, backend).total)
    assert f"needs about {needed}, and about {needed} were there" in again
    assert all(0 < int(change[0].partition("=")[2]) < 400_000 for change in proposals(again))


def test_info(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a training will need, and whether it fits; nothing large is made for it."""

    def info(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main(["info", "need.toml", "--backend", "numpy", *arguments])
        return int(exited.value.code or 0), *capsys.readouterr()

    (in_tmp / "need.toml").write_text(dump_config(make(optimizer={"kind": "adam"})))
    status, out, err = info("--json")
    assert (status, err) == (0, "")
    facts = json.loads(out)
    assert facts["widths"] == [12, 20, 10, 1]
    assert facts["n_parameters"] == 12 * 20 + 20 + 20 * 10 + 10 + 10 + 1
    assert (facts["steps"], facts["steps_per_epoch"], facts["fits"]) == (12, 10, True)
    assert facts["total"] == sum(facts["device"].values()) < facts["free"]
    status, out, err = info("train.epochs=2", "train.steps=12")
    assert (status, out) == (2, "")
    status, out, err = info()
    assert (status, err) == (0, "")
    for name in (
        "network: 12 - 20 - 10 - 1, 481 parameters",
        "steps: 12, 10 an epoch",
        "data: 6,000 rows",
        *facts["device"],
    ):
        assert re.search(f"^{name}", out, re.M), name

    tracemalloc.start()
    status, out, err = info("network.hidden=[1000000,1000000]", "data.rows=1000000000", "data.residency=device")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status == 2
    assert peak < 100 * 2**20
    assert re.search(r"^in all +[\d.]+ TiB$", out, re.M)
    assert err.startswith("error: the training needs ")
    assert err.count("\n") == 1


def test_sizes_are_readable() -> None:
    numbers = [100, 2**20, 1.5 * 2**30, 12 * 2**40]
    assert [memory.size(int(n)) for n in numbers] == ["0.1 KiB", "1.0 MiB", "1.50 GiB", "12.00 TiB"]
