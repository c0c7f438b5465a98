"""What the tables of a config file are made of, and of other files with a schema: manifests and model files."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**15)]
Width = Annotated[int, Field(ge=1, le=2**31 - 1)]
MOST_LAYERS = 1000


def _power_of_two(number: int) -> int:
    if number & (number - 1):
        below = 1 << number.bit_length() - 1
        raise ValueError(f"must be a power of two, as {below} or {2 * below}, not {number}")
    return number


PowerOfTwo = Annotated[int, Field(ge=1, le=2**16), AfterValidator(_power_of_two)]
Rows = Annotated[int, Field(ge=0, le=10**15)]


class Section(BaseModel):
    """A table, or a JSON object: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def first_fault(error: ValidationError) -> str:
    """The first of the faults that pydantic found in JSON: the key, and what is wrong."""
    fault = error.errors(include_url=False)[0]
    key, what = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
    return f"{key}: {what[:1].lower()}{what[1:]}" if key else what
