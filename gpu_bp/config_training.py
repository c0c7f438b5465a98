"""The typed schema of the `[optimizer]`, `[train]`, `[stopping]` and `[checkpoint]` tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationInfo,
    model_validator,
)

from gpu_bp import own, registry
from gpu_bp.config_choice import Choice, listed, names_of, with_parameters_of
from gpu_bp.config_types import Count, Positive, PowerOfTwo, Rows, Section
from gpu_bp.metrics import METRICS, Metric, find
from gpu_bp.precision import PrecisionName
from gpu_bp.spec import Update

UpdateName = Annotated[str, Field(json_schema_extra=names_of(registry.UPDATES))]
MetricName = Annotated[str, Field(json_schema_extra=names_of(METRICS))]


class OptimizerSection(Choice):
    """The update rule, and its parameters beside its name: {kind = "adam", learning_rate = 0.001, eps = 1e-7}."""

    model_config = ConfigDict(json_schema_extra=with_parameters_of(registry.UPDATES))
    what = "optimizer"
    kind: UpdateName = "sgd"
    learning_rate: Positive = Field(description="at the first step")

    def record(self) -> Update:
        """The update rule with its parameters."""
        return cast(Update, self.chosen())


class MetricSection(Section):
    """A metric by name; a function of one's own has keys beside its name. From Python the function itself may stand
    where its name may."""

    kind: MetricName
    on: Literal["predictions", "outputs"] | None = Field(
        None, description="what one's own is given beside the targets; by default predictions"
    )
    higher_is_better: bool | None = Field(None, description="of one's own; needed where a model is selected by it")
    _found: Metric = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _find(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Finds the metric once, as `Choice` does its record."""
        passed = tuple((info.context or {}).get("own", ()))
        given = value.get("kind") if isinstance(value, Mapping) else None
        if callable(given):
            value, passed = {**value, "kind": own.name_of(given)[0]}, (given, *passed)
        section = handler(value)
        if section is not value:
            section._found = find(section.kind, passed, section.on, section.higher_is_better)
        return section

    def record(self) -> Metric:
        """The metric."""
        return self._found


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) or callable(value) else value


MetricInput = MetricSection | MetricName
AnyMetric = Annotated[MetricSection, BeforeValidator(_named, json_schema_input_type=MetricInput)]
Metrics = Annotated[list[AnyMetric], BeforeValidator(listed, json_schema_input_type=MetricInput | list[MetricInput])]


class TrainSection(Section):
    """How long, and in which batches."""

    epochs: Count | None = Field(None, description="passes over the training rows; either this or steps")
    steps: Count | None = Field(None, description="steps; either this or epochs")
    batch_size: Count = Field(32, description="rows a step; more than there are means all")
    part_rows: Count | None = Field(
        None,
        description="rows that are computed at a time, at most; their gradients are summed; by default a whole step",
    )
    shards: PowerOfTwo = Field(
        1,
        description="into which a step's rows are split, and from whose sums its gradient is summed in a fixed order: "
        "as many workers at most give the same bits, however many there are; a power of two",
    )
    sampling: Literal["shuffled", "ordered", "replacement"] = Field("shuffled", description="which rows a step sees")
    precision: PrecisionName = Field(
        "float32",
        description="of all arithmetic; tf32, bfloat16 and float16: of the factors of products, the rest float32",
    )
    average_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="of a moving average of the parameters, evaluated and saved beside them; by default none"
    )
    log_every: Count | None = Field(
        None, description="steps a line of metrics; by default a line an epoch, or a hundred where rows are seen once"
    )
    stop_at_errors: Rows | None = Field(
        None, description="stop once the training rows, the first 131,072 at most, have at most so many errors"
    )
    max_minutes: Positive | None = Field(
        None, description="stop after so long, data reading included, with a checkpoint to resume from"
    )
    on_divergence: Literal["stop", "rewind"] = Field(
        "stop",
        description="where the loss or a gradient is not finite; rewind: to the last checkpoint, at half the rate",
    )
    max_rewinds: Count = Field(3, description="after so many the training stops")
    metrics: Metrics = Field([], description="beside the loss and the usual ones of the task, or a single one")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    def total_steps(self, per_epoch: int) -> int:
        """Steps in all, where an epoch has so many."""
        return self.steps or (self.epochs or 0) * per_epoch

    def metric_records(self) -> list[Metric]:
        """The metrics that are listed."""
        return [section.record() for section in self.metrics]


class StoppingSection(Section):
    """The best line of metrics: its parameters are kept, and where no better line comes, the training stops."""

    metric: str = Field("validation_loss", description="a key of the lines of metrics, such as validation_accuracy")
    patience: Count | None = Field(
        None, description="stop after so many lines without a better one; by default the training goes on to its end"
    )
    minimum_improvement: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="by how much a metric must be better than the best before it, to be the best"
    )


EVERY_MINUTES = 5.0  # where nothing else is said


class CheckpointSection(Section):
    """When a checkpoint is written, and how many are kept. It does not change what is trained."""

    every_steps: Count | None = None
    every_epochs: Count | None = None
    every_minutes: Positive | None = Field(None, description="5 where none of the three is given")
    keep: Count = Field(2, description="the newest; and, with [stopping], the best of them besides")

    @property
    def minutes(self) -> float | None:
        """Minutes between two checkpoints, None where only steps count."""
        return (
            EVERY_MINUTES
            if (self.every_steps, self.every_epochs, self.every_minutes) == (None,) * 3
            else self.every_minutes
        )
