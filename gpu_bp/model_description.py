"""What a model file says beside its tensors: the architecture, the preparation, and what its outputs are.

It is JSON of one schema, which is checked whole before anything is made of it: every type, that numbers are finite, and
that what belongs together is of one width.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from gpu_bp.config_types import Finite, Positive, Section, Width, first_fault
from gpu_bp.errors import short

FORMAT = 1


class NamedRecord(Section):
    """A record by name, and its parameters beside the name."""

    model_config = ConfigDict(extra="allow")
    kind: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters given."""
        return self.model_extra or {}


class _Numeric(Section):
    name: str
    mean: Finite
    sd: Positive

    @property
    def width(self) -> int:
        return 1


class _Categorical(Section):
    name: str
    categories: Annotated[list[str], Field(min_length=1)]

    @property
    def width(self) -> int:
        return len(self.categories)


_Columns = Annotated[list[_Numeric | _Categorical], Field(min_length=1)]


class _TableColumns(Section):
    inputs: _Columns
    targets: _Columns


class _Preparation(Section):
    """As `Preparation.to_json` writes it."""

    decision: Literal["none", "sign", "half", "argmax"]
    classes: list[str]
    columns: _TableColumns | None
    shift: list[Finite]
    scale: list[Positive]
    target_shift: list[Finite] = Field([])  # older files have neither
    target_scale: list[Positive] = Field([])

    @model_validator(mode="after")
    def _shifts_and_scales(self) -> _Preparation:
        if len(self.shift) != len(self.scale) or len(self.target_shift) != len(self.target_scale):
            raise ValueError("there must be as many shifts as scales")
        return self

    def refuse_other(self, n_inputs: int, n_outputs: int, groups: int) -> None:
        """Raises ValueError where a network of so many inputs and outputs, `groups` a target, does not go with it."""
        inputs = sum(column.width for column in self.columns.inputs) if self.columns else len(self.shift)
        if inputs != n_inputs:
            raise ValueError(f"its preparation gives {inputs} inputs, its network takes {n_inputs}")
        n_targets, named = n_outputs // groups, len(self.classes)
        wanted = n_targets
        if self.decision == "none":
            if self.columns:
                wanted = sum(column.width for column in self.columns.targets)
            elif self.target_shift:
                wanted = len(self.target_shift)
        elif groups > 1 or (named and (named != n_targets if self.decision == "argmax" else named < 2)):
            raise ValueError(f"its {named} classes do not go with {n_outputs} outputs")
        if n_outputs != wanted * groups:
            raise ValueError(f"its preparation is of {wanted} targets, its network has {n_outputs} outputs")


class Description(Section):
    """All of it."""

    format: Literal[1]
    widths: Annotated[list[Width], Field(min_length=2)]
    activations: list[NamedRecord]
    biases: bool
    normalise: bool = False  # older files have neither this nor the next
    residual: bool = False
    dtype: Literal["float32", "float64"]
    preparation: _Preparation
    loss: NamedRecord | None = None

    @model_validator(mode="after")
    def _one_a_layer(self) -> Description:
        if len(self.activations) != len(self.widths) - 1:
            raise ValueError(f"{len(self.widths) - 1} layers need as many activations, not {len(self.activations)}")
        return self

    @classmethod
    def read(cls, text: str) -> Description:
        """From JSON.

        Raises:
            ValueError: it is of another format, or not of the schema (which key).
        """
        raw = from_json(text)
        if isinstance(raw, dict) and "format" in raw and raw["format"] != FORMAT:
            raise ValueError(f"it has model format {short(raw['format'])}, this version reads {FORMAT}")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(first_fault(error)) from None
