"""The folder of checkpoints: what is kept, what is torn, and what else lies in it."""

from __future__ import annotations

import datetime
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import (
    Tiny,
    after,
    hexed,
    last_checkpoint,
    outcome,
    resume,
    tables,
    train,
    write_data,
)

from gpu_bp import UserError, parse_config
from gpu_bp.checkpoint import CheckpointFolder
from gpu_bp.resuming import plain
from gpu_bp.saving import Saving
from gpu_bp.training_state import Tensors


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint is on the disk before the next step, so that none falls due while another is written."""
    save = Saving.save

    def save_and_wait(self: Saving) -> None:
        save(self)
        self.wait()

    monkeypatch.setattr(Saving, "save", save_and_wait)


def test_the_newest_are_kept_and_the_best_besides(data: Path, every: None) -> None:
    """The best by the metric of [stopping] at the last line before it; every one is whole."""
    config = tables("plateau", data, checkpoint={"every_steps": 4, "keep": 2})
    result = train(config, backend="numpy", run=data / "run")
    folder = CheckpointFolder(data / "run", 2)
    assert folder.newest() is not None
    steps = sorted(int(path.stem.removeprefix("step-")) for path in folder.path.glob("*.json"))
    assert steps == [result.summary["best"]["step"], 40, 42]
    assert len(list(folder.path.iterdir())) == 6


def test_a_broken_checkpoint_is_passed_over(data: Path, every: None, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on from the one before and says so; where none is whole, nothing of the run is overwritten."""
    config = tables("plateau", data)
    train(config, backend="numpy", run=data / "whole")
    run = data / "run"
    train(config, backend="numpy", run=run, interrupted=after(14))
    newest = run / "checkpoints/step-0000000014.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    caplog.set_level(logging.INFO, "gpu_bp")
    resume(run, backend="numpy")
    assert f"checkpoint {newest} is broken: its checksum is another; passing it over" in caplog.text
    assert f"{run} goes on at step 12 of 42" in caplog.text
    assert outcome(run) == outcome(data / "whole")
    for path in (run / "checkpoints").glob("*.json"):
        path.write_text(path.read_text().replace("0", "1"))
    files = files_of(run)
    (run / "summary.json").unlink()  # as of a run that was killed
    del files["summary.json"]
    with pytest.raises(UserError, match="was trained, and has no whole checkpoint"):
        resume(run, backend="numpy")
    assert files_of(run) == files


def test_a_run_that_ended_is_not_begun_again(tiny_config: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), backend="numpy", run=run)
    shutil.rmtree(run / "checkpoints")
    files = files_of(run)
    with pytest.raises(UserError, match="was trained, and has no whole checkpoint"):
        resume(run, backend="numpy")
    assert files_of(run) == files


def files_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_what_else_is_in_the_folder_of_checkpoints(data: Path, every: None) -> None:
    """What a killed process left is removed, what somebody else put there is not; a newer step has more digits."""
    run = data / "run"
    train(tables("ordered", data), backend="numpy", run=run, interrupted=after(4))
    folder = run / "checkpoints"
    (folder / "notes").mkdir()
    (folder / "thesis.txt").touch()
    for left in ("step-0000000006.safetensors", "step-0000000006.json.part", "step-0000000009-2.safetensors"):
        (folder / left).write_bytes(b"half")
    resume(run, backend="numpy", interrupted=after(3))
    assert {path.name for path in folder.iterdir()} == {
        "notes",
        "thesis.txt",
        "step-0000000006.json",
        "step-0000000006-2.safetensors",
        "step-0000000007.json",
        "step-0000000007.safetensors",
    }
    last = last_checkpoint(run)
    checkpoints = CheckpointFolder(run, 2)
    for step in (10**10 - 1, 10**10):
        training = last.facts.training.model_copy(update={"step": step})
        checkpoints.write(last.facts.model_copy(update={"training": training}), dict(last.tensors))
    assert last_checkpoint(run).facts.training.step == 10**10


def test_each_step_has_one_checkpoint(tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is due at the last step, or the run had ended, there is none to be written."""
    written: list[int] = []
    write = CheckpointFolder.write

    def noted(self: CheckpointFolder, facts: Any, tensors: Tensors) -> None:
        written.append(facts.training.step)
        write(self, facts, tensors)

    monkeypatch.setattr(CheckpointFolder, "write", noted)
    config = tiny_config(checkpoint={"every_steps": 7}, train={"max_minutes": 60})
    train(config, backend="numpy", run=tmp_path / "run", interrupted=after(9))
    resume(tmp_path / "run", backend="numpy")
    resume(tmp_path / "run", backend="numpy")
    assert written == [7, 9, 14]


def test_a_checkpoint_of_the_same_step_is_another_file(data: Path) -> None:
    """So that the one there is whole until the new one is."""
    run = data / "run"
    train(tables("ordered", data), backend="numpy", run=run, interrupted=after(4))
    last, folder = last_checkpoint(run), CheckpointFolder(run, 2)
    assert folder.newest() is not None
    tensors = {name: tensor + 1 for name, tensor in last.tensors.items()}
    folder.write(last.facts, tensors)
    assert [path.name for path in folder.path.glob("*4*.safetensors")] == ["step-0000000004-2.safetensors"]
    assert hexed(last_checkpoint(run).tensors) == hexed(tensors)


def changed(data: bytes, seed: int, n: int) -> Iterator[bytes]:
    """The bytes with one of them changed, so many times."""
    rng = np.random.default_rng(seed)
    for place, by in zip(rng.integers(0, len(data), n), rng.integers(1, 256, n), strict=True):
        yield data[:place] + bytes([(data[place] + int(by)) % 256]) + data[place + 1 :]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("how", ["cut", "changed"])
def test_torn_writes(data: Path, every: None, caplog: pytest.LogCaptureFixture, suffix: str, how: str) -> None:
    """Cut at 200 lengths, and with 2,000 changes of a byte each, a checkpoint is passed over, and that is said."""
    run = data / "run"
    train(tables("noise", data), backend="numpy", run=run, interrupted=after(7))
    path = run / f"checkpoints/step-0000000007{suffix}"
    whole = path.read_bytes()
    lengths = np.linspace(0, len(whole) - 1, 200).astype(int)
    torn = (whole[:n] for n in lengths) if how == "cut" else changed(whole, 1, 2000)
    folder = CheckpointFolder(run, 2)
    for k, damaged in enumerate(torn, 1):
        path.write_bytes(damaged)
        found = folder.newest()
        assert found is not None
        assert found.facts.training.step == 6, damaged
        assert len(caplog.records) == k
        assert "is broken: " in caplog.messages[-1]
    path.write_bytes(whole)
    assert last_checkpoint(run).facts.training.step == 7


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_checkpoint_that_is_a_pipe(tiny_config: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To read it would take for ever."""
    train(tiny_config(), backend="numpy", run=tmp_path / "run")
    pipe = tmp_path / "run/checkpoints/step-0000000099.json"
    os.mkfifo(pipe)
    resume(tmp_path / "run", backend="numpy")
    assert f"{pipe}: not a regular file; passing it over" in caplog.text


def test_arguments_that_json_cannot_write() -> None:
    """Those of a source of one's own may be any that TOML has."""
    arguments = {"limit": np.inf, "missing": np.nan, "days": [datetime.date(2024, 1, 1)]}
    config = {
        "data": {"kind": "own", "sources": {"train": {"kind": "module:Waves", **arguments}}},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
        "train": {"epochs": 1},
    }
    tables = plain(parse_config(config))
    assert json.loads(json.dumps(tables, allow_nan=False)) == tables
    assert tables["data"]["sources"]["train"]["limit"] == "Infinity"


def test_numbers_that_json_cannot_write(data: Path) -> None:
    """A change of one byte can make a number infinite: that is a broken checkpoint too."""
    run = data / "run"
    train(tables("own", data, optimizer={"eps": 1e-10}), backend="numpy", run=run, interrupted=after(7))
    (path,) = (run / "checkpoints").glob("*7.json")
    assert b"1e-10" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"1e-10", b"1e910"))
    found = CheckpointFolder(run, 2).newest()
    assert found is None or found.facts.training.step < 7
