"""The model of how trainings scale: by hand, by what the sum really sends, by its limits; and `gpu-bp scaling`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tomli_w
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import scaling as benchmark
from gpu_bp import UserError, parse_config, scaling_here
from gpu_bp.backends import Backend
from gpu_bp.cli import main
from gpu_bp.scaling import ENOUGH, LINKS, MOST, TURN, Cluster, Link, Scaling, Work, link_of, powers
from gpu_bp.scaling_here import OneOf, Unheard, lines, measure, predict, to_json
from gpu_bp.trainer import Trainer
from gpu_bp.tree_sum import SMALL, TreeSum

Tiny = Callable[..., dict[str, Any]]

FREE = Link(0.0, inf)
# A layer of 100 weights under one of 300; of a step's 1000 rows a rank computes its part, 250 at a time.
WORK = Work(1000, {1: 40.0, 2: 20.0, 4: 10.0, 8: 5.0}, 2.0, [100, 300], [[10_000], [30_000]], leaf_rows=250)
NO_COST = Cluster(FREE, FREE, 8, inf)
SLOW = Cluster(Link(1.0, 10_000.0), Link(2.0, 5_000.0), per_machine=2, additions=20_000.0)


# The sum -------------------------------------------------------------------------------------------------------------


def test_a_sum_by_hand() -> None:
    """Of 40,000 bytes over 4 ranks: half of it within a machine, a quarter from machine to machine."""
    inside = 2 * (1 + 20_000 / 10_000) + 20_000 / 20_000
    across = 2 * (2 + 10_000 / 5_000) + 10_000 / 20_000
    assert SLOW.sum_seconds(40_000, 4) == pytest.approx(inside + across)
    assert SLOW.sum_seconds(40_000, 2) == pytest.approx(inside)
    assert SLOW.sum_seconds(40_000, 1) == 0
    # 1,000 bytes are swapped whole, once a level
    assert SLOW.sum_seconds(1000, 4) == pytest.approx((1 + 0.1 + 0.05) + (2 + 0.2 + 0.05))


class Counting:
    """A communicator in which whatever is sent arrives as zeros; it counts messages and bytes, by how far they go."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.messages: dict[int, int] = {}
        self.n_bytes: dict[int, int] = {}

    def _sent(self, array: np.ndarray, partner: int) -> None:
        distance = self.rank ^ partner
        self.messages[distance] = self.messages.get(distance, 0) + 1
        self.n_bytes[distance] = self.n_bytes.get(distance, 0) + array.nbytes

    def Sendrecv(self, given: np.ndarray, partner: int, tag: int, *, recvbuf: np.ndarray, **_: Any) -> None:
        self._sent(given, partner)

    def Isend(self, given: np.ndarray, partner: int, tag: int) -> Counting:
        self._sent(given, partner)
        return self

    def Irecv(self, *_: Any) -> Counting:
        return self

    def Wait(self) -> None:
        pass


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("n_bytes", [SMALL, 2**18])
def test_what_the_sum_really_sends(size: int, n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages, bytes and additions of `tree_sum.py`, within machines of four ranks and beyond; on any rank."""
    added = []
    monkeypatch.setattr(TreeSum, "_add", lambda self, own, got, partner: added.append(own.nbytes))
    comm = Counting(size - 1, size)
    TreeSum(comm, 1)(np.zeros(n_bytes // 4, np.float32))

    def asked(inside: Link = FREE, across: Link = FREE, additions: float = inf) -> float:
        return Cluster(inside, across, 4, additions).sum_seconds(n_bytes, size)

    for counts, one in ((comm.messages, Link(1.0, inf)), (comm.n_bytes, Link(0.0, 1.0))):
        assert asked(inside=one) == sum(n for distance, n in counts.items() if distance < 4)
        assert asked(across=one) == sum(n for distance, n in counts.items() if distance >= 4)
    assert asked(additions=1.0) == sum(added)


@pytest.mark.parametrize("n_bytes", [8, 2**20])
def test_the_closed_form(n_bytes: int) -> None:
    """As of Thakur, Rabenseifner and Gropp (2005)."""
    alpha, beta, gamma, levels, n = 3.0, 0.5, 0.25, 6, 64
    flat = Cluster(Link(alpha, 1 / beta), Link(alpha, 1 / beta), 8, 1 / gamma)
    whole = 2 * levels * alpha + (2 * beta + gamma) * (n - 1) / n * n_bytes
    short = levels * (alpha + (beta + gamma) * n_bytes)
    assert flat.sum_seconds(n_bytes, n) == pytest.approx(whole if n_bytes > SMALL else short)


# A step --------------------------------------------------------------------------------------------------------------


def test_a_step_by_hand() -> None:
    short = 2 * (1 + 8 / 10_000 + 8 / 20_000)  # two sums, of a message each
    point = Scaling(WORK, SLOW, 2).point(2)
    assert (point.ranks, point.rows, point.compute, point.update) == (2, 1000, 20, 2)
    assert point.sum == pytest.approx(7 + short)
    assert point.step == pytest.approx(29 + short)
    scaling = Scaling(WORK, SLOW, 4)
    assert scaling.efficiency(2) == pytest.approx(42 / (2 * (29 + short)))
    assert scaling.weak_efficiency(2) == pytest.approx(42 / (40 + 7 + short + 2))
    assert scaling.efficiency(1) == scaling.weak_efficiency(1) == 1
    assert scaling.point(1).sum == 0


def test_times_the_rows() -> None:
    """A rank then has the rows of one of fewer; beyond that, rows take what they take."""
    scaling = Scaling(WORK, NO_COST, 8)
    assert [scaling.point(8, times).compute for times in (1, 2, 8, 16)] == [5, 10, 40, 80]
    assert scaling.point(8, 4).rows == 4000
    assert scaling.point(1, 4).compute == 160


def test_without_cost_only_the_update_is_lost() -> None:
    for n in (1, 2, 4, 8):
        assert Scaling(WORK, NO_COST, 8).point(n).step == 40 / n + 2
        assert Scaling(replace(WORK, update=0.0), NO_COST, 8).efficiency(n) == 1


def test_overlap_by_hand() -> None:
    """Two layers, the upper one's sum in three quarters of the bytes; what is left then are the delta of the layer
    below and its gradient, 2 x 300 + 2 x 100 of 6 x 400 - 2 x 100 operations a row."""
    assert WORK.left() == [0, pytest.approx(800 / 2200)]
    upper, lower = SLOW.sum_seconds(30_000, 2), SLOW.sum_seconds(10_000, 2)
    short = 2 * SLOW.sum_seconds(8, 2)
    hidden = 800 / 2200 * 20 * 250 / 500  # half of the rows are the last to be worked on
    assert hidden < upper
    scaling = Scaling(WORK, SLOW, 2, overlap=True)
    assert scaling.point(2).sum == pytest.approx(upper - hidden + lower + short)
    at_once = Scaling(replace(WORK, leaf_rows=1000), SLOW, 2, overlap=True)
    assert at_once.point(2, 4).compute * 800 / 2200 > upper
    assert at_once.point(2, 4).sum == pytest.approx(lower + short)  # that of the upper layer is hidden


def test_ranks_that_take_turns() -> None:
    """On two cores four ranks take twice as long for all they do, and a message at least the time of a turn."""
    machine = Cluster(Link(1e-6, 10_000.0), FREE, 4, 20_000.0, at_once=2)
    two, four = (Scaling(WORK, machine, 4).point(n) for n in (2, 4))
    assert (two.compute, two.update) == (20, 2)
    assert (four.compute, four.update) == (2 * 10, 2 * 2)
    assert machine.sum_seconds(1000, 2) == pytest.approx(1e-6 + 0.1 + 0.05)
    assert machine.sum_seconds(1000, 4) == pytest.approx(2 * (TURN + 2 * 0.15))
    apart = replace(machine, per_machine=2)
    assert Scaling(WORK, apart, 4).point(4).compute == 10


numbers = st.floats(1e-6, 1e3)
sizes = st.sampled_from([2, 4, 8, 16, 32, 64])
clusters = st.builds(
    Cluster, st.builds(Link, numbers, numbers), st.builds(Link, numbers, numbers), st.sampled_from([1, 2, 8]), numbers
)


@given(clusters, sizes, st.integers(1, 10**9), st.floats(1, 100))
def test_what_costs_more(cluster: Cluster, size: int, n_bytes: int, times: float) -> None:
    """More ranks do, and more bytes where they are sent the same way; faster links and fewer additions cost less."""
    seconds = cluster.sum_seconds(n_bytes, size)
    assert 0 < seconds <= cluster.sum_seconds(n_bytes, 2 * size)
    if (n_bytes <= SMALL) == (n_bytes * times <= SMALL):
        assert seconds <= cluster.sum_seconds(n_bytes * times, size) * (1 + 1e-12)
    inside, across = cluster.inside.faster(times), cluster.across.faster(times)
    assert replace(cluster, inside=inside, across=across).sum_seconds(n_bytes, size) <= seconds
    assert replace(cluster, additions=cluster.additions * times).sum_seconds(n_bytes, size) <= seconds


layers = st.lists(st.tuples(st.integers(1, 10**6), st.lists(st.integers(1, 10**9), max_size=2)), min_size=1, max_size=5)


@given(clusters, sizes, numbers, numbers, layers)
def test_what_is_efficient(
    cluster: Cluster, size: int, compute: float, update: float, layers: list[tuple[int, list[int]]]
) -> None:
    """Where rows take their time wherever they are, no rank is faster than its part; more rows for each are better, and
    with overlap a step takes no less than what is computed, nor than what is sent."""
    weights, parts = zip(*layers, strict=True)
    work = Work(2**20, {n: compute / n for n in powers(64)}, update, weights, parts, leaf_rows=2**20)
    for overlap in (False, True):
        scaling = Scaling(work, cluster, 64, overlap)
        efficiency, point = scaling.efficiency(size), scaling.point(size)
        assert 0 < efficiency < 1
        assert scaling.efficiency(size, 2) >= efficiency * (1 - 1e-12)
        assert scaling.weak_efficiency(size) >= efficiency * (1 - 1e-12)
        assert point.step >= point.compute + point.update
    sums = sum(cluster.sum_seconds(part, size) for each in parts for part in each)
    assert point.step >= (sums + update) * (1 - 1e-12)
    assert point.sum <= (sums + 2 * cluster.sum_seconds(8, size)) * (1 + 1e-12)


# What is said of it --------------------------------------------------------------------------------------------------


def test_where_it_falls_and_what_helps() -> None:
    """Sums take 1.4 whatever the rows: 40 / 8 + 2 with it is far from an eighth of 42."""
    cluster = Cluster(Link(0.2, inf), Link(0.2, inf), 8, inf)
    scaling = Scaling(WORK, cluster, 8)
    assert scaling.efficiency(2) > ENOUGH > scaling.efficiency(4)
    assert scaling.falls() == 4
    helps = scaling.helps()
    assert set(helps) == {"batch"}  # the update alone takes too much for any link
    assert scaling.efficiency(8, int(helps["batch"])) >= ENOUGH > scaling.efficiency(8, int(helps["batch"]) // 2)
    without = replace(scaling, work=replace(WORK, update=0.0))
    times = without.helps()["links"]
    faster = cluster.inside.faster(times)
    assert replace(without, cluster=Cluster(faster, faster, 8, inf)).efficiency(8) >= ENOUGH
    half = cluster.inside.faster(times / 2)
    assert replace(without, cluster=Cluster(half, half, 8, inf)).efficiency(8) < ENOUGH
    crowded = Scaling(replace(WORK, update=0.0), replace(NO_COST, at_once=2), 8)
    assert crowded.helps() == {"cores": 1.0}
    big = Link(0.0, 6_000.0)
    hidden = Scaling(replace(WORK, update=0.0, leaf_rows=1000, short_sums=0), Cluster(big, big, 8, inf), 2)
    assert hidden.efficiency(2) < ENOUGH
    assert hidden.helps()["overlap"] == pytest.approx(replace(hidden, overlap=True).efficiency(2))
    assert replace(hidden, overlap=True).helps() == {}


def test_nothing_helps() -> None:
    scaling = Scaling(replace(WORK, update=1e9), NO_COST, 8)
    assert scaling.falls() == 2
    assert scaling.helps() == {}
    assert MOST * 40 < 1e9
    text = "\n".join(lines(scaling))
    assert "none of batch, links, overlap, cores.\nEnough as it is: 1 rank." in text


def test_it_stays() -> None:
    scaling = Scaling(replace(WORK, update=0.0), NO_COST, 8)
    assert scaling.falls() is None
    assert lines(scaling)[-1] == "The efficiency stays at 80% or above."
    assert to_json(scaling)["helps"] == {}


def test_the_table_by_hand() -> None:
    scaling = Scaling(replace(WORK, compute={1: 0.04, 2: 0.02, 4: 0.01}, update=0.002), replace(SLOW, at_once=1), 4)
    said = lines(scaling)
    assert said[0] == "a step of 1,000 rows, and a gradient of 39.1 KiB, added at 2e-05 GB/s"
    assert said[1] == "ranks of a machine: 1e+06 us a message, 1e-05 GB/s"
    assert said[2] == "2 a machine; between machines: 2e+06 us a message, 5e-06 GB/s"
    assert said[3].startswith("of a machine's ranks 1 at a time have its cores")
    rows = {line.split()[0]: line.split()[1:] for line in said if re.match(r" +\d", line)}
    assert rows["1"] == ["1,000", "40", "0", "2", "42", "23,810", "1.00", "100%", "100%"]
    point = scaling.point(4)
    assert rows["4"][:5] == ["250", "20", f"{1e3 * point.sum:.4g}", "4", f"{1e3 * point.step:.4g}"]
    assert list(rows) == ["1", "2", "4"]
    facts = to_json(scaling)
    assert facts["points"][0]["rows_per_second"] == pytest.approx(1000 / 0.042)
    assert facts["points"][2]["speed_up"] == pytest.approx(0.042 / point.step)
    assert facts["falls_at"] == 2
    json.dumps(facts, allow_nan=False)
    json.dumps(to_json(Scaling(WORK, SLOW, 4)), allow_nan=False)


def test_links() -> None:
    assert link_of("nvlink4") is LINKS["nvlink4"]
    assert link_of("20:1.25") == Link(pytest.approx(20e-6), 1.25e9)
    assert link_of("0:1") == Link(0.0, 1e9)
    for wrong in ("nvlink", "", "20", "1:2:3", "-1:1", "1:0", "nan:1", "1:nan", "inf:1", "1:inf", "a:b"):
        with pytest.raises(UserError, match="unknown link .* known: memory, nvlink4, ndr400; or MICROSECONDS:GBYTES"):
            link_of(wrong)
    with pytest.raises(UserError, match="did you mean nvlink4"):
        link_of("nvlink")


# What is measured ----------------------------------------------------------------------------------------------------


def test_a_rank_that_nobody_hears(backend: Backend, tiny_config: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of other ranks, nor of what is between them; layers are summed as the backend would."""
    monkeypatch.setattr(type(backend), "exchange", None)
    monkeypatch.setattr(OneOf, "sum_tree", None)
    trainer = Trainer(parse_config(tiny_config(train={"shards": 8})), cast(Backend, Unheard(backend)), ranks=OneOf(8))
    with closing(trainer.run()) as steps:
        next(steps)
    assert trainer.exchange is not None
    assert trainer.exchange.beside == (backend.name == "cupy")
    assert trainer.step.optimizer.steps == 1


def test_what_is_measured(backend: Backend, tiny_config: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each number of ranks the work of the first: its rows in its shards. Each step takes a second for each row."""
    seen = []

    def take_steps(trainer: Trainer, seconds: float) -> dict[str, Any]:
        batch = next(iter(trainer.batches.epoch(0)))
        seen.append((batch.n, batch.step_rows, round(seconds, 9)))
        return {"steps": 10, "seconds": 10.0 * batch.n + len(seen)}

    monkeypatch.setattr(scaling_here, "take_steps", take_steps)
    monkeypatch.setattr(scaling_here, "TRIES", 2)
    config = parse_config(tiny_config(network={"hidden": [5, 7]}, train={"batch_size": 40, "shards": 8}))
    work = measure(config, backend, 4, 12.0)
    assert seen == [(40, 40, 2.0), (40, 40, 2.0), (20, 40, 2.0), (20, 40, 2.0), (10, 40, 2.0), (10, 40, 2.0)]
    assert work.rows == 40
    steps = {1: 40.1, 2: 20.3, 4: 10.5}  # the fastest of two
    assert work.compute == {n: pytest.approx(step - work.update) for n, step in steps.items()}
    assert 0 < work.update < 10.5
    assert work.weights == [2 * 5, 5 * 7, 7 * 1]
    assert work.parts == [[4 * 128, 4 * 96], [], []]  # in one, since there are so few; and the biases
    assert work.leaf_rows == 5
    assert work.short_sums == (2 if backend.name == "numpy" else 1.01)


def test_real_steps(backend: Backend, tiny_config: Tiny) -> None:
    config = parse_config(tiny_config(train={"shards": 4}))
    scaling = predict(config, backend, 4, seconds=0)
    assert min(scaling.work.compute.values()) > 0
    network = Trainer(config, backend).model.network
    assert scaling.work.n_bytes == network.layout.size * network.dtype.itemsize
    assert scaling.cluster.per_machine == 4
    assert (scaling.cluster.at_once == inf) == scaling.overlap == (backend.name == "cupy")
    assert scaling.cluster.additions > 0
    assert scaling.point(4).step > 0


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(in_tmp: Path, tiny_config: Tiny, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `gpu-bp scaling` on the tiny config with these arguments: exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        (in_tmp / "tiny.toml").write_text(tomli_w.dumps(tiny_config()))
        with pytest.raises(SystemExit) as exited:
            main(["scaling", "tiny.toml", "--seconds", "0", "--backend", "numpy", *arguments])
        captured = capsys.readouterr()
        return int(exited.value.code or 0), captured.out, captured.err

    return run


def test_the_command(run: Callable[..., tuple[int, str, str]], in_tmp: Path) -> None:
    status, out, err = run("train.shards=4", "--ranks", "4", "--per-machine", "2", "--across", "20:1.25")
    assert (status, err) == (0, "")
    assert out.startswith("numpy backend, as asked\na step of 8 rows, and a gradient of ")
    assert "\n2 a machine; between machines: 20 us a message, 1.25 GB/s\n" in out
    for name in (
        "ranks  rows a rank  compute ms",
        "1            8 ",
        "2            4 ",
        "4            2 ",
        "The efficiency ",
    ):
        assert re.search(rf"^ *{name}", out, re.M), name
    assert list(in_tmp.iterdir()) == [in_tmp / "tiny.toml"]


def test_its_json(run: Callable[..., tuple[int, str, str]]) -> None:
    arguments = ["--ranks", "2", "--inside", "5:2", "--overlap", "--json"]
    facts = json.loads(run("train.shards=2", *arguments)[1])
    assert (facts["backend"], facts["batch_size"], facts["overlap"]) == ("numpy", 8, True)
    assert facts["cluster"]["inside"] == {"latency": 5e-6, "bytes_per_second": 2e9}
    one, two = facts["points"]
    assert [one["ranks"], two["ranks"], one["rows_a_rank"], two["rows_a_rank"]] == [1, 2, 8, 4]
    for point in (one, two):
        parts = point["compute_seconds"] + point["sum_seconds"] + point["update_seconds"]
        assert point["step_seconds"] == pytest.approx(parts)
    assert two["efficiency"] == pytest.approx(one["step_seconds"] / two["step_seconds"] / 2)


def test_a_single_rank(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("--ranks", "1")[1].endswith("The efficiency stays at 80% or above.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2"], "--ranks is 2, and train.shards is 1; give train.shards=2, or fewer ranks"),
        (["--ranks", "6"], "--ranks is 6, and must be a power of two, such as 4"),
        (["--ranks", "0"], "ranks"),
        ([], "--ranks"),
        (["--ranks", "2", "--per-machine", "3"], "--per-machine is 3, and must be a power of two, such as 2"),
        (
            ["train.shards=4", "--ranks", "4", "--per-machine", "2"],
            "--per-machine is 2; say what links the machines, such as --across ndr400",
        ),
        (["--ranks", "1", "--inside", "memry"], "unknown link 'memry'; did you mean memory? known: memory, "),
        (["train.batchsize=3", "--ranks", "1"], "batch_size"),
        (["optimizer.learning_rate=1e30", "--ranks", "1"], "the training diverged at step"),
    ],
)
def test_errors(run: Callable[..., tuple[int, str, str]], arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_has_the_tables_on_paper() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    assert "\n".join(benchmark.paper()).rstrip() in page
    for name in LINKS:
        assert f"`{name}`" in page
