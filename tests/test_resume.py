"""Exact resume: a run that is stopped and gone on with is the one that never was; what has changed is told."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import (
    TRAININGS,
    Tiny,
    after,
    last_checkpoint,
    outcome,
    resume,
    tables,
    train,
    write_data,
)

import gpu_bp
from gpu_bp import UserError
from gpu_bp.backends import Backend
from gpu_bp.checkpoint import CheckpointFolder
from gpu_bp.lock import Lock
from gpu_bp.optimizer import Optimizer
from gpu_bp.run_folder import RunFolder
from gpu_bp.runs import Lines
from gpu_bp.trainer import Trainer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", TRAININGS)
def test_a_run_that_is_stopped_and_gone_on_with(
    backend: Backend, data: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Interrupted twice, then once more where nothing is left to do: the folder is that of a run that never was."""
    config = tables(name, data)
    train(config, backend=backend, run=data / "whole")
    caplog.set_level(logging.INFO, "gpu_bp")
    run = data / "parts"
    assert train(config, backend=backend, run=run, interrupted=after(4)).summary["stopped"] == "interrupted"
    assert train(config, backend=backend, run=run, resume=True, interrupted=after(3)).summary["steps"] == 7
    assert f"{run} goes on at step 4 of " in caplog.text
    resume(run, backend=backend)
    assert outcome(run) == outcome(data / "whole")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".safetensors", ".jsonl")}
    resume(run, backend=backend)
    assert f"{run} had ended at step " in caplog.text
    assert before == {name: (run / name).read_bytes() for name in before}


def test_without_a_checkpoint_it_starts_from_the_beginning(
    tiny_config: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where there is no folder yet, and where its run was killed before it had one."""
    caplog.set_level(logging.INFO, "gpu_bp")
    train(tiny_config(), backend="numpy", run=tmp_path / "a", resume=True)
    assert f"{tmp_path / 'a'} has no checkpoint: starting from the beginning" in caplog.text
    caplog.clear()
    killed = tmp_path / "b"
    killed.mkdir()
    for name in ("config.toml", "metrics.jsonl"):
        shutil.copy(tmp_path / "a" / name, killed / name)
    train(tiny_config(), backend="numpy", run=killed, resume=True)
    assert f"{killed} has no checkpoint: starting from the beginning" in caplog.text
    assert outcome(killed) == outcome(tmp_path / "a")


def test_killed_while_its_first_files_are_written(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("gpu_bp.run_folder.write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(), backend="numpy", run=run, resume=True)
    assert train(tiny_config(), backend="numpy", run=run, resume=True).summary["stopped"] == ""


def test_max_minutes_pauses(tiny_config: Tiny, tmp_path: Path) -> None:
    train(tiny_config(), backend="numpy", run=tmp_path / "whole")
    config = tiny_config(train={"max_minutes": 1e-9})
    result = train(config, backend="numpy", run=tmp_path / "run")
    assert (result.summary["stopped"], result.summary["steps"]) == ("max_minutes", 1)
    resume(tmp_path / "run", ["train.max_minutes=10"], backend="numpy")
    ours, whole = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert "max_minutes = 10" in ours.pop("config")
    del whole["config"]
    assert ours == whole


def test_a_changed_config_is_refused(tiny_config: Tiny, tmp_path: Path) -> None:
    """Each key with both values; in a run without a checkpoint too. Nothing is written."""
    run = tmp_path / "run"
    train(tiny_config(), backend="numpy", run=run, interrupted=after(3))
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    changed = tiny_config(
        seed=5, optimizer={"learning_rate": 0.2}, schedule={"kind": "linear"}, network={"hidden": [6]}
    )
    with pytest.raises(UserError) as caught:
        train(changed, backend="numpy", run=run, resume=True)
    for said in ("seed is 0 there, and 5 here", "optimizer.learning_rate is 0.1 there, and 0.2 here"):
        assert said in str(caught.value)
    assert "schedule.final is not set there, and 0.0 here" in str(caught.value)
    assert "--allow-change seed" in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    with pytest.raises(UserError, match=r"config: train\.batch_size is 8 there, and 4 here; to go on"):
        train(tiny_config(train={"batch_size": 4}), backend="numpy", run=run, resume=True)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="seed is 0 there, and 5 here"):
        train(tiny_config(seed=5), backend="numpy", run=run, resume=True)


def test_a_change_that_is_allowed(tiny_config: Tiny, tmp_path: Path) -> None:
    """A key, a table; and those that may always change. The run goes on with it, and once more without saying so."""
    run = tmp_path / "run"
    train(tiny_config(), backend="numpy", run=run, interrupted=after(3))
    changes = ["optimizer.learning_rate=0.2", "train.epochs=3", "checkpoint.keep=1", "train.max_minutes=5"]
    with pytest.raises(UserError, match=r"learning_rate.*--allow-change optimizer.learning_rate$"):
        resume(run, changes, backend="numpy", allow_change="train")
    with pytest.raises(UserError, match=r"train\.epochs.*--allow-change train\.epochs$"):
        resume(run, changes, backend="numpy", allow_change="optimizer")
    resume(run, changes, backend="numpy", allow_change=["train.epochs", "optimizer"], interrupted=after(1))
    lines = resume(run, backend="numpy").folder
    assert [line["learning_rate"] for line in RunFolder(lines).metrics()] == [0.2] * 3
    assert tomllib.loads((run / "config.toml").read_text())["train"]["max_minutes"] == 5


def test_what_was_made_of_another_metric_or_rate_is_forgotten(tiny_config: Tiny, tmp_path: Path) -> None:
    """The best of one metric is none of another, and a plateau's rate is not the one that is asked for now."""
    plateau = {"kind": "plateau", "patience": 1, "factor": 0.5, "threshold": 0.99}
    config = tiny_config(train={"epochs": 6}, schedule=plateau, stopping={"metric": "validation_loss"})
    train(config, backend="numpy", run=tmp_path / "run")
    schedule = last_checkpoint(tmp_path / "run").facts.training.schedule
    assert schedule is not None
    assert schedule.rate < 0.1
    changes = ["train.epochs=7", "optimizer.learning_rate=0.03", "stopping.metric=validation_errors"]
    keys = [change.partition("=")[0] for change in changes]
    best = resume(tmp_path / "run", changes, backend="numpy", allow_change=keys).summary["best"]
    line = RunFolder(tmp_path / "run").metrics()[-1]
    assert line["learning_rate"] == 0.03
    assert line["validation_errors"] > 1  # no loss is as large
    assert best == {"metric": "validation_errors", "value": line["validation_errors"], "step": line["step"]}


def test_a_changed_config_stays_when_it_is_killed_at_once(tiny_config: Tiny, tmp_path: Path) -> None:
    """Before its first checkpoint is due: the change was allowed once, and need not be again."""
    run = tmp_path / "run"
    train(tiny_config(), backend="numpy", run=run, interrupted=after(3))

    def killed(trainer: Trainer, steps: Any) -> Any:
        next(iter(steps))
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        resume(run, ["train.epochs=3"], backend="numpy", allow_change=["train.epochs"], watch=killed)
    assert resume(run, backend="numpy").summary["steps"] == 21


def test_a_run_that_had_ended_is_extended(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    """By more epochs it is the longer run, where no schedule depends on the length."""
    train(tiny_config(train={"epochs": 4}), backend=backend, run=tmp_path / "whole")
    train(tiny_config(train={"epochs": 2}), backend=backend, run=tmp_path / "run")
    resume(tmp_path / "run", ["train.epochs=4"], backend=backend, allow_change=["train.epochs"])
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_run_that_ran_out_of_patience_is_extended(data: Path) -> None:
    whole = tables("patience", data, stopping={"metric": "average_validation_loss", "patience": 6})
    train(whole, backend="numpy", run=data / "whole")
    train(tables("patience", data), backend="numpy", run=data / "run")
    resume(data / "run", ["stopping.patience=6"], backend="numpy", allow_change=["stopping.patience"])
    assert outcome(data / "run") == outcome(data / "whole")


def test_another_environment_is_told(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    train(tiny_config(), backend="numpy", run=run, interrupted=after(3))
    assert "other than when it was stopped" not in caplog.text
    monkeypatch.setattr("gpu_bp.environment.platform.python_version", lambda: "2.7")
    resume(run, backend="numpy")
    assert "other than when it was stopped: python 2.7, was 3." in caplog.text


@pytest.mark.kernels
def test_another_backend(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told, and goes on with the same numbers up to rounding."""
    from cuda_on_cpu.backend import cupy_on_cpu

    config = tables("plateau", data)
    train(config, backend="numpy", run=data / "whole")
    train(config, backend="numpy", run=data / "run", interrupted=after(9))
    resume(data / "run", backend=cupy_on_cpu())
    assert "backend cupy, was numpy" in caplog.text
    ours, whole = RunFolder(data / "run").metrics(), RunFolder(data / "whole").metrics()
    assert [line["step"] for line in ours] == [line["step"] for line in whole]
    np.testing.assert_allclose([x["train_loss"] for x in ours], [x["train_loss"] for x in whole], rtol=1e-3)


def test_a_folder_that_was_moved(data: Path) -> None:
    """To another place, by copying, with its checkpoints on another disk: nothing in it says where it is."""
    config = tables("plateau", data)
    train(config, backend="numpy", run=data / "whole")
    train(config, backend="numpy", run=data / "run", interrupted=after(9))
    shutil.copytree(data / "run", data / "elsewhere/copy")
    shutil.move(data / "run/checkpoints", data / "disk")
    (data / "run/checkpoints").symlink_to(data / "disk")
    for run in (data / "elsewhere/copy", data / "run"):
        resume(run, backend="numpy")
        assert outcome(run) == outcome(data / "whole")
    assert (data / "run/checkpoints").is_symlink()


def test_folders_that_are_refused(tiny_config: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none is not a run folder: it has no config\.toml"):
        resume(tmp_path / "none", backend="numpy")
    with pytest.raises(UserError, match="to resume, the run folder is needed"):
        train(tiny_config(), backend="numpy", resume=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(UserError, match="other is not empty"):
        train(tiny_config(), backend="numpy", run=other, resume=True)
    (other / "config.toml").write_text('[site]\ntitle = "x"\n')
    with pytest.raises(UserError, match=r"other was started with another config: "):
        train(tiny_config(), backend="numpy", run=other, resume=True)
    (other / "config.toml").write_text("no config")
    with pytest.raises(UserError, match=r"config\.toml cannot be read"):
        train(tiny_config(), backend="numpy", run=other, resume=True)


def test_a_run_that_was_killed_before_its_first_file(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder holds nothing that would be taken for somebody's: the same command begins the run."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gpu_bp.run_folder.write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(), backend="numpy", run=tmp_path / "run", resume=True)
    train(tiny_config(), backend="numpy", run=tmp_path / "run", resume=True)
    train(tiny_config(), backend="numpy", run=tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_run_whose_config_is_gone_is_gone_on_with(tiny_config: Tiny, tmp_path: Path) -> None:
    """What it was started with is in its checkpoints too, and is compared."""
    run = tmp_path / "run"
    train(tiny_config(), backend="numpy", run=run, interrupted=after(8))
    (run / "config.toml").unlink()
    with pytest.raises(UserError, match="run was started with another config: seed is "):
        train(tiny_config() | {"seed": 77}, backend="numpy", run=run, resume=True)
    train(tiny_config(), backend="numpy", run=run, resume=True)
    train(tiny_config(), backend="numpy", run=tmp_path / "whole")
    assert outcome(run) == outcome(tmp_path / "whole")


def test_lines_that_are_missing_are_noticed(tiny_config: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), backend="numpy", run=run, interrupted=after(8))
    text = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(text[:-1])
    for other in (text[:-1], b"\n" + text, b"", text.replace(b"epoch", b"epoxx")):
        (run / "metrics.jsonl").write_bytes(other)
        with pytest.raises(UserError, match="metrics.jsonl has not the lines that it had when the checkpoint was"):
            resume(run, backend="numpy")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="metrics.jsonl has not the lines that it had when the checkpoint was"):
        resume(run, backend="numpy")
    (run / "metrics.jsonl").write_bytes(text + b'{"epoch": 2, "st')  # a power cut in the next line
    resume(run, backend="numpy")
    train(tiny_config(), backend="numpy", run=tmp_path / "whole")
    assert outcome(run) == outcome(tmp_path / "whole")


def test_running_out_of_memory_leaves_the_last_checkpoint(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step, whose arrays are then whatever they are."""
    real = Optimizer.begin

    def runs_out(self: Optimizer, *arguments: Any) -> None:
        if self.steps == 5:
            self.state["mean"].fill(7.0)
            raise MemoryError
        real(self, *arguments)

    run = tmp_path / "run"
    config = tiny_config(checkpoint={"every_steps": 2}, optimizer={"kind": "adam", "learning_rate": 0.01})
    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, "begin", runs_out)
        with pytest.raises(UserError, match=r"out of memory at step 6: the training needs about .* would fit"):
            train(config, backend="numpy", run=run)
    found = CheckpointFolder(run, 2).newest()
    assert found is not None
    assert found.facts.training.step in (2, 4)  # the second fell due while the first was being written, or not
    resume(run, backend="numpy")
    train(config, backend="numpy", run=tmp_path / "whole")
    assert outcome(run) == outcome(tmp_path / "whole")


def test_a_run_that_was_killed_has_no_model_yet(tiny_config: Tiny, tmp_path: Path) -> None:
    def killed(trainer: Trainer, steps: Lines) -> Lines:
        yield next(iter(steps))
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), backend="numpy", run=run, watch=killed)
    with pytest.raises(UserError, match=r"has no model\.safetensors: its run has not ended; gpu-bp resume .* goes on"):
        gpu_bp.evaluate(run, backend="numpy")
    resume(run, backend="numpy")
    assert gpu_bp.evaluate(run, backend="numpy")["train"]["rows"] == 50


def test_who_watches_may_look_away(tiny_config: Tiny, tmp_path: Path) -> None:
    """Whatever passes on some of the steps alone: the run pauses there, and goes on to the same end."""

    def three(trainer: Trainer, steps: Lines) -> Lines:
        return itertools.islice(steps, 3)

    run = tmp_path / "run"
    summary = train(tiny_config(), backend="numpy", run=run, watch=three).summary
    assert (summary["steps"], summary["stopped"]) == (3, "interrupted")
    resume(run, backend="numpy")
    train(tiny_config(), backend="numpy", run=tmp_path / "whole")
    assert outcome(run) == outcome(tmp_path / "whole")


def test_a_run_is_gone_on_with_by_one_process(tiny_config: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), backend="numpy", run=run, interrupted=after(3))
    with Lock(run):
        done = subprocess.run(
            [sys.executable, "-m", "gpu_bp", "resume", str(run), "--backend", "numpy"], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert f"error: run folder {run} is in use by process " in done.stderr
    assert resume(run, backend="numpy").summary["steps"] == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"hidden": [6]}}, r"parameters: tensor layers\.0\.weights has shape \(5, 2\), this network needs"),
        ({"network": {"hidden": [5, 5]}}, r"parameters: tensor layers\.1\.weights has shape"),
        ({"optimizer": {"kind": "adam"}}, r"optimizer\.mean: tensor layers\.0\.weights is missing"),
        ({"train": {"average_decay": 0.5}}, r"average: tensor layers\.0\.weights is missing"),
        ({"stopping": {"metric": "train_loss"}}, r"\[stopping\] is in one of them alone"),
    ],
)
def test_a_checkpoint_of_another_network(
    tiny_config: Tiny, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Allowed or not, it does not fit, in one line."""
    run = tmp_path / "run"
    train(tiny_config(), backend="numpy", run=run, interrupted=after(3))
    with pytest.raises(UserError, match=f"as it is now configured: the state is of another .*: {message}") as caught:
        train(tiny_config(**changes), backend="numpy", run=run, resume=True, allow_change=list(changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"precision": "float64"}},
        {"train": {"batch_size": 4}},
        {"train": {"batch_size": 50}},
        {"train": {"sampling": "replacement"}},
        {"schedule": {"kind": "plateau"}},
        {"data": {"rows": 20}},
        {"loss": {"kind": "log_cosh"}},
    ],
)
def test_changes_that_are_taken_in_the_middle_of_an_epoch(
    tiny_config: Tiny, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """At one's own risk: the run goes on, and to the end of its epochs."""
    run = tmp_path / "run"
    train(tiny_config(), backend="numpy", run=run, interrupted=after(4))
    train(tiny_config(**changes), backend="numpy", run=run, resume=True, allow_change=list(changes))
    assert RunFolder(run).metrics()[-1]["epoch"] == 2


def test_steps_of_another_size_go_on_at_the_same_row(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    """After 3 steps of 8 rows: no row of the epoch is left out, and none comes twice."""
    run, changes = tmp_path / "run", {"allow_change": ["train.batch_size"]}
    steps = {"log_every": 1}  # so that none are taken together
    train(tiny_config(train=steps), backend=backend, run=run, interrupted=after(3))
    result = train(tiny_config(train={"batch_size": 4, **steps}), backend=backend, run=run, resume=True, **changes)
    assert (result.summary["rows"], result.summary["steps"]) == (100, 3 + 7 + 13)


def test_another_metric_begins_anew(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    """The best loss so far is no accuracy."""
    run, changes = tmp_path / "run", {"allow_change": ["stopping"]}
    options = {"train": {"epochs": 6}, "checkpoint": {"every_steps": 1}}  # so that no steps are taken together
    train(tiny_config(**options, stopping={}), backend=backend, run=run, interrupted=after(15))
    other = tiny_config(**options, stopping={"metric": "validation_accuracy"})
    best = train(other, backend=backend, run=run, resume=True, **changes).summary["best"]
    seen = [json.loads(line)["validation_accuracy"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (best["metric"], best["value"]) == ("validation_accuracy", max(seen[2:]))
