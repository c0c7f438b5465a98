"""Records in a config file: one by its name, and its parameters beside the name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, ModelWrapValidatorHandler, PrivateAttr, ValidationInfo, model_validator

from gpu_bp import registry
from gpu_bp.config_types import Section
from gpu_bp.spec import Record


def named(value: Any) -> Any:
    """A bare name, or a record itself, stands for a table with that kind."""
    return {"kind": value} if isinstance(value, str | Record) else value


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


def names_of(table: Mapping[str, Record]) -> dict[str, Any]:
    """The names of a table, or of a record of one's own, as JSON Schema; validation asks the registry."""
    return {"anyOf": [{"enum": [*table]}, {"pattern": "^[^:]+:[^:]+$"}]}


class Choice(Section):
    """One record by name, and its parameters beside the name: "relu", or {kind = "leaky_relu", slope = 0.1}.

    From Python the record itself may stand where its name may.
    """

    model_config = ConfigDict(extra="allow")
    what: ClassVar[str]  # of registry.TABLES
    kind: str
    _found: Record = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _find(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Finds the record once, so that no later reading of the config can find another."""
        passed = tuple((info.context or {}).get("own", ()))
        given = value.get("kind") if isinstance(value, Mapping) else None
        if isinstance(given, Record):
            name, chosen = registry.name_of(given)
            value, passed = {**chosen, **value, "kind": name}, (given, *passed)
        choice = handler(value)
        if choice is not value:
            choice._found = registry.find(cls.what, choice.kind, passed)
            choice.chosen()
        return choice

    def chosen(self) -> Record:
        """The record with its parameters."""
        return registry.choose(self._found, self.kind, self.parameters)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters given."""
        return self.model_extra or {}
