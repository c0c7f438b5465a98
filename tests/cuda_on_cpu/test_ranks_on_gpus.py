"""Several ranks with a GPU each, or with one for two, on the stand-in: the bits of one rank, and nobody waits."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import Moments, moments, tables, write_data

from benchmarks import ranks
from benchmarks.peers.cells import Cell
from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.device import Capture, Wait
from cuda_on_cpu.fake_cupy import FakeCupy
from cuda_on_cpu.fake_nccl import FakeNccl, NcclError
from cuda_on_cpu.on_threads import Job, ThreadRanks
from cuda_on_cpu.steps import assert_same_bits, state_of
from gpu_bp import Batch, Network, Objective, Optimizer, Sharding, Step, Trainer, UserError, parse_config, registry
from gpu_bp.exchange import Exchange, ThroughHost
from gpu_bp.network import layout_of
from gpu_bp.ranks import Alone
from gpu_bp.schedule import constant
from gpu_bp.sharded_gradient import ready
from gpu_bp.tree_sum import halving

pytestmark = pytest.mark.kernels

SHARDS, ROWS = 8, 13
NAMES = ("noise", "plateau", "replacement", "generated", "ordered", "files", "own")


def of_training(name: str, folder: Path) -> Callable[[Any, Any], Moments]:
    """All that is to be seen after every step of a training."""
    config = parse_config(tables(name, folder, train={"shards": SHARDS}))
    return lambda backend, ranks: moments(Trainer(config, backend, ranks=ranks))


@pytest.mark.parametrize("name", NAMES)
def test_every_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NCCL, each layer for itself, the device as late as it may be or not; and through the host's memory."""
    monkeypatch.setattr("gpu_bp.sharded_gradient.TOGETHER", 1)
    write_data(tmp_path)
    train = of_training(name, tmp_path)
    alone = train(cupy_backend_module().CupyBackend(), Alone())
    for job in (Job(2), Job(4, lazy=True), Job(2, shared=True)):
        for seen in job.run(train):
            assert seen == alone
        assert all(cupy.device.counts["graphs"] > 0 for cupy in job.cupys)


# A step by itself --------------------------------------------------------------------------------------------------


def step_of(backend: Any, rank: int, size: int, exchange: Exchange | None, **options: Any) -> tuple[Step, list[Batch]]:
    """A step of this rank's shards, and its batches of 13 rows and of 3, which are too few for all."""
    network = Network([4, 6, 6, 2], ["tanh", "silu", "identity"], backend=backend)
    rng = np.random.default_rng(0)
    network.load({name: 0.6 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    objective = Objective(network, registry.loss("squared_error"), ROWS)
    optimizer = Optimizer(registry.update("adam"), network, constant(0.1))
    sharding = Sharding.of_rank(SHARDS, 1, rank, size)
    x, d = (rng.standard_normal((ROWS, width)).astype(np.float32) for width in (4, 2))
    batches = []
    for n in (ROWS, 3):
        first, end = sharding.rows(n)
        own = [backend.to_device(array[first:end]) for array in (x, d, np.arange(ROWS))]
        batches.append(Batch(*own, place=first, rows_in_step=n))
    return Step(objective, optimizer, sharding=sharding, exchange=exchange, **options), batches


def steps(backend: Any, ranks: Any) -> list[np.ndarray]:
    """After some, both batches often enough to be replayed."""
    step, batches = step_of(backend, ranks.rank, ranks.size, backend.exchange(ranks) if ranks.size > 1 else None)
    for k in range(10):
        step(batches[k % 2])
    return state_of(step)


@pytest.fixture(scope="module")
def alone() -> list[np.ndarray]:
    return steps(cupy_backend_module().CupyBackend(), Alone())


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("size", [2, 8])
def test_steps(size: int, lazy: bool, alone: list[np.ndarray]) -> None:
    """Also of ranks without rows."""
    for state in Job(size, lazy=lazy).run(steps):
        assert_same_bits(state, alone)


def test_a_communicator_of_one_rank(alone: list[np.ndarray]) -> None:
    """A layer's sums are on a stream of their own, though there is nobody to send them to."""

    def act(backend: Any, ranks: ThreadRanks) -> list[np.ndarray]:
        step, batches = step_of(backend, 0, 1, backend.exchange(ranks))
        for k in range(10):
            step(batches[k % 2])
        return state_of(step)

    (state,) = Job(1).run(act)
    assert_same_bits(state, alone)


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_step_costs(shared: bool) -> None:
    """One graph and one copy of the step's numbers; through the host two graphs, and the host's copies."""

    def act(backend: Any, ranks: ThreadRanks) -> Counter[str]:
        step, batches = step_of(backend, ranks.rank, ranks.size, backend.exchange(ranks))
        for _ in range(4):
            step(batches[0])
        counts = job.cupys[ranks.rank].device.counts
        counts.clear()
        step(batches[0])
        return Counter({name: n for name, n in counts.items() if name not in ("launches", "device copies")})

    job = Job(2, shared=shared)
    for counts in job.run(act):
        assert counts["graphs"] == (2 if shared else 1)
        if not shared:
            assert counts == {"graphs": 1, "asynchronous copies": 1}


@pytest.mark.parametrize("size", [2, 4])
def test_the_traffic(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a sum in a tree: each rank sends 2 (N - 1) / N of the gradient, and what is small at each level."""
    job = Job(size)
    for module in job.modules:
        monkeypatch.setitem(module.ByNccl.begin.__globals__, "SMALL", 64)
    gradient = layout_of([4, 6, 6, 2]).size * 4

    def act(backend: Any, ranks: ThreadRanks) -> None:
        step, batches = step_of(backend, ranks.rank, size, backend.exchange(ranks))
        job.world.counts.clear()
        ranks.all_gather(None)
        step(batches[0])

    job.run(act)
    levels = len(halving(0, 0, size))
    assert job.world.counts["bytes"] == size * (2 * gradient * (size - 1) // size + 8 * levels)


def test_pieces(monkeypatch: pytest.MonkeyPatch, alone: list[np.ndarray]) -> None:
    """What is too large for the scratch goes in pieces."""
    job = Job(4)
    for module in job.modules:
        monkeypatch.setitem(module.ByNccl.begin.__globals__, "SMALL", 32)
        monkeypatch.setitem(module.ByNccl.begin.__globals__, "PIECE", 128)
    for state in job.run(steps):
        assert_same_bits(state, alone)


def test_a_layer_is_on_its_way_before_those_below_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the graph of a step too: what another stream does there stands between the products."""
    monkeypatch.setattr("gpu_bp.sharded_gradient.TOGETHER", 1)
    order: list[str] = []
    graphs: list[Any] = []

    def noted(what: str, call: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: (order.append(what), call(*arguments))[1]

    def act(backend: Any, ranks: ThreadRanks) -> None:
        exchange = backend.exchange(ranks)
        step, batches = step_of(backend, ranks.rank, 2, exchange)
        step(batches[0])
        if ranks.rank == 0:
            capture = backend.captures.graph
            backend.captures.graph = lambda run: graphs.append(capture(run)) or graphs[-1]
            exchange.begin = noted("sent", exchange.begin)
            backend.hidden_delta = noted("below", backend.hidden_delta)
        step(batches[0])

    Job(2).run(act)
    # Six leaves, of which the last is sent: its layers 2, 1 and 0, all biases, the totals.
    assert order == [*10 * ["below"], "sent", "below", "sent", "below", "sent", "sent", "sent"]
    ((graph, _),) = graphs
    capture: Capture = graph._capture
    own = [queue is capture.origin for queue, call in capture.calls if not isinstance(call, Wait)]
    first, last = own.index(False), len(own) - 1 - own[::-1].index(False)
    assert own[first:last].count(True) >= 4  # two products and two deltas of the layers below


def test_sums_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch, alone: list[np.ndarray]) -> None:
    """The stand-in sees it: a capture that is not joined is refused, and steps that are not captured go wrong."""
    job = Job(2, lazy=True)
    for module in job.modules:
        monkeypatch.setattr(module.ByNccl, "end", lambda self: None)
    states = job.run(steps)
    assert any(a.tobytes() != b.tobytes() for state in states for a, b in zip(state, alone, strict=True))


def test_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ways give the same bits, and one that does not is seen."""
    monkeypatch.setattr(ranks, "CELL", Cell(2, 8, 13, "tanh", "adam", "squared_error"))
    backend = Job(1).modules[0].CupyBackend()
    for fault in (False, True):
        if fault:
            monkeypatch.setattr(type(backend.exchange(Alone())), "begin", lambda self, arrays: arrays[0].fill(0))
        one, two, three = ranks.run(backend, Path("no/mpiexec"))
        assert (one.passed, two.passed, two.by, three.digest) == (True, not fault, "by NCCL 2.27.7", None)
    assert "does not pass" in ranks.table([one, two, three])


# Which way is taken ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shared": True}, "through the host's memory, since ranks 0 and 1 share a GPU"),
        ({"without": (2,)}, "through the host's memory, since NCCL is not installed (pip install"),
        ({}, "by NCCL 2.27.7"),
    ],
)
def test_which_way(options: dict[str, Any], words: str) -> None:
    """The same on all ranks, who say why."""
    job = Job(4, **options)
    made = job.run(lambda backend, ranks: backend.exchange(ranks))
    assert all(exchange.by.startswith(words) for exchange in made)
    assert [ranks.on_devices for ranks in job.ranks] == 4 * [options == {}]
    if "without" in options:
        assert made[0].by.endswith("on rank 2")


def test_nccl_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_BP_NCCL", "0")
    for exchange in Job(2).run(lambda backend, ranks: backend.exchange(ranks)):
        assert isinstance(exchange, ThroughHost)
        assert exchange.by == "through the host's memory, since GPU_BP_NCCL=0 on rank 0"


def test_a_communicator_is_never_destroyed() -> None:
    """NCCL would wait for the graphs that have its messages, of which nobody knows when they go."""
    job = Job(2)
    (communicator, _) = job.run(lambda backend, ranks: weakref.ref(backend.exchange(ranks)._communicator))
    del job
    gc.collect()
    assert communicator() is not None


def test_nccl_does_not_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Any, *arguments: Any) -> None:
        raise NcclError("NCCL_ERROR_INVALID_USAGE: invalid usage\nmore")

    monkeypatch.setattr(FakeNccl, "NcclCommunicator", refused)
    with pytest.raises(UserError, match="cannot connect the GPUs: NCCL_ERROR_INVALID_USAGE: invalid usage; .*NCCL=0"):
        Job(2).run(lambda backend, ranks: backend.exchange(ranks))


def test_a_gpu_for_each_rank_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many ranks as there are GPUs have one each, by their number on the machine; more go round."""
    taken = []
    for local_rank in range(5):
        cupy = FakeCupy()
        device = cupy.cuda.Device
        cupy.cuda.runtime.getDeviceCount = lambda: 4

        def numbered(number: int = 0, device: Any = device) -> Any:
            made = device(number)
            made.use = lambda: taken.append(number)
            return made

        cupy.cuda.Device = numbered
        assert cupy_backend_module(cupy).why_unusable(local_rank) is None
    assert taken == [1, 2, 3]  # the current one is left alone for the first


@pytest.mark.parametrize(
    ("at_least", "wanted"),
    [
        (1, [[(0, 128), (256, 352)], [(128, 160)], [(160, 256)]]),
        (100, [[(0, 128), (256, 352)], [(128, 256)], []]),
        (10**6, [[(0, 256), (256, 352)], [], []]),
    ],
)
def test_what_goes_with_which_layer(at_least: int, wanted: list[list[tuple[int, int]]]) -> None:
    """Worked out by hand: weights of 3 x 40, 40 x 5 and 5 x 18, each filled up to a multiple of 32, then biases."""
    found = ready(layout_of([40, 3, 5, 18]), 3, at_least)
    assert [[(part.start, part.stop) for part in parts] for parts in found] == wanted
