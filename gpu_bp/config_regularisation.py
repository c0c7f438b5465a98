"""The typed schema of the `[regularisation]` table: what keeps a network from learning its rows by heart."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from gpu_bp.config_choice import listed
from gpu_bp.config_types import Section
from gpu_bp.noise import Noise

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Rates = Annotated[list[Rate], Field(min_length=1), BeforeValidator(listed, json_schema_input_type=Rate | list[Rate])]


class RegularisationSection(Section):
    """Penalties, noise and limits; 0 is none of it, and costs nothing."""

    l1: NotNegative = Field(0.0, description="the loss has l1 times the sum of |w| beside it")
    l2: NotNegative = Field(0.0, description="the loss has l2 / 2 times the sum of w^2 beside it")
    weight_decay: NotNegative = Field(0.0, description="weights shrink by learning_rate * weight_decay of them a step")
    biases: bool = Field(False, description="whether these three act on biases and gains too")
    dropout: Rates = Field([0.0], description="share of a hidden layer's outputs that a step leaves out, or a list")
    input_dropout: Rate = Field(0.0, description="likewise of the inputs")
    input_noise: NotNegative = Field(0.0, description="standard deviation of normal noise added to the inputs")
    clip_norm: NotNegative = Field(0.0, description="the mean gradient is shrunk to this length where it is longer")
    clip_value: NotNegative = Field(0.0, description="its elements are cut to [-clip_value, clip_value]")
    max_norm: NotNegative = Field(
        0.0, description="likewise the length of the weights of each hidden unit, after the update"
    )

    def noise(self, seed: int, n_hidden: int) -> Noise | None:
        """What a step of a network with so many hidden layers leaves to chance; None where nothing.

        Raises:
            ValueError: another number of dropout rates is listed, or there is no layer for them.
        """
        if self.dropout != [0.0] and (len(self.dropout) not in (1, n_hidden) or not n_hidden):
            raise ValueError(f"a list of {len(self.dropout)} for {n_hidden} hidden layers; give one rate a layer")
        rates = tuple(self.dropout * n_hidden if len(self.dropout) == 1 else self.dropout) if any(self.dropout) else ()
        noise = Noise(seed, rates, self.input_dropout, self.input_noise)
        return noise if noise.dropout or noise.on_inputs else None

    @property
    def penalties(self) -> dict[str, float]:
        """By the names of `registry.PENALTIES`."""
        return {name: getattr(self, name) for name in ("l1", "l2", "weight_decay", "clip_value")}
