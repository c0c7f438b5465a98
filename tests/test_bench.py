"""`gpu-bp bench`: what is counted is what is done, to the right phase, and nothing is changed by it."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tomli_w
from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.device import CaptureError
from cuda_on_cpu.fake_cupy import FakeCupy

from gpu_bp import NumpyBackend, Trainer, UserError, evaluation, parse_config, registry
from gpu_bp import bench as module
from gpu_bp.backends import Backend
from gpu_bp.backends.base import Division
from gpu_bp.bench import Bench, Peak, bench, measure_peak, plain_steps
from gpu_bp.cli import main
from gpu_bp.timing import OPERATIONS, PHASES, UNTIMED, Spent, Timing

Tiny = Callable[..., dict[str, Any]]

# By name: sections of a config that differ from the tiny one.
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "data": {"kind": "gaussian-blobs", "n_classes": 2},
        "network": {"hidden": [5, 5], "normalise": True, "residual": True},
        "loss": {"kind": "cross_entropy", "class_weight": {"0": 3.0}},
        "optimizer": {"kind": "adam", "learning_rate": 0.01},
        "regularisation": {"dropout": 0.2, "input_noise": 0.1, "clip_norm": 1.0, "max_norm": 1.0, "l2": 0.01},
        "train": {"average_decay": 0.9, "part_rows": 5},
    },
    "by windows": {"data": {"residency": "host", "block_rows": 4, "window_blocks": 3}},
    "replacement": {"train": {"sampling": "replacement"}},
    "shards": {"train": {"shards": 2}},
    "shards, in parts": {"train": {"shards": 2, "part_rows": 3}, "regularisation": {"dropout": 0.2}},
}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can do is tried out on small arrays."""
    monkeypatch.setattr(module, "MATRICES", (4, 8))
    monkeypatch.setattr(module, "SUMMED", 4096)


def timed(config: dict[str, Any], backend: Backend) -> tuple[Trainer, Timing]:
    timing = Timing(backend)
    return Trainer(parse_config(config), cast(Backend, timing)), timing


class Ticking(NumpyBackend):
    """A backend whose clock goes on by a second whenever somebody looks at it."""

    now = 0

    def mark(self) -> float:
        self.now += 1
        return self.now


# What is counted -----------------------------------------------------------------------------------------------------


def test_every_operation_is_timed_or_known_not_to_be() -> None:
    methods = {name: value for name, value in vars(Backend).items() if inspect.isfunction(value) and name[0] != "_"}
    assert sorted([*OPERATIONS, *UNTIMED]) == sorted(methods)
    for name, (phase, *names) in OPERATIONS.items():
        assert phase in PHASES
        assert set(" ".join(names).split()) <= set(inspect.signature(methods[name]).parameters), name


def test_a_step_by_hand(backend: Backend, tiny_config: Tiny) -> None:
    """2 inputs, 5 hidden units, 1 output, 8 rows, in float32; the network's arrays are v in place of the outputs."""
    trainer, timing = timed(tiny_config(), backend)
    steps = plain_steps(trainer, timing)
    next(steps)
    timing.settle()
    spent, item, size = timing.spent, 4, trainer.model.network.layout.size
    assert trainer.model.network.widths == [2, 5, 1]
    assert {name: x.flop for name, x in spent.items()} == {
        "data": 0,
        "forward": 2 * 8 * (2 * 5 + 5 * 1),
        "delta": 2 * 8 * 5 * 1,
        "backward": 2 * 8 * (2 * 5 + 5 * 1),
        "update": 0,
    }
    layers = (8 * 2 + 5 * 2 + 5 + 8 * 5) + (8 * 5 + 1 * 5 + 1 + 8 * 1)  # product, biases and activation in one
    assert spent["forward"].n_bytes == item * layers
    loss = 2 * 8 + 2 * 8 + 8  # output and target, losses and delta; then the losses are added up
    hidden = (8 * 1 + 1 * 5 + 8 * 5) + 3 * 8 * 5  # the product; error, output and delta
    assert spent["delta"].n_bytes == item * (loss + hidden)
    gradients = (8 * 1 + 8 * 5 + 1 * 5 + 1) + (8 * 5 + 8 * 2 + 5 * 2 + 5)  # of weights and biases in one
    assert spent["backward"].n_bytes == item * gradients
    assert spent["update"].n_bytes == item * (size + 2 * size + size) + 8  # watch; update; the steps are counted
    assert all(x.seconds > 0 for x in spent.values())
    for _ in range(6):  # to the epoch's end, the last step with 2 rows
        next(steps)
    assert spent["forward"].flop == 2 * 50 * (2 * 5 + 5 * 1)
    assert spent["delta"].flop == 2 * 50 * 5 * 1


def test_bytes_by_hand(backend: Backend) -> None:
    """Each array that is read or written once, in one of them both."""
    timing = Timing(backend)
    on = cast(Backend, timing)
    v, y, d, losses, e = (on.zeros((6, 4), np.float32) for _ in range(5))
    biases, rows, table = on.zeros((4,), np.float32), on.zeros((6,), np.int64), on.zeros((1000, 4), np.float32)
    tanh, weights, n, square, bias = (
        registry.activation("tanh"),
        on.zeros((4, 4), np.float32),
        6 * 4 * 4,
        4 * 4 * 4,
        4 * 4,
    )
    fused, free = registry.loss("binary_cross_entropy"), registry.loss("squared_error")
    cases: list[tuple[Callable[[], None], int]] = [
        (lambda: on.add(v, y, d), 3 * n),
        (lambda: on.add(v, y, v), 3 * n),
        (lambda: on.add(v, v, v), 2 * n),
        (lambda: on.gather(table, rows, y), 6 * 8 + 2 * n),
        (lambda: on.dense(tanh, d, weights, None, v, v), 2 * n + square),
        (lambda: on.dense(tanh, d, weights, biases, v, y), 3 * n + square + bias),
        (lambda: on.dense(None, d, weights, biases, v, y), 2 * n + square + bias),
        (lambda: on.dense_gradients(d, v, weights, None), 2 * n + square),
        (lambda: on.dense_gradients(d, v, weights, biases), 2 * n + square + bias),
        (lambda: on.activate(tanh, v, None, v), 2 * n),
        (lambda: on.activate(tanh, v, None, y), 2 * n),
        (lambda: on.activate(tanh, v, biases, v), 2 * n + bias),
        (lambda: on.activate(tanh, v, biases, y), 3 * n + bias),
        (lambda: on.output_delta(free, tanh, v, d, y, losses, e), 4 * n),
        (lambda: on.output_delta(fused, registry.activation("logistic"), v, d, y, losses, e), 5 * n),
    ]
    for call, n_bytes in cases:
        timing.reset()
        call()
        assert not any(x.n_bytes for x in timing.spent.values())  # outside of a step nothing is booked
        with timing.part("computation"):
            call()
        assert sum(x.n_bytes for x in timing.spent.values()) == n_bytes
        timing.reset()
        with timing.part("data"):  # such as by a source of one's own
            call()
        assert timing.spent["data"].n_bytes == n_bytes


def test_a_step_is_not_cut() -> None:
    assert Timing(NumpyBackend()).division([4096, 4096], 2**20) == Division(2**20, 1)


def test_what_belongs_to_which_phase(backend: Backend, tiny_config: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a training that has everything, an epoch."""
    found: dict[str, set[str]] = {phase: set() for phase in PHASES}
    of = Timing._call

    def noted(self: Timing, name: str, given: Any) -> Any:
        call = of(self, name, given)
        found[call.phase].add(name)
        return call

    monkeypatch.setattr(Timing, "_call", noted)
    trainer, timed_backend = timed(tiny_config(**TRAININGS["everything"]), backend)
    for _ in islice(plain_steps(trainer, timed_backend), trainer.batches.per_epoch):
        pass
    assert found == {
        "data": {"gather", "permute"},
        "forward": {"dense", "matmul", "normalise", "activate", "dropout", "input_noise", "add"},
        "delta": {
            "output_delta",
            "class_weights",
            "weigh",
            "accumulate",
            "matmul",
            "hidden_delta",
            "normalise_delta",
            "dropout",
            "add",
        },
        "backward": {"dense_gradients", "column_sums", "column_dots", "add"},
        "update": {"fill", "accumulate", "step_factor", "watch", "update", "limit_norms", "average", "advance"},
    }


# Seconds a step of the tiny config on `Ticking`: one an operation, and one for what follows the last of a part.
TICKS = {
    "data": 2 + 1,  # two gathers
    "forward": 2,  # a layer each
    "delta": 2 + 2,  # output_delta and the sum of the losses; a product and hidden_delta
    "backward": 2,  # a layer each
    "update": 3 + 1,  # watch, update, and the steps are counted
}


def test_the_booking_is_not_counted(tiny_config: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, book = Ticking(), Timing._book
    trainer, timing = timed(tiny_config(), backend)

    def slow(self: Timing, call: Any, end: Any) -> None:
        backend.now += 100
        book(self, call, end)

    steps = plain_steps(trainer, timing)
    next(steps)  # with it the order of the rows is computed
    monkeypatch.setattr(Timing, "_book", slow)
    timing.reset()
    next(steps)
    timing.settle()
    assert {name: x.seconds for name, x in timing.spent.items()} == TICKS


@pytest.mark.parametrize("name", TRAININGS)
def test_the_training_is_the_same(backend: Backend, tiny_config: Tiny, name: str) -> None:
    config = tiny_config(**TRAININGS[name])
    plain = Trainer(parse_config(config), backend)
    n = plain.batches.per_epoch + 2
    with closing(plain.run()) as steps:
        for _ in islice(steps, n):
            pass
    trainer, timing = timed(config, backend)
    for _ in islice(plain_steps(trainer, timing), n):
        pass
    assert trainer.step.optimizer.steps == plain.step.optimizer.steps == n
    for key, tensor in plain.model.network.tensors().items():
        np.testing.assert_array_equal(trainer.model.network.tensors()[key], tensor)


# What is measured ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAININGS)
def test_bench(backend: Backend, tiny_config: Tiny, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing ends the training, and nothing is evaluated."""
    monkeypatch.setattr(evaluation.Evaluator, "__call__", None)
    config = tiny_config(**TRAININGS[name], stopping={"patience": 1})
    config["train"] |= {"epochs": 1, "log_every": 1, "stop_at_errors": 50}
    result = bench(parse_config(config), backend, seconds=0)
    assert 1 <= result.steps <= backend.steps_at_once
    assert 0 < result.rows <= 8 * result.steps
    assert result.batch_size == 8
    assert list(result.phases) == list(PHASES)
    assert sum(map(result.share, PHASES)) == pytest.approx(1)
    assert all(0 < result.share(phase) < 1 for phase in PHASES)
    assert result.seconds > 0
    assert result.peak.matrices in (4, 8)
    json.dumps(result.to_json())


def test_by_a_clock(tiny_config: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each step takes a second of the host's: as many as were asked for, and half as many apart."""
    clock = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    result = bench(parse_config(tiny_config()), Ticking(), seconds=6)
    assert (result.steps, result.seconds) == (6, 7)  # one to wait for the device
    assert result.rows == 3 * 8 + 2 + 2 * 8  # after three that do not count; the seventh has the last two rows of 50
    assert {name: x.seconds for name, x in result.phases.items()} == TICKS
    assert result.phases["forward"].flop == 2 * 8 * (2 * 5 + 5 * 1)


def test_rates_by_hand() -> None:
    phases = {name: Spent(0.001, 0, 4e6) for name in PHASES} | {"forward": Spent(0.004, 1e8, 2e6)}
    result = Bench(
        backend="numpy",
        device="a processor",
        libraries={"threads": 2},
        precision="float32",
        data="data: some",
        batch_size=50,
        steps=10,
        rows=490,
        seconds=0.05,
        phases=phases,
        peak=Peak(flops=1e11, matrices=8, bytes_per_second=1e10, array_bytes=2**20),
    )
    facts = result.to_json()
    assert facts["rows_per_second"] == pytest.approx(9800)
    forward, data, step = facts["phases"]["forward"], facts["phases"]["data"], facts["step"]
    assert (forward["share"], data["share"]) == pytest.approx((0.5, 0.125))
    assert (forward["flops"], forward["flops_of_peak"]) == pytest.approx((2.5e10, 0.25))
    assert (data["bytes_per_second"], data["bytes_of_peak"]) == pytest.approx((4e9, 0.4))
    assert step["seconds"] == pytest.approx(0.005)
    assert (step["flops_of_peak"], step["bytes_of_peak"]) == pytest.approx((0.2, 0.36))
    lines = result.lines()
    assert lines[0] == "a processor: float32, threads 2"
    assert lines[2] == "9,800 rows/s, 5 ms a step (batch_size 50, 10 steps)"
    rows = {line.split("  ")[0]: line.split()[-6:] for line in lines}
    assert rows["forward"] == ["4.0000", "50%", "25", "25%", "0.5", "5%"]
    assert rows["data"] == ["1.0000", "12%", "-", "-", "4", "40%"]
    assert rows["sum"] == ["8.0000", "100%", "12.5", "12%", "2.25", "22%"]
    assert rows["the step itself"][1:] == ["5.0000", "20", "20%", "3.6", "36%"]


@pytest.mark.parametrize(("free", "long", "matrices"), [(2**40, 2.0, 8), (2**40, 0.5, 4), (256, 2.0, 4)])
def test_peak_by_hand(monkeypatch: pytest.MonkeyPatch, free: int, long: float, matrices: int) -> None:
    """Where each call takes a second, the largest product is the fastest; it is as large as time and memory allow."""
    monkeypatch.setattr(module, "LONG", long)
    monkeypatch.setattr(Ticking, "free_bytes", lambda self: free)
    peak = measure_peak(Ticking(), "float32")
    n_bytes = min(4096, free // 6 // 4 * 4)
    assert peak == Peak(2 * matrices**3, matrices, 3 * n_bytes, n_bytes)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_sum_is_whole(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """By however many workers, all of it is computed."""
    added = []

    class Noting(NumpyBackend):
        def division(self, widths: Any, rows: int) -> Division:
            return Division(rows, workers)

        def together(self, actions: Any) -> None:
            for action in actions:
                action()

        def add(self, a: Any, b: Any, out: Any) -> None:
            super().add(a, b, out)
            added.append(out)

    measure_peak(Noting(), "float64")
    assert len(added) == workers
    assert sum(map(len, added)) == 4096 // 8
    assert all(out.all() for out in added)


def test_a_training_that_diverges(backend: Backend, tiny_config: Tiny) -> None:
    """Its steps change nothing any more, so they are not timed."""
    config = parse_config(tiny_config(optimizer={"learning_rate": 1e30}))
    with pytest.raises(UserError, match="diverged at step"):
        bench(config, backend, seconds=0)


@pytest.mark.kernels
def test_profile(tiny_config: Tiny) -> None:
    """On CUDA: a range a step, and in those that are taken apart one a part and an operation."""
    cupy = FakeCupy()
    backend = cupy_backend_module(cupy).CupyBackend()
    bench(parse_config(tiny_config()), backend, seconds=0)
    assert cupy.ranges == []
    bench(parse_config(tiny_config()), backend, seconds=0, profile=True)
    assert cupy.ranges.count("step") == module.WARM_UP + 1
    apart = "step, one operation at a time"
    found = [name.split("/")[1:] for name in cupy.ranges if name.startswith(apart)]
    assert found.count([]) == 1
    assert found.count(["data"]) == found.count(["computation"]) == 1
    names = ("dense", "matmul", "dense_gradients")
    assert [found.count(["computation", name]) for name in names] == [2, 1, 2]
    assert ["computation", "hidden_delta"] in found


@pytest.mark.kernels
def test_nobody_waits(tiny_config: Tiny) -> None:
    """On CUDA the times are read when they are settled: on a device as late as it may be, nobody waits before."""
    cupy = FakeCupy(lazy=True)
    trainer, timing = timed(tiny_config(), cupy_backend_module(cupy).CupyBackend())
    steps = plain_steps(trainer, timing)
    next(steps)
    timing.settle()
    before, waited = timing.spent["update"].seconds, cupy.device.counts["synchronisations"]
    next(steps)
    assert cupy.device.counts["synchronisations"] == waited
    assert timing.spent["update"].seconds == before
    timing.settle()
    assert timing.spent["update"].seconds > before


@pytest.mark.kernels
def test_events_of_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in CuPy there is no time between events that are not timed or that were not reached, nor in a graph."""
    cupy = FakeCupy(lazy=True)
    begin, end, untimed = cupy.cuda.Event(), cupy.cuda.Event(), cupy.cuda.Event(disable_timing=True)
    for event in (begin, untimed, end):
        event.record()
    with pytest.raises(RuntimeError, match="not reached"):
        cupy.cuda.get_elapsed_time(begin, end)
    end.synchronize()
    assert cupy.cuda.get_elapsed_time(begin, end) > 0
    with pytest.raises(RuntimeError, match="not timed"):
        cupy.cuda.get_elapsed_time(begin, untimed)
    monkeypatch.setattr(cupy.cuda, "get_elapsed_time", lambda begin, end: 250.0)  # milliseconds
    assert cupy_backend_module(cupy).CupyBackend().seconds(begin, end) == 0.25
    with cupy.cuda.Stream() as stream:
        stream.begin_capture()
        with pytest.raises(CaptureError, match="timed events"):
            begin.record()


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(in_tmp: Path, tiny_config: Tiny, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `gpu-bp bench` on the tiny config with these arguments: exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        (in_tmp / "tiny.toml").write_text(tomli_w.dumps(tiny_config()))
        with pytest.raises(SystemExit) as exited:
            main(["bench", "tiny.toml", "--seconds", "0", *arguments])
        captured = capsys.readouterr()
        return int(exited.value.code or 0), captured.out, captured.err

    return run


def test_the_command(run: Callable[..., tuple[int, str, str]], in_tmp: Path) -> None:
    status, out, err = run("train.batch_size=7", "--backend", "numpy")
    assert (status, err) == (0, "")
    assert out.startswith("numpy backend, as asked\n")
    assert "(batch_size 7, 1 steps)" in out
    for name in ("phase", *PHASES, "sum", "the step itself"):
        assert f"\n{name} " in out
    facts = json.loads(run("--json", "--backend", "numpy")[1])
    assert list(facts["phases"]) == list(PHASES)
    assert list(in_tmp.iterdir()) == [in_tmp / "tiny.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "--backend", "numpy"], "NumPy has not: it needs CUDA"),
        (["train.batchsize=3"], "batch_size"),
        (["optimizer.learning_rate=1e30", "train.epochs=5000"], "the training diverged at step"),
        (["--seconds", "-1"], "seconds"),
        (["--seconds", "nan"], "seconds"),
    ],
)
def test_errors(run: Callable[..., tuple[int, str, str]], arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
