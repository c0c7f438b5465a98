"""The typed schema of a config file: every key, its type, its default and what it means.

Reading a file is `config_file.py`; `gpu-bp schema` prints all of this as JSON Schema, for editors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from gpu_bp import registry
from gpu_bp.config_data import Data
from gpu_bp.config_types import Count, Finite, Positive, Rows, Section, Width
from gpu_bp.errors import UserError
from gpu_bp.spec import Activation, FusedLoss, Loss, Record, RowActivation, Update

# network ---------------------------------------------------------------------------------------------------


def _named(value: Any) -> Any:
    """A bare name stands for a table with that kind."""
    return {"kind": value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """One activation stands for a list of one."""
    return value if isinstance(value, list) else [value]


# Names in the tables of records: for the JSON Schema; validation asks the registry.
ActivationName = Annotated[str, Field(json_schema_extra={"enum": [*registry.ACTIVATIONS]})]
LossName = Annotated[str, Field(json_schema_extra={"enum": [*registry.LOSSES]})]
UpdateName = Annotated[str, Field(json_schema_extra={"enum": [*registry.UPDATES]})]


def _with_parameters_of(table: Mapping[str, Record]) -> Callable[[dict[str, Any]], None]:
    """Puts the parameters of the records of a table into the JSON Schema of a `Choice` of them."""

    def extend(schema: dict[str, Any]) -> None:
        for record in table.values():
            for name, parameter in record.parameters.items():
                what = {"type": "number", "description": f"in {parameter.interval}", "default": parameter.default}
                schema["properties"].setdefault(name, what)
        schema["additionalProperties"] = False

    return extend


class Choice(Section):
    """One record by name, and its parameters beside the name: "relu", or {kind = "leaky_relu", slope = 0.1}."""

    model_config = ConfigDict(extra="allow")
    kind: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters given."""
        return self.model_extra or {}


class ActivationChoice(Choice):
    """An activation by name, and its parameters."""

    model_config = ConfigDict(json_schema_extra=_with_parameters_of(registry.ACTIVATIONS))
    kind: ActivationName

    @model_validator(mode="after")
    def _known(self) -> ActivationChoice:
        self.record()
        return self

    def record(self) -> Activation | RowActivation:
        """The activation with its parameters."""
        return registry.activation(self.kind, **self.parameters)


class UniformWeights(Section):
    """Uniform between two numbers."""

    kind: Literal["uniform"]
    low: Finite = -0.1
    high: Finite = 0.1

    @model_validator(mode="after")
    def _ordered(self) -> UniformWeights:
        if self.low >= self.high:
            raise ValueError("low must be less than high")
        return self


class NormalWeights(Section):
    """Normal with mean 0 and one standard deviation for all layers."""

    kind: Literal["normal"]
    sd: Positive


class ScaledWeights(Section):
    """Mean 0 and a variance set by the widths: glorot 2 / (n_in + n_out), he 2 / n_in, lecun 1 / n_in."""

    kind: Literal["glorot", "he", "lecun"]
    distribution: Literal["normal", "uniform"] = "normal"


class FileWeights(Section):
    """Named tensors from a safetensors file, such as the model of another run."""

    kind: Literal["file"]
    path: str


AnyWeights = UniformWeights | NormalWeights | ScaledWeights | FileWeights
Weights = Annotated[
    AnyWeights,
    Field(discriminator="kind"),
    BeforeValidator(_named, json_schema_input_type=AnyWeights | Literal["uniform", "glorot", "he", "lecun"]),
]
PhiInput = ActivationChoice | ActivationName
Phi = Annotated[ActivationChoice, BeforeValidator(_named, json_schema_input_type=PhiInput)]
Phis = Annotated[
    list[Phi], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=PhiInput | list[PhiInput])
]


class NetworkSection(Section):
    """The layers."""

    hidden: list[Width] = Field([], description="units of each hidden layer; none: a single layer")
    activation: Phis = Field(
        [ActivationChoice(kind="tanh")], description="of the hidden layers: one for all, or a list of one a layer"
    )
    output_activation: Phi | None = Field(
        None, description="by default the loss's own, or identity where the loss goes with any"
    )
    biases: bool = Field(True, description="whether layers have biases; they start at 0")
    weights: Weights = Field(ScaledWeights(kind="glorot"), description="the initial weights")

    @model_validator(mode="after")
    def _one_a_layer(self) -> NetworkSection:
        if len(self.activation) not in (1, len(self.hidden)):
            raise ValueError(f"{len(self.activation)} activations are listed for {len(self.hidden)} hidden layers")
        if any(isinstance(choice.record(), RowActivation) for choice in self.activation):
            raise ValueError("softmax can only be the output_activation")
        return self

    def hidden_activations(self) -> list[Activation | RowActivation]:
        """One record a hidden layer."""
        listed = self.activation * len(self.hidden) if len(self.activation) == 1 else self.activation
        return [choice.record() for choice in listed]


# loss, optimizer, schedule, training -----------------------------------------------------------------------


class LossSection(Choice):
    """The loss, and its parameters beside its name: {kind = "huber", threshold = 0.5}."""

    model_config = ConfigDict(json_schema_extra=_with_parameters_of(registry.LOSSES))
    kind: LossName = "squared_error"

    @model_validator(mode="after")
    def _known(self) -> LossSection:
        self.record()
        return self

    def record(self) -> Loss:
        """The loss with its parameters."""
        return registry.loss(self.kind, **self.parameters)


class OptimizerSection(Choice):
    """The update rule, and its parameters beside its name: {kind = "adam", learning_rate = 0.001, beta1 = 0.9}."""

    model_config = ConfigDict(json_schema_extra=_with_parameters_of(registry.UPDATES))
    kind: UpdateName = "sgd"
    learning_rate: Positive = Field(description="at the first step")

    @model_validator(mode="after")
    def _known(self) -> OptimizerSection:
        self.record()
        return self

    def record(self) -> Update:
        """The update rule with its parameters."""
        return registry.update(self.kind, **self.parameters)


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
    BeforeValidator(_named, json_schema_input_type=AnySchedule | Literal["constant", "linear"]),
]


class TrainSection(Section):
    """How long, and in which batches."""

    epochs: Count | None = Field(None, description="passes over the training rows; either this or steps")
    steps: Count | None = Field(None, description="steps; either this or epochs")
    batch_size: Count = Field(32, description="rows a step; more than there are means all")
    sampling: Literal["shuffled", "ordered", "replacement"] = Field("shuffled", description="which rows a step sees")
    precision: Literal["float32", "float64"] = Field("float32", description="of all arithmetic")
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


class Config(Section):
    """A whole config file."""

    name: str = Field("run", pattern=r"^[\w.-]+$", description="of the run, and so of its folder")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of the weights, the order and the data")
    data: Data
    network: NetworkSection = NetworkSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = Constant(kind="constant")
    train: TrainSection

    def output_activation(self) -> Activation | RowActivation:
        """The record of the output layer's activation.

        Raises:
            UserError: one that the loss excludes.
        """
        loss, asked = self.loss.record(), self.network.output_activation
        own = loss.output_activation if isinstance(loss, FusedLoss) else "identity"
        record = asked.record() if asked else registry.activation(own)
        if isinstance(loss, FusedLoss) and record.name != own:
            raise UserError(
                f"network.output_activation: {loss.name} goes with {own} alone, not {record.name}; leave the key out"
            )
        if not isinstance(loss, FusedLoss) and isinstance(record, RowActivation):
            raise UserError(f"network.output_activation: {record.name} needs loss.kind = 'cross_entropy'")
        return record

    @model_validator(mode="after")
    def _output_fits_loss(self) -> Config:
        self.output_activation()
        return self
