"""The typed schema of the `[optimizer]`, `[train]` and `[stopping]` tables."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import ConfigDict, Field, model_validator

from gpu_bp import registry
from gpu_bp.config_choice import Choice, names_of, with_parameters_of
from gpu_bp.config_types import Count, Positive, Rows, Section
from gpu_bp.spec import Update

UpdateName = Annotated[str, Field(json_schema_extra=names_of(registry.UPDATES))]


class OptimizerSection(Choice):
    """The update rule, and its parameters beside its name: {kind = "adam", learning_rate = 0.001, eps = 1e-7}."""

    model_config = ConfigDict(json_schema_extra=with_parameters_of(registry.UPDATES))
    what = "optimizer"
    kind: UpdateName = "sgd"
    learning_rate: Positive = Field(description="at the first step")

    def record(self) -> Update:
        """The update rule with its parameters."""
        return cast(Update, self.chosen())


class TrainSection(Section):
    """How long, and in which batches."""

    epochs: Count | None = Field(None, description="passes over the training rows; either this or steps")
    steps: Count | None = Field(None, description="steps; either this or epochs")
    batch_size: Count = Field(32, description="rows a step; more than there are means all")
    part_rows: Count | None = Field(
        None,
        description="rows that are computed at a time, at most; their gradients are summed; by default a whole step",
    )
    sampling: Literal["shuffled", "ordered", "replacement"] = Field("shuffled", description="which rows a step sees")
    precision: Literal["float32", "float64"] = Field("float32", description="of all arithmetic")
    average_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="of a moving average of the parameters, evaluated and saved beside them; by default none"
    )
    log_every: Count | None = Field(
        None, description="steps a line of metrics; by default a line an epoch, or a hundred where rows are seen once"
    )
    stop_at_errors: Rows | None = Field(
        None, description="stop once the training rows, the first 131,072 at most, have at most so many errors"
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self


class StoppingSection(Section):
    """The best line of metrics: its parameters are kept, and where no better line comes, the training stops."""

    metric: str = Field("validation_loss", description="a key of the lines of metrics, such as validation_accuracy")
    patience: Count | None = Field(
        None, description="stop after so many lines without a better one; by default the training goes on to its end"
    )
    minimum_improvement: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="by how much a metric must be better than the best before it, to be the best"
    )
