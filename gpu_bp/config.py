"""The typed schema of a config file: every key, its type, its default and what it means.

Each table has a module of its own. Reading a file is `config_file.py`; `gpu-bp schema` prints all of this as JSON
Schema, for editors.
"""

from __future__ import annotations

import numbers
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, field_validator, model_validator

from gpu_bp import registry
from gpu_bp.config_choice import Choice, names_of, with_parameters_of
from gpu_bp.config_data import Data
from gpu_bp.config_network import NetworkSection
from gpu_bp.config_regularisation import RegularisationSection
from gpu_bp.config_schedule import Constant, ScheduleSection
from gpu_bp.config_training import CheckpointSection, OptimizerSection, StoppingSection, TrainSection
from gpu_bp.config_types import Section
from gpu_bp.errors import UserError, short
from gpu_bp.noise import Noise
from gpu_bp.spec import Activation, FusedLoss, Loss, RowActivation

LossName = Annotated[str, Field(json_schema_extra=names_of(registry.LOSSES))]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class LossSection(Choice):
    """The loss, and its parameters beside its name: {kind = "huber", threshold = 0.5}."""

    model_config = ConfigDict(json_schema_extra=with_parameters_of(registry.LOSSES))
    what = "loss"
    kind: LossName = "squared_error"
    class_weight: Literal["balanced"] | dict[str, float] | None = Field(
        None, description="what the rows of each class weigh: balanced, or numbers by the class's name, the others 1"
    )

    @field_validator("class_weight", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if isinstance(value, dict) and all(_is_number(weight) for weight in value.values()):
            return {str(name): float(weight) for name, weight in value.items()}
        if value not in (None, "balanced"):
            raise ValueError(f'must be "balanced", or a number a class such as {{cat = 2.0}}, not {short(value)}')
        return value

    def record(self) -> Loss:
        """The loss with its parameters."""
        return cast(Loss, self.chosen())


class Config(Section):
    """A whole config file."""

    name: str = Field("run", pattern=r"^[\w.-]+$", description="of the run, and so of its folder")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of the weights, the order and the data")
    data: Data
    network: NetworkSection = NetworkSection()
    loss: LossSection = LossSection()
    regularisation: RegularisationSection = RegularisationSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = Constant(kind="constant")
    train: TrainSection
    stopping: StoppingSection | None = Field(None, description="which line of metrics is the best, and when to stop")
    checkpoint: CheckpointSection = CheckpointSection()

    def output_activation(self) -> Activation | RowActivation:
        """The record of the output layer's activation.

        Raises:
            UserError: one that the loss excludes.
        """
        loss, asked = self.loss.record(), self.network.output_activation
        own = loss.output_activation if isinstance(loss, FusedLoss) else "identity"
        record = asked.record() if asked else registry.activation(own)
        called = record.origin or record.name  # one's own may have a name of the package's
        if isinstance(loss, FusedLoss) and called != own:
            raise UserError(
                f"network.output_activation: {loss.name} goes with {own} alone, not {called}; leave the key out"
            )
        if not isinstance(loss, FusedLoss) and isinstance(record, RowActivation):
            raise UserError(f"network.output_activation: {record.name} needs loss.kind = 'cross_entropy'")
        return record

    def noise(self) -> Noise | None:
        """Dropout and input noise, None where there is neither."""
        return self.regularisation.noise(self.seed, len(self.network.hidden))

    @model_validator(mode="after")
    def _hidden_layers_to_act_on(self) -> Config:
        hidden = len(self.network.hidden)
        try:
            self.noise()
        except ValueError as error:
            raise ValueError(f"regularisation.dropout: {error}") from None
        asked = {
            "network.normalise": self.network.normalise,
            "network.residual": self.network.residual,
            "regularisation.max_norm": bool(self.regularisation.max_norm),
        }
        for key in (key for key, is_asked in asked.items() if is_asked and not hidden):
            raise ValueError(f"{key} acts on hidden layers, and network.hidden has none; leave it out")
        return self

    @model_validator(mode="after")
    def _output_fits_loss(self) -> Config:
        self.output_activation()
        return self
