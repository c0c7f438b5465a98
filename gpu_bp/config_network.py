"""The typed schema of the `[network]` table: layers, activations and initial weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from gpu_bp import registry
from gpu_bp.config_choice import Choice, listed, named, names_of, with_parameters_of
from gpu_bp.config_types import MOST_LAYERS, Count, Finite, Positive, Section, Width
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


class OrthogonalWeights(Section):
    """Orthonormal rows or columns, whichever are fewer, times `gain`."""

    kind: Literal["orthogonal"]
    gain: Positive = 1.0


class SparseWeights(Section):
    """Each unit has so many connections with normal weights, to units drawn at random; its other weights are 0."""

    kind: Literal["sparse"]
    connections: Count = Field(15, description="of each unit; where there are fewer inputs, to all of them")
    sd: Positive = 1.0


Row = Annotated[list[Finite], Field(min_length=1)]
Matrix = Annotated[list[Row], Field(min_length=1)]


class ArrayWeights(Section):
    """The numbers of one layer, as nested lists; from Python also as arrays."""

    kind: Literal["array"]
    weights: Matrix = Field(description="(n_out, n_in)")
    biases: Row | None = Field(None, description="(n_out,); by default 0")

    @model_validator(mode="after")
    def _rectangular(self) -> ArrayWeights:
        lengths = sorted({len(row) for row in self.weights})
        if len(lengths) > 1:
            raise ValueError(f"the rows of weights must be of one length, not of {' and '.join(map(str, lengths))}")
        return self


class FileWeights(Section):
    """A safetensors or .npz file of all layers, such as the model of another run; or a .npy file, of one layer."""

    kind: Literal["file"]
    path: str

    @property
    def of_one_layer(self) -> bool:
        """Whether it holds the weights of one layer alone."""
        return self.path.lower().endswith(".npy")


def _named_or_array(value: Any) -> Any:
    """A bare matrix stands for a table of it, a bare name for one with that kind."""
    return {"kind": "array", "weights": value} if isinstance(value, list) else named(value)


DrawnWeights = UniformWeights | NormalWeights | ScaledWeights | OrthogonalWeights | SparseWeights
AnyWeights = DrawnWeights | ArrayWeights | FileWeights
WeightsInput = AnyWeights | Literal["uniform", "glorot", "he", "lecun", "orthogonal", "sparse"]
Weights = Annotated[
    AnyWeights,
    Field(discriminator="kind"),
    BeforeValidator(_named_or_array, json_schema_input_type=WeightsInput | Matrix),
]
WeightsOfLayers = Annotated[
    list[Weights],
    Field(min_length=1),
    BeforeValidator(listed, json_schema_input_type=WeightsInput | list[WeightsInput | Matrix]),
]
PhiInput = ActivationChoice | ActivationName
Phi = Annotated[ActivationChoice, BeforeValidator(named, json_schema_input_type=PhiInput)]
Phis = Annotated[
    list[Phi], Field(min_length=1), BeforeValidator(listed, json_schema_input_type=PhiInput | list[PhiInput])
]


class NetworkSection(Section):
    """The layers."""

    hidden: list[Width] = Field(
        [], max_length=MOST_LAYERS, description="units of each hidden layer; none: a single layer"
    )
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
    weights: WeightsOfLayers = Field(
        [ScaledWeights(kind="glorot")],
        description="the initial weights: one choice for all layers, or a list of one a layer, the output's last",
    )

    @model_validator(mode="after")
    def _one_a_layer(self) -> NetworkSection:
        if len(self.activation) not in (1, len(self.hidden)):
            raise ValueError(f"{len(self.activation)} activations are listed for {len(self.hidden)} hidden layers")
        if any(isinstance(choice.record(), RowActivation) for choice in self.activation):
            raise ValueError("softmax can only be the output_activation")
        return self

    @model_validator(mode="after")
    def _weights_of_each_layer(self) -> NetworkSection:
        n_layers, several = len(self.hidden) + 1, len(self.weights) > 1
        files = [choice for choice in self.weights if isinstance(choice, FileWeights)]
        numbers = [choice for choice in self.weights if isinstance(choice, ArrayWeights)]
        if len(self.weights) != n_layers and (several or numbers or any(file.of_one_layer for file in files)):
            raise ValueError(f"{len(self.weights)} weights are listed for {n_layers} layers, the output's included")
        for file in files:
            if several and not file.of_one_layer:
                raise ValueError(
                    f"{file.path} holds the weights of all layers; in a list, a .npy file holds those of one"
                )
        return self

    def hidden_activations(self) -> list[Activation | RowActivation]:
        """One record a hidden layer."""
        listed = self.activation * len(self.hidden) if len(self.activation) == 1 else self.activation
        return [choice.record() for choice in listed]
