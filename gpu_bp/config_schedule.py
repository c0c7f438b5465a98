"""The typed schema of the `[schedule]` table: how the learning rate changes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from gpu_bp.config_choice import named
from gpu_bp.config_types import Count, Section
from gpu_bp.errors import UserError
from gpu_bp.schedule import SCHEDULES, Schedule, WarmUp

FromZero = Annotated[int, Field(ge=0, le=10**15)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Divisor = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class _Kind(Section):
    """What all kinds have: a name, parameters (all keys but these), and a warm-up before them."""

    kind: str
    warmup_steps: FromZero = Field(0, description="of a warm-up, before the steps of the schedule itself")
    warmup_start: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="the part of the schedule's first rate that a warm-up starts from"
    )

    @model_validator(mode="after")
    def _start_of_a_warmup(self) -> _Kind:
        if self.warmup_start and not self.warmup_steps:
            raise ValueError("warmup_start needs warmup_steps")
        return self

    def over(self, rate: float, total_steps: int) -> Schedule:
        """The schedule for a training of so many steps.

        Raises:
            UserError: it does not fit into them, or the rate.
        """
        left = total_steps - self.warmup_steps
        if left < 1:
            raise UserError(
                f"schedule.warmup_steps is {self.warmup_steps}, and the whole training has {total_steps} steps; "
                "set it below"
            )
        then = SCHEDULES[self.kind](rate, **self._parameters(left))
        return WarmUp(then, self.warmup_steps, self.warmup_start) if self.warmup_steps else then

    def _parameters(self, left: int) -> dict[str, Any]:
        """The schedule's parameters, for so many steps after the warm-up."""
        return self.model_dump(exclude=set(_Kind.model_fields))


class Constant(_Kind):
    """The same learning rate throughout."""

    kind: Literal["constant"]


class _WithLength(_Kind):
    steps: Count | None = Field(
        None, description="over so many steps; by default all of the training's after a warm-up"
    )

    def _parameters(self, left: int) -> dict[str, Any]:
        return {**super()._parameters(left), "steps": self.steps or left}


class FinalSchedule(_WithLength):
    """To a final rate: in a straight line (linear), or along half a wave (cosine)."""

    kind: Literal["linear", "cosine"]
    final: Rate = Field(0.0, description="the rate of the last step")


class OneCycle(_WithLength):
    """Up to the learning rate and down to next to nothing."""

    kind: Literal["one_cycle"]
    pct_start: Annotated[float, Field(gt=0, lt=1)] = Field(0.3, description="the part of the steps that go up")
    div_factor: Divisor = Field(25.0, description="learning_rate / the first rate")
    final_div_factor: Divisor = Field(1e4, description="the first rate / the last rate")

    def _parameters(self, left: int) -> dict[str, Any]:
        if self.steps and self.steps > left:
            raise UserError(
                f"schedule.steps is {self.steps}, and the training has {left} after the warm-up, so that one_cycle "
                "would never end; leave it out, and it takes all of them"
            )
        return super()._parameters(left)


class FactorSchedule(_Kind):
    """Multiplied by a factor in every so many steps: smoothly (exponential), or at once (step)."""

    kind: Literal["exponential", "step"]
    factor: Annotated[float, Field(gt=0, le=1)]
    every: Count = Field(description="steps")


class InverseTime(_Kind):
    """Divided by 1 + step / after: search, then converge."""

    kind: Literal["inverse_time"]
    after: Count = Field(description="steps to half the learning rate")


class PlateauSchedule(_Kind):
    """Multiplied by a factor where a loss stays as it is."""

    kind: Literal["plateau"]
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    patience: FromZero = Field(10, description="lines of metrics in a row without an improvement that are borne")
    threshold: Annotated[float, Field(ge=0, lt=1)] = Field(1e-4, description="a part of the best loss so far")
    minimum: Rate = Field(0.0, description="the rate is never less")
    metric: Literal["train_loss", "validation_loss"] = Field("train_loss", description="as in a line of metrics")


AnySchedule = Constant | FinalSchedule | OneCycle | FactorSchedule | InverseTime | PlateauSchedule
ScheduleSection = Annotated[
    AnySchedule,
    Field(discriminator="kind"),
    BeforeValidator(
        named,
        json_schema_input_type=AnySchedule | Literal["constant", "linear", "cosine", "one_cycle", "plateau"],
    ),
]
