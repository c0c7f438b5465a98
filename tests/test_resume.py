"""Exact resume: a training that is stopped and gone on with is the one that never was, in every bit."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from trainings import REWINDS, TRAININGS, hexed, last_checkpoint, moment, outcome, tables, write_data

import gpu_bp
from gpu_bp import UserError, parse_config, registry, select
from gpu_bp.backends import Backend
from gpu_bp.checkpoint import CheckpointFolder
from gpu_bp.lock import Lock
from gpu_bp.optimizer import Optimizer
from gpu_bp.resuming import plain
from gpu_bp.run_folder import RunFolder
from gpu_bp.runs import Lines
from gpu_bp.saving import Saving
from gpu_bp.trainer import Trainer
from gpu_bp.training_state import Record, Tensors, TrainingState, restore, take

Tiny = Callable[..., dict[str, Any]]
train = functools.partial(gpu_bp.train, pictures=False)
resume = functools.partial(gpu_bp.resume, pictures=False, trust_code=True)
Moments = list[dict[str, Any]]


def after(steps: int) -> Callable[[], bool]:
    """What interrupts a training after so many steps."""
    asked = itertools.count(1)
    return lambda: next(asked) == steps


def new(config: dict[str, Any], backend: Backend) -> Trainer:
    return Trainer(parse_config(config), backend)


def moments(trainer: Trainer, steps: int = -1) -> Moments:
    """What is to be seen after each step: of so many, after which the training pauses, or of all that are left."""
    interrupted = after(steps)
    return [moment(trainer, line) for line in trainer.run(lambda: "pause" if interrupted() else "")]


def other_process(trainer: Trainer, config: dict[str, Any], backend: Backend) -> Trainer:
    """A new trainer that was given the state of this one, by way of text and of tensors of its own."""
    state, tensors = take(trainer)
    made = new(config, backend)
    restore(made, TrainingState.model_validate_json(state.model_dump_json()), tensors)
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


# the state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_goes_on_as_if_it_had_never_stopped(backend: Backend, data: Path, name: str) -> None:
    """At a line and between two, at the end of an epoch, in its short last step, and twice in a row."""
    config = tables(name, data)
    whole = moments(new(config, backend))
    for stops in ([1], [3, 4], [6, 1], [7, 2]):
        trainer, seen = new(config, backend), []
        for steps in stops:
            seen += moments(trainer, steps)
            assert trainer.paused
            trainer = other_process(trainer, config, backend)
        seen += moments(trainer)
        assert seen == whole


def test_a_training_goes_on_in_the_same_process(backend: Backend, data: Path) -> None:
    config = tables("plateau", data)
    trainer, seen = new(config, backend), []
    while len(seen) < 42:
        seen += moments(trainer, 5)
    assert seen == moments(new(config, backend))
    assert not trainer.paused
    assert moments(trainer) == [], "it is at its end"


@pytest.mark.parametrize("kind", registry.UPDATES)
def test_every_optimizer(backend: Backend, data: Path, kind: str) -> None:
    config = tables("ordered", data, optimizer={"kind": kind}, train={"epochs": 2})
    if registry.update(kind).full_batch:
        config["train"] |= {"batch_size": 50, "epochs": 9}
        del config["train"]["part_rows"]
    whole = moments(new(config, backend))
    trainer = new(config, backend)
    seen = moments(trainer, 4)
    assert seen + moments(other_process(trainer, config, backend)) == whole


Paused = tuple[TrainingState, Tensors]
# By training: after how many steps it is looked at, such that the pieces are not what they were at the beginning.
LOOKED_AT = {"noise": 17, "plateau": 22, "patience": 6, "replacement": 11, "ordered": 11, "files": 12}


@functools.cache
def begun_and_paused(name: str, folder: Path) -> tuple[Paused, Paused, Moments]:
    """The state of a training that begins, that of one that is paused, and what comes after that."""
    trainer = new(tables(name, folder), select("numpy")[0])
    before = take(trainer)
    moments(trainer, LOOKED_AT[name])
    return before, take(trainer), moments(trainer)


@pytest.fixture(scope="module")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def planted(paused: Paused, before: Paused, piece: str) -> Paused:
    """A state with one of its pieces, a number by its dotted name or a tensor, as in a training that begins."""
    (state, tensors), (fresh, begun) = paused, before
    if piece in tensors:
        return state, tensors | {piece: begun[piece]}
    key, _, inner = piece.partition(".")
    value = getattr(fresh, key)
    if inner:
        value = getattr(state, key).model_copy(update={inner: getattr(value, inner)})
    return state.model_copy(update={key: value}), tensors


def pieces(paused: Paused, before: Paused) -> set[str]:
    """The pieces that are not what they were at the beginning."""
    (state, tensors), (_, begun) = paused, before
    found = {name for name, tensor in tensors.items() if tensor.tobytes() != begun[name].tobytes()}
    for key, value in state:
        inner = [f"{key}.{name}" for name, _ in value] if isinstance(value, Record) else [key]
        found |= {piece for piece in inner if planted(paused, before, piece)[0] != state}
    return found


# What says nothing of how a training goes on that neither ended nor diverged: these two have tests of their own below;
# the time; what the config or the next step says again; and what counts where the config has changed.
NOT_SEEN = {"stopped", "rate_factor", "rewinds", "seconds", "selection.rises", "loss.weighted"}
NOT_SEEN |= {"step_rows", "selection.metric"}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_piece_of_state_that_is_left_out_is_noticed(shared_data: Path, name: str) -> None:
    """A planted fault each, all else being right: what follows differs. Without one it does not."""
    before, paused, rest = begun_and_paused(name, shared_data)

    def goes_on_from(state: TrainingState, tensors: Tensors) -> Moments:
        trainer = new(tables(name, shared_data), select("numpy")[0])
        restore(trainer, state, tensors)
        return moments(trainer)

    assert goes_on_from(*paused) == rest
    for piece in pieces(paused, before) - NOT_SEEN:
        assert goes_on_from(*planted(paused, before, piece)) != rest, piece


def test_every_piece_of_state_is_in_one_of_these_trainings(shared_data: Path) -> None:
    """So that the test before leaves out none."""
    known, seen = set(), set()
    for key, field in TrainingState.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [name for kind in kinds if hasattr(kind, "model_fields") for name in kind.model_fields]
        known |= {f"{key}.{name}" for name in inner} or {key}
    for name in LOOKED_AT:
        before, paused, _ = begun_and_paused(name, shared_data)
        found = pieces(paused, before)
        assert found > set(paused[1]), "every tensor has changed"
        seen |= {piece.partition(".layers")[0] for piece in found}
    assert {piece for piece in known if piece not in seen} == NOT_SEEN - {"seconds", "loss.weighted"}
    assert {"parameters", "average", "best", "best_average", "optimizer.mean"} <= seen


def test_steps_of_another_size_go_on_at_the_same_row(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    """After 3 steps of 8 rows: no row of the epoch is left out, and none comes twice."""
    run, changes = tmp_path / "run", {"allow_change": ["train.batch_size"]}
    train(tiny_config(), backend=backend, run=run, interrupted=after(3))
    result = train(tiny_config(train={"batch_size": 4}), backend=backend, run=run, resume=True, **changes)
    assert (result.summary["rows"], result.summary["steps"]) == (100, 3 + 7 + 13)


def test_another_metric_begins_anew(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    """The best loss so far is no accuracy."""
    run, changes = tmp_path / "run", {"allow_change": ["stopping"]}
    options = {"train": {"epochs": 6}}
    train(tiny_config(**options, stopping={}), backend=backend, run=run, interrupted=after(15))
    other = tiny_config(**options, stopping={"metric": "validation_accuracy"})
    best = train(other, backend=backend, run=run, resume=True, **changes).summary["best"]
    seen = [json.loads(line)["validation_accuracy"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (best["metric"], best["value"]) == ("validation_accuracy", max(seen[2:]))


def test_what_a_training_that_ended_or_rewound_has(data: Path) -> None:
    """Planted faults too: `stopped`, `rate_factor` and `rewinds` left out."""
    backend, config = select("numpy")[0], tables("patience", data)
    trainer = new(config, backend)
    moments(trainer)
    state, tensors = take(trainer)
    assert state.stopped == "patience"
    assert moments(other_process(trainer, config, backend)) == []
    forgetful = new(config, backend)
    restore(forgetful, state.model_copy(update={"stopped": ""}), tensors)
    assert len(moments(forgetful)) > 0
    config = tables("noise", data)
    trainer = new(config, backend)
    trainer.step.optimizer.rate_factor, trainer.rewinds = 0.25, 2
    first = moments(trainer, 9)
    assert first[-1]["state"]["rewinds"] == 2
    state, tensors = take(trainer)
    rest = moments(other_process(trainer, config, backend))
    assert rest == moments(trainer)
    for left_out in ({"rate_factor": 1.0}, {"rewinds": 0}):
        forgetful = new(config, backend)
        restore(forgetful, state.model_copy(update=left_out), tensors)
        assert moments(forgetful) != rest


# runs ---------------------------------------------------------------------------------------------------------


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
    real = Optimizer.step

    def runs_out(self: Optimizer, *arguments: Any) -> None:
        if self.steps == 5:
            self.state["mean"].fill(7.0)
            raise MemoryError
        real(self, *arguments)

    run = tmp_path / "run"
    config = tiny_config(checkpoint={"every_steps": 2}, optimizer={"kind": "adam", "learning_rate": 0.01})
    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, "step", runs_out)
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


# going back ---------------------------------------------------------------------------------------------------


def test_a_training_that_diverges_goes_back(backend: Backend, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To the last checkpoint, at half the rate each time: it says so, and no line of what was undone is left."""
    result = train(REWINDS, backend=backend, run=tmp_path / "run")
    state = last_checkpoint(tmp_path / "run").facts.training
    told = [message for message in caplog.messages if "going back to step" in message]
    assert state.rewinds == len(told) > 1
    assert state.rate_factor == 0.5**state.rewinds
    assert f"at half the learning rate, {state.rewinds} of 9 times at most" in told[-1]
    assert {"0", "10"} <= {message.partition("going back to step ")[2].split()[0] for message in told}
    assert result.summary["steps"] == 42
    lines = RunFolder(tmp_path / "run").metrics()
    assert [line["step"] for line in lines] == list(range(1, 43))
    assert lines[-1]["learning_rate"] == 4.0 * state.rate_factor


def test_it_goes_back_so_many_times(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {**REWINDS, "train": {**REWINDS["train"], "max_rewinds": 2}}
    with pytest.raises(UserError, match="the training diverged"):
        train(config, backend="numpy", run=tmp_path / "run")
    assert sum("going back" in message for message in caplog.messages) == 2


@pytest.mark.parametrize("steps", [1, 3, 6, 12, 14, 16])
def test_a_training_that_went_back_and_was_killed(tmp_path: Path, steps: int) -> None:
    """Killed after so many steps of its last try, which it takes again from its last checkpoint."""

    def killed(trainer: Trainer, lines: Any) -> Any:
        for line in lines:
            if trainer.rewinds >= 4 and trainer.steps == steps:
                raise KeyboardInterrupt
            yield line

    train(REWINDS, backend="numpy", run=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(REWINDS, backend="numpy", run=tmp_path / "run", watch=killed)
    resume(tmp_path / "run", backend="numpy")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_parameters_that_are_not_finite_when_they_are_saved(tiny_config: Tiny, tmp_path: Path) -> None:
    """The thread notes it while the next step goes wrong: the training goes back, and the checkpoint is made good."""
    trainers: list[Trainer] = []
    asked = itertools.count(1)

    def watch(trainer: Trainer, lines: Any) -> Any:
        trainers.append(trainer)
        return lines

    def overflow() -> bool:
        if next(asked) == 4:
            trainers[0].model.network.parameters[0] = np.inf
        return False

    config = tiny_config(train={"epochs": 1, "on_divergence": "rewind"}, checkpoint={"every_steps": 2, "keep": 9})
    result = train(config, backend="numpy", run=tmp_path / "run", watch=watch, interrupted=overflow)
    steps = [int(path.stem.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").glob("*.json")]
    assert (result.summary["steps"], trainers[0].rewinds) == (7, 1)
    assert sorted(steps) == [0, 2, 4, 6, 7]


# checkpoints --------------------------------------------------------------------------------------------------


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


# any training, stopped anywhere -------------------------------------------------------------------------------

OPTIMIZERS = [name for name, record in registry.UPDATES.items() if not record.full_batch]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small trainings from all over what a config can ask for."""
    rows, hidden = draw(st.integers(3, 30)), draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    train: dict[str, Any] = {
        "batch_size": draw(st.integers(1, 12)),
        "sampling": choose("shuffled", "ordered", "replacement"),
        "precision": choose("float32", "float64"),
        "log_every": draw(st.integers(1, 9)),
    } | choose({"steps": draw(st.integers(2, 40))}, {"epochs": draw(st.integers(1, 4))})
    train |= choose({}, {"part_rows": draw(st.integers(1, 12))}) | choose({}, {"average_decay": 0.7})
    metrics = ["train_loss", "validation_loss", "validation_r2"] + ["average_validation_mse"] * (
        "average_decay" in train
    )
    return {
        "seed": draw(st.integers(0, 99)),
        "data": {"kind": "linear", "n_inputs": 2, "rows": rows, "validation_rows": 5}
        | choose({}, {"residency": "host", "block_rows": draw(st.integers(1, 7)), "window_blocks": 2}),
        "network": {"hidden": hidden, "normalise": choose(False, True), "biases": choose(False, True)},
        "regularisation": choose(
            {}, {"dropout": 0.4}, {"input_noise": 0.2, "clip_norm": 0.5}, {"l1": 0.01, "max_norm": 1.0}
        ),
        "optimizer": {"kind": choose(*OPTIMIZERS), "learning_rate": 0.05},
        "schedule": choose(
            {"kind": "constant"},
            {"kind": "cosine"},
            {"kind": "plateau", "patience": 0, "threshold": 0.2},
            {"kind": "step", "factor": 0.5, "every": 3, "warmup_steps": 1},
        ),
        "train": train,
    } | choose({}, {"stopping": {"metric": choose(*metrics), "patience": choose(1, 2, 50)}})


@given(config=configs(), stops=st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(max_examples=60)
def test_any_training_stopped_anywhere(config: dict[str, Any], stops: list[int]) -> None:
    backend = select("numpy")[0]
    try:
        trainer = new(config, backend)
    except UserError:  # such as a warm-up longer than the training
        reject()
    seen = []
    for steps in stops:
        seen += moments(trainer, steps)
        trainer = other_process(trainer, config, backend)
    assert seen + moments(trainer) == moments(new(config, backend))
