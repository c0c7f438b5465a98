"""All that a training has made so far: what it is at a step, taken as numbers and named tensors, and given back.

Data, order, noise and schedules are functions of the config and the step, so that little is state: the flat buffers
(parameters, the optimizer's arrays, the average, the best parameters), and a few numbers beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from gpu_bp.config_types import Rows as Number
from gpu_bp.errors import UserError
from gpu_bp.spec import Array

if TYPE_CHECKING:
    from gpu_bp.trainer import Trainer

Tensors = dict[str, np.ndarray]


class Record(BaseModel):
    """A JSON object: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LossState(Record):
    """The training loss since the last line of metrics, as `Objective.state` gives it."""

    total: float = Field(allow_inf_nan=False)
    weight: float = Field(allow_inf_nan=False)
    rows: Number
    weighted: bool


class PlateauState(Record):
    """What a plateau has made of the lines, as `Plateau.state` gives it."""

    rate: float
    best: float | None
    waited: Number


class SelectionState(Record):
    """As `Selection.state` gives it."""

    metric: str
    best: float | None
    step: Number
    since: Number
    last: float | None
    rises: bool


class ScalingState(Record):
    """As `LossScaling.state` gives it."""

    scale: float = Field(gt=0, allow_inf_nan=False)
    good: Number


class TrainingState(Record):
    """The numbers of a training's state.

    step, rows, seconds: taken so far. epoch, epoch_step: of the next step, both from 0. step_rows: of a step. stopped:
    why it ended, where it did so before its length. rate_factor, rewinds: after divergences.
    """

    step: Number
    rows: Number
    seconds: float = Field(ge=0, allow_inf_nan=False)
    epoch: Number
    epoch_step: Number
    step_rows: Annotated[Number, Field(ge=1)]
    stopped: str
    rate_factor: float = Field(gt=0, le=1)
    rewinds: Number
    loss: LossState
    schedule: PlateauState | None
    selection: SelectionState | None
    scaling: ScalingState | None = None  # of the loss, in float16


def take(trainer: Trainer) -> tuple[TrainingState, Tensors]:
    """The state after the last step, copied to the host. Waits for the device."""
    optimizer, selection = trainer.step.optimizer, trainer.selection
    state = TrainingState(
        step=trainer.steps,
        rows=trainer.rows,
        seconds=trainer.seconds,
        epoch=trainer.epoch,
        epoch_step=trainer.epoch_step,
        step_rows=trainer.step_rows,
        stopped="" if trainer.paused else trainer.stopped,
        rate_factor=optimizer.rate_factor,
        rewinds=trainer.rewinds,
        loss=LossState(**trainer.step.objective.state()),
        schedule=PlateauState(**numbers) if (numbers := optimizer.schedule.state()) else None,
        selection=SelectionState(**selection.state()) if selection else None,
        scaling=ScalingState(**scaling.state()) if (scaling := trainer.step.scaling) else None,
    )
    network = trainer.model.network
    tensors = {
        f"{buffer_name}.{name}": tensor
        for buffer_name, buffer in _buffers(trainer).items()
        for name, tensor in network.tensors(buffer).items()
    }
    return state, tensors


def restore(trainer: Trainer, state: TrainingState, tensors: Mapping[str, np.ndarray]) -> None:
    """Goes on as the training did whose state this is.

    Raises:
        UserError: it is of another network, optimizer or selection.
    """
    optimizer, selection, average = trainer.step.optimizer, trainer.selection, trainer.average
    buffers = _buffers(trainer)
    unknown = [name for name in tensors if not any(name.startswith(f"{buffer}.layers.") for buffer in buffers)]
    if unknown or (selection is None) != (state.selection is None):
        what = f"it has {unknown[0]}" if unknown else "[stopping] is in one of them alone"
        raise UserError(f"the state is of another training: {what}")
    for name, buffer in buffers.items():
        own = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.layers.")}
        try:
            trainer.model.network.load(own, buffer)
        except UserError as error:
            raise UserError(f"the state is of another training: {name}: {error}") from None
    trainer.steps, trainer.rows, trainer.seconds = state.step, state.rows, state.seconds
    trainer.go_to(state.epoch, state.epoch_step * state.step_rows // trainer.step_rows)  # by rows, were it others
    trainer.stopped, trainer.rewinds = state.stopped, state.rewinds
    optimizer.steps, optimizer.rate_factor = state.step, state.rate_factor
    trainer.step.reset_flag()
    trainer.step.objective.restore(state.loss.model_dump())
    if state.schedule:
        optimizer.schedule.restore(state.schedule.model_dump())
    if selection and state.selection and state.selection.metric == selection.best["metric"]:
        selection.restore_state(state.selection.model_dump())
    if trainer.step.scaling and state.scaling:
        trainer.step.scaling.restore(state.scaling.model_dump())
    if average:
        average.begun = state.step > 0


def _buffers(trainer: Trainer) -> dict[str, Array]:
    """The flat buffers that are the training's state, by name."""
    optimizer, average, selection = trainer.step.optimizer, trainer.average, trainer.selection
    buffers: dict[str, Array] = {"parameters": trainer.model.network.parameters}
    buffers |= {f"optimizer.{name}": array for name, array in optimizer.state.items()}
    if average:
        buffers["average"] = average.network.parameters
    if selection:
        buffers |= dict(zip(("best", "best_average"), selection.kept, strict=False))
    return buffers
