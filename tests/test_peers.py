"""The benchmark of steps against those of peers: what it measures, what it counts, and what it says."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers import measure, report
from benchmarks.peers.cells import Cell, batches, chosen, grid, operands
from benchmarks.peers.measure import Result, difference, summary
from benchmarks.peers.ours import Ours
from benchmarks.peers.process import CURVE
from benchmarks.peers.sides import OURS, PEERS, Peer

TINY = [Cell(3, 5, 4, "tanh", "adam", "cross_entropy"), Cell(2, 4, 1, "relu", "sgd", "squared_error")]
MACHINE = {"device": "planted", "date": "2026-01-01", "versions": {"numpy": "2"}, "cores": 2}
MACHINE |= {"copy_bytes_per_second": 2e9, "matrix_flops_per_second": 3e9, "free_bytes": 10**9}
NUMBERS = {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}}
QUARTILES = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 2, "maxItems": 2}
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **{name: {"type": "integer", "minimum": 1} for name in ("layers", "width", "batch", "rounds")},
            "activation": {"enum": ["relu", "tanh", "logistic"]},
            "optimizer": {"enum": ["sgd", "adam"]},
            "loss": {"enum": ["squared_error", "cross_entropy"]},
            **{name: {"type": "number", "exclusiveMinimum": 0} for name in ("seconds", "gemm_seconds")},
            **dict.fromkeys(("peers", "peer_gemm_seconds"), NUMBERS),
            **{name: {"type": "object", "additionalProperties": QUARTILES} for name in ("quartiles", "gemm_quartiles")},
            "compile_seconds": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
            "memory_bytes": {"type": "object", "additionalProperties": {"type": ["integer", "null"], "minimum": 0}},
            "threads": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}},
            "curve_difference": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
            "left_out": {"type": "object", "additionalProperties": {"type": "string"}},
            "other_cores": {"type": ["number", "null"], "minimum": 0},
            "machine": {"type": "object", "required": list(MACHINE)},
        },
    },
}
SCHEMA["items"]["required"] = list(SCHEMA["items"]["properties"])  # type: ignore[index]


NAMES = {  # of peers, by what stands in for them
    "Same": "torch eager",
    "Frozen": "torch compile",
    "Infinite": "one function by torch",
    "Faulty": "scikit-learn",
    "Large": "jax jit",
    "Killed": "jax scan",
}
FAKES = [
    Peer(name, "", "numpy", "fake_sides", make, devices=("cpu",), products=make in ("Same", "Killed"))
    for make, name in NAMES.items()
]
MISSING = Peer("torch CUDA graph", "", "no_such_library", "fake_sides", "Same")


def test_quick_grid() -> None:
    cells = grid("quick", "cpu")
    shapes = {(c.layers, c.width, c.batch) for c in cells}
    assert 10 <= len(cells) == len(set(cells)) <= 15
    assert {
        (3, 16, 1),
        (3, 16, 64),
        (3, 64, 64),
        (3, 128, 64),
        (3, 128, 1024),
        (3, 256, 1024),
        (3, 256, 16384),
    } < shapes
    assert {c.optimizer for c in chosen(cells, "3x1024 1024")} == {"sgd", "adam"}
    for name in ("activation", "loss", "optimizer", "layers"):
        assert {getattr(c, name) for c in cells} == {getattr(c, name) for c in grid("full", "cpu")}
    assert set(cells) < set(grid("quick", "cuda"))


def test_full_grid() -> None:
    for device, widths, rows in (
        ("cpu", {16, 64, 128, 256, 1024}, {1, 64, 1024, 16384}),
        ("cuda", {16, 64, 128, 256, 1024, 4096}, {1, 64, 1024, 16384, 2**20}),
    ):
        cells = grid("full", device)
        assert {(c.layers, c.width, c.batch) for c in cells} == set(itertools.product((3, 5), widths, rows))
        assert len(chosen(cells, "3x256 1024")) == 3 * 2 * 2 == len(set(chosen(cells, "3x256 1024")))
        assert {c.optimizer for c in cells if c.flops == max(c.flops for c in cells)} == {"sgd", "adam"}
    assert chosen(cells, "3x16 sgd relu squared_error 64") == [Cell(3, 16, 64, "relu", "sgd", "squared_error")]
    assert not chosen(cells, "3x17")


def test_work_of_a_step() -> None:
    """Three layers of 4 x 4, 5 rows: three products forward, three for the weights, two back."""
    cell = Cell(3, 4, 5, "relu", "sgd", "squared_error")
    assert cell.products == 8
    assert cell.flops == 8 * 2 * 5 * 4 * 4
    assert [x.shape for group in operands(cell) for x in group] == [(5, 4)] * 3 + [(4, 4)] * 3 + [(5, 4)] * 3
    assert cell.n_batches > Cell(3, 1024, 16384, "relu", "sgd", "squared_error").n_batches == 2


def test_batches_are_several_and_the_same_each_time() -> None:
    for cell in TINY:
        once, again = list(batches(cell)), list(batches(cell))
        assert len(once) == 256 // cell.batch
        for (x, targets), (other_x, other_targets) in zip(once, again, strict=True):
            assert np.array_equal(x, other_x) and np.array_equal(targets, other_targets)  # noqa: PT018
        assert not np.array_equal(once[0][0], once[1][0])


def results() -> list[Result]:
    """Two cells: ours takes 2 s and 4 s, PyTorch's fastest 4 s and 32 s."""
    first, second = (
        Result(
            cell, seconds, 1.0, {"torch eager": eager, "torch compile": compiled, "scikit-learn": 3.0}, {"torch": 0.5}
        )
        for cell, seconds, eager, compiled in zip(TINY, (2.0, 4.0), (4.0, 64.0), (8.0, 32.0), strict=True)
    )
    del second.peers["scikit-learn"]
    second.left_out["scikit-learn"] = "planted"
    for result in (first, second):
        result.machine, result.memory_bytes = (
            MACHINE,
            {"ours": 10**6, "torch eager": 3 * 10**6, "torch compile": 4 * 10**6},
        )
    return [first, second]


def test_ratios_by_hand() -> None:
    found = results()
    assert [result.ratio("torch") for result in found] == [2.0, 8.0]
    assert [result.ratio("scikit-learn") for result in found] == [1.5, None]
    worst, where, mean = summary(found, "torch") or (0.0, None, 0.0)
    assert (worst, where, mean) == (2.0, found[0], pytest.approx(4.0))
    assert summary(found, "jax") is None


def test_the_headline_is_the_smallest_ratio() -> None:
    lines = report.headline(results()).splitlines()
    assert lines[0].startswith(f"time of the fastest PyTorch over ours: smallest 2.00 ({TINY[0]}), geometric mean 4.00")
    assert "8.00" not in lines[0]
    assert len(lines) == 2


def test_table() -> None:
    lines = [[field.strip() for field in line.split("|")[1:-1]] for line in report.table(results()).splitlines()]
    columns = dict(zip(lines[0], zip(*lines[2:], strict=True), strict=True))
    assert columns["ours, ms"] == ("2000", "4000")
    assert columns["PyTorch eager"] == ("4000", "64000")
    assert columns["PyTorch compiled"] == ("8000", "32000")
    assert columns["scikit-learn"] == ("3000", "")
    assert columns["best PyTorch / ours"] == ("2.00", "8.00")
    assert columns["products / step"] == ("0.50", "0.25")
    assert columns["MB, ours / PyTorch"] == ("1 / 3", "1 / 3")
    assert "JAX" not in columns
    assert f"left out, scikit-learn: planted ({TINY[1]})" in report.notes(results())


@pytest.mark.parametrize(("busy", "said"), [(None, "not known"), (0.05, "kept 0.05 of 2 cores"), (0.5, "TOO MUCH")])
def test_other_work_is_told(busy: float | None, said: str) -> None:
    found = results()
    for result in found:
        result.other_cores = busy
    assert said in report.notes(found)
    assert ("TOO MUCH" in report.notes(found)) == (busy == 0.5)


def test_difference_of_curves() -> None:
    assert difference([1.0, 2.0, 4.0], [1.0, 2.5, 5.0]) == 0.2
    assert difference([1.0, math.nan], [1.0, 1.0]) == math.inf


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From start to end with small cells: who counts, who is left out and why, and the files."""
    monkeypatch.setattr(command, "grid", lambda *_: TINY)
    monkeypatch.setattr(command, "PEERS", [*FAKES, MISSING])
    paths = {name: tmp_path / name for name in ("json", "plot.png", "markdown")}
    files = [f"--{name.removesuffix('.png')}={path}" for name, path in paths.items()]
    assert command.main([*files, "--seconds", "0"]) == 0
    found = json.loads(paths["json"].read_text())
    jsonschema.validate(found, SCHEMA)
    for cell, result in zip(TINY, found, strict=True):
        assert {name: result[name] for name in vars(cell)} == vars(cell)
        assert set(result["peers"]) == {"torch eager", "jax jit"}
        assert set(result["peer_gemm_seconds"]) == {"numpy"}
        assert result["left_out"].pop("torch compile").startswith("its losses differ from ours by")
        assert result["left_out"].pop("one function by torch").startswith("its losses differ from ours by inf")
        assert result["left_out"] == {
            "scikit-learn": "RuntimeError: planted",
            "jax scan": "its process ended with status -9",
            "torch CUDA graph": "no_such_library is not installed",
        }
        assert result["curve_difference"]["torch eager"] == 0
        if sys.platform == "linux":
            more = result["memory_bytes"]["jax jit"] - result["memory_bytes"]["torch eager"]
            assert 60e6 < more < 80e6
    printed = capsys.readouterr().out
    assert paths["markdown"].read_text().strip() == printed.strip()
    assert printed.count("\n|") == 4
    assert paths["plot.png"].stat().st_size > 1000


def test_cells_that_do_not_fit_or_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--cell", "3x17"]) == 2
    assert "no cell of the quick grid has all of: 3x17" in capsys.readouterr().err
    large = Cell(3, 10**4, 10**5, "relu", "sgd", "squared_error")
    bench: Any = type("Planted", (), {"sides": [OURS] * 2, "machine": MACHINE})
    assert command.too_large(large, bench)
    assert "left out, would take" in capsys.readouterr().err
    assert not command.too_large(TINY[0], bench)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_without_our_own_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can be compared then; the reason is said."""
    monkeypatch.setattr(command, "grid", lambda *_: TINY)
    broken = Peer("ours", "ours", "gpu_bp", "fake_sides", "Faulty")
    monkeypatch.setattr(command, "bench", lambda device, peers: measure.bench(device, [], broken))
    assert command.main([]) == 2
    assert "error: our own step cannot be measured" in capsys.readouterr().err


KINDS = list(itertools.product(("relu", "tanh", "logistic"), ("sgd", "adam"), ("squared_error", "cross_entropy")))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_who_does_not_learn_is_told(kind: tuple[str, str, str]) -> None:
    """Losses of the same batch move by far more than what losses of two sides may differ by."""
    for layers, width, batch in ((3, 16, 64), (5, 64, 1024)):
        side = Ours(Cell(layers, width, batch, *kind), "cpu")
        losses = side.losses(CURVE)
        assert abs(losses[-4] - losses[0]) > 10 * measure.TOLERANCE * max(losses)
        side.begin()  # the batches have come round
        assert difference(side.losses(CURVE), losses) < 1e-6


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("peer", [peer for peer in PEERS if "cpu" in peer.devices], ids=lambda peer: peer.name)
def test_losses_of_peers(peer: Peer, kind: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as ours; what is compiled runs as it is written."""
    pytest.importorskip(peer.package)
    cell = Cell(3, 6, 5, *kind)
    side = make(peer, cell, monkeypatch)
    ours = Ours(cell, "cpu").losses(CURVE)
    apart = 2e-5 if peer.package == "sklearn" else 2e-6  # its Adam adds epsilon before it corrects the mean square
    for _ in range(2):
        assert difference(side.losses(CURVE), ours) < apart
        side.begin()
        for _ in range(-CURVE % cell.n_batches):
            next(side.batches)


def make(peer: Peer, cell: Cell, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip(peer.module)
    if peer.package == "torch":
        monkeypatch.setattr(module.torch, "compile", lambda function=None, **_: function or (lambda f: f))
    return getattr(module, peer.make)(cell, "cpu", **peer.options)


@pytest.mark.reference
def test_products_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch and this project make the same ones, and as many as a step does."""
    torch = pytest.importorskip("torch")
    cell = Cell(3, 6, 5, "relu", "sgd", "squared_error")
    ours, theirs = Ours(cell, "cpu"), make(PEERS[0], cell, monkeypatch)
    made: dict[str, list[np.ndarray]] = {"step": [], "ours": [], "theirs": []}
    matmul, mm = ours.backend.matmul, torch.mm

    def count(a: Any, b: Any, out: Any, **how: bool) -> None:
        matmul(a, b, out, **how)
        made[now].append(out.copy())

    def count_theirs(a: Any, b: Any, out: Any) -> None:
        mm(a, b, out=out)
        made["theirs"].append(out.numpy().copy())

    now = "ours"
    monkeypatch.setattr(ours.backend, "matmul", count)
    monkeypatch.setattr(torch, "mm", count_theirs)
    ours.products()()
    theirs.products()()
    now = "step"
    ours.step()
    assert len(made["ours"]) == len(made["step"]) == cell.products
    assert sorted(x.shape for x in made["step"]) == sorted(x.shape for x in made["ours"])
    for one, two in zip(made["ours"], made["theirs"], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
