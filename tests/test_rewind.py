"""A training that diverges goes back to its last checkpoint, at half the learning rate."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import (
    REWINDS,
    Tiny,
    last_checkpoint,
    outcome,
    resume,
    train,
)

from gpu_bp import UserError
from gpu_bp.backends import Backend
from gpu_bp.run_folder import RunFolder
from gpu_bp.trainer import Trainer


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
