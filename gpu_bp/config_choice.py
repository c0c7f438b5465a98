"""Records in a config file: one by its name, and its parameters beside the name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict

from gpu_bp.config_types import Section
from gpu_bp.spec import Record


def named(value: Any) -> Any:
    """A bare name stands for a table with that kind."""
    return {"kind": value} if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """One choice stands for a list of one."""
    return value if isinstance(value, list) else [value]


def with_parameters_of(table: Mapping[str, Record]) -> Callable[[dict[str, Any]], None]:
    """Puts the parameters of the records of a table into the JSON Schema of a `Choice` of them."""

    def extend(schema: dict[str, Any]) -> None:
        for record in table.values():
            for name, parameter in record.parameters.items():
                schema["properties"].setdefault(name, parameter.schema())
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
