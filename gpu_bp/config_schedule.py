"""The typed schema of the `[schedule]` table: how the learning rate changes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from gpu_bp.config_choice import named
from gpu_bp.config_types import Count, Section


class Constant(Section):
    """The same learning rate throughout."""

    kind: Literal["constant"]


class LinearSchedule(Section):
    """In a straight line to a final rate."""

    kind: Literal["linear"]
    final: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.0, description="the rate of the last step")
    steps: Count | None = Field(None, description="over so many steps; by default all of the training's")


class FactorSchedule(Section):
    """Multiplied by a factor in every so many steps: smoothly (exponential), or at once (step)."""

    kind: Literal["exponential", "step"]
    factor: Annotated[float, Field(gt=0, le=1)]
    every: Count = Field(description="steps")


AnySchedule = Constant | LinearSchedule | FactorSchedule
ScheduleSection = Annotated[
    AnySchedule,
    Field(discriminator="kind"),
    BeforeValidator(named, json_schema_input_type=AnySchedule | Literal["constant", "linear"]),
]
