"""The typed schema of the `[network]` table: layers, activations and initial weights."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from gpu_bp import registry
from gpu_bp.config_choice import Choice, listed, named, names_of, with_parameters_of
from gpu_bp.config_types import Finite, Positive, Section, Width
from gpu_bp.spec import Activation, RowActivation

ActivationName = Annotated[str, Field(json_schema_extra=names_of(registry.ACTIVATIONS))]


class ActivationChoice(Choice):
    """An activation by name, and its parameters."""

    model_config = ConfigDict(json_schema_extra=with_parameters_of(registry.ACTIVATIONS))
    what = "activation"
    kind: ActivationName

    def record(self) -> Activation | RowActivation:
        """The activation with its parameters."""
        return cast(Activation | RowActivation, self.chosen())


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
    BeforeValidator(named, json_schema_input_type=AnyWeights | Literal["uniform", "glorot", "he", "lecun"]),
]
PhiInput = ActivationChoice | ActivationName
Phi = Annotated[ActivationChoice, BeforeValidator(named, json_schema_input_type=PhiInput)]
Phis = Annotated[
    list[Phi], Field(min_length=1), BeforeValidator(listed, json_schema_input_type=PhiInput | list[PhiInput])
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
    normalise: bool = Field(False, description="whether the net inputs of hidden layers are normalised")
    residual: bool = Field(
        False, description="whether a hidden layer that is as wide as its inputs adds them to its outputs"
    )
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
