"""Trainings in shards, as the trainer and the command line take them: the threads make no difference to any bit."""

from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import LARGE, REWINDS, after, moments, new, outcome, resume, tables, train, write_data

from gpu_bp import NumpyBackend, UserError, dump_config, parse_config
from gpu_bp.backends import Backend, host_threads
from gpu_bp.errors import Diverged
from gpu_bp.trainer import Trainer

Tiny = Callable[..., dict[str, Any]]


def working(monkeypatch: pytest.MonkeyPatch, workers: int) -> NumpyBackend:
    """A backend of so many workers, who all work on a step of any size."""
    monkeypatch.setattr(host_threads, "WORKER", 1)
    monkeypatch.setattr(host_threads, "WORKER_ROWS", 1)
    monkeypatch.setattr("gpu_bp.step.UPDATED", 20)
    backend = NumpyBackend()
    backend._workers.count = workers
    return backend


@pytest.mark.parametrize("part_rows", [None, 3])
@pytest.mark.parametrize("name", ["noise", "plateau", "replacement", "generated", "files"])
def test_any_number_of_workers(
    name: str, part_rows: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is to be seen after every step, its line of metrics too."""
    write_data(tmp_path)
    config = tables(name, tmp_path, train={"shards": 4} | ({"part_rows": part_rows} if part_rows else {}))
    seen = []
    for workers in (1, 2, 7):
        with monkeypatch.context() as patched:
            seen.append(moments(new(config, working(patched, workers))))
    assert seen[0] == seen[1] == seen[2]


def trained_by(threads: int, folder: Path, config: Path) -> Path:
    """The run folder of a training of the command line, with so many threads."""
    run = folder / f"{threads}-threads"
    done = subprocess.run(
        [sys.executable, "-m", "gpu_bp", "train", str(config), "--run", str(run), "--backend", "numpy", "--quiet"],
        env={**os.environ, "OPENBLAS_NUM_THREADS": str(threads), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("part_rows", [{}, {"part_rows": 1200}])
def test_any_number_of_threads_of_blas(part_rows: dict[str, int], tmp_path: Path) -> None:
    """Orthogonal weights, steps, and what is evaluated, from the command line."""
    config = tmp_path / "config.toml"
    config.write_text(dump_config(parse_config({**LARGE, "train": {**LARGE["train"], **part_rows}})))
    one, two = (outcome(trained_by(threads, tmp_path, config)) for threads in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        assert one[name] == two[name], name


def test_evaluation_has_products_on_one_thread(tiny_config: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    together = NumpyBackend.together

    def look(self: NumpyBackend, actions: Any, *, alike: bool = False) -> None:
        seen.append(alike)
        together(self, actions, alike=alike)

    monkeypatch.setattr(NumpyBackend, "together", look)
    for shards in (1, 2):
        trainer = Trainer(parse_config(tiny_config(train={"shards": shards, "average_decay": 0.9})), NumpyBackend())
        trainer.evaluate()
        trainer.evaluate_average()
        assert seen == [shards > 1] * 6
        seen.clear()


@pytest.mark.parametrize("shards", [1, 2])
def test_gone_on_with_by_other_threads(
    shards: int, tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the same end; and it is no difference to be warned of, as it is without shards."""
    config = tiny_config(train={"shards": shards})
    monkeypatch.setattr(NumpyBackend, "libraries", lambda self: {"threads": self._workers.count, "blas": "one"})
    whole, run = tmp_path / "whole", tmp_path / "run"
    for workers, folder, interrupted in ((1, whole, after(-1)), (1, run, after(3)), (2, run, after(4))):
        with monkeypatch.context() as patched:
            backend = working(patched, workers)
            if (folder / "config.toml").exists():
                with caplog.at_level(logging.WARNING, "gpu_bp"):
                    resume(folder, backend=backend, interrupted=interrupted)
            else:
                train(config, backend=backend, run=folder, interrupted=interrupted)
    assert ("threads 2, was 1" in caplog.text) == (shards == 1)
    resume(run, backend=working(monkeypatch, 4))
    if shards > 1:
        assert outcome(run) == outcome(whole)


def test_other_shards_are_another_training(tiny_config: Tiny, tmp_path: Path) -> None:
    train(tiny_config(train={"shards": 2}), backend="numpy", run=tmp_path / "run", interrupted=after(3))
    with pytest.raises(UserError, match=r"train\.shards is 2 there, and 4 here"):
        train(tiny_config(train={"shards": 4}), backend="numpy", run=tmp_path / "run", resume=True)


# What goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_rows", [{}, {"part_rows": 2}])
def test_a_divergence(backend: Backend, part_rows: dict[str, int]) -> None:
    """The line is that of the plain training, which names the step and the rows."""
    messages = []
    for shards in (1, 4):
        config = {**copy.deepcopy(REWINDS), "data": {"kind": "friedman1", "rows": 50}}
        config["train"] = {"epochs": 6, "batch_size": 8, "log_every": 50, "shards": shards, **part_rows}
        with pytest.raises(Diverged) as caught:
            list(new(config, backend).run())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert re.search(r" for \d of the step's 8 rows \(rows? \d+", str(caught.value))


def test_rewinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of workers goes back to the same checkpoints, and ends in the same bits."""
    config = {**copy.deepcopy(REWINDS)}
    config["train"]["shards"] = 4
    found = []
    for workers in (1, 2):
        with monkeypatch.context() as patched:
            train(config, backend=working(patched, workers), run=tmp_path / str(workers))
        found.append(outcome(tmp_path / str(workers)))
        assert found[-1]["state"]["rewinds"] > 1
    assert found[0] == found[1]


@pytest.mark.parametrize(("shards", "said"), [(3, "2 or 4"), (12, "8 or 16"), (65_535, "32768 or 65536")])
def test_no_power_of_two(tiny_config: Tiny, shards: int, said: str) -> None:
    with pytest.raises(UserError, match=rf"train\.shards: must be a power of two, as {said}, not {shards}$") as caught:
        parse_config(tiny_config(train={"shards": shards}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shards", [0, -2, 2**17, 2.5])
def test_no_number_of_shards(tiny_config: Tiny, shards: float) -> None:
    with pytest.raises(UserError, match=r"train\.shards"):
        parse_config(tiny_config(train={"shards": shards}))


def test_all_rows_a_step(tiny_config: Tiny, backend: Backend) -> None:
    """The gradient of all rows: as without shards, but for rounding."""
    found = []
    for shards in ({}, {"shards": 8}, {"shards": 8, "part_rows": 4}):
        optimizer = {"kind": "rprop", "learning_rate": 0.01}
        trainer = new(
            tiny_config(optimizer=optimizer, train={"batch_size": 50, "precision": "float64", **shards}), backend
        )
        lines = [line for line in trainer.run() if line]
        found.append([line["train_loss"] for line in lines])
        assert len(lines) == 2
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)
    assert found[2] == pytest.approx(found[0], rel=1e-12)
