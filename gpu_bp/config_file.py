"""Config files: TOML in, with `KEY.PATH=VALUE` overrides, and TOML out, complete and with absolute paths."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tomli_w
from pydantic import BaseModel, ValidationError

from gpu_bp.config import Config
from gpu_bp.errors import UserError, nearest, short
from gpu_bp.own import Piece, absolute, change_names, names, refuse_untrusted
from gpu_bp.plain_file import read_text

# Of a key with thousands of parts, a.a.a.a, tomllib takes minutes. No more than a few are ever needed.
KEY_PARTS = 32
LONG_KEY = re.compile(rf"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{KEY_PARTS - 1}}}[\w"'-]""")

# Bits of an integer, which of many more could not even be printed.
LONG_INTEGER = 10_000

# Keys that name files: made absolute when a config is read.
PATH_KEYS = (
    ("data", "path"),
    ("data", "inputs"),
    ("data", "targets"),
    ("data", "weights"),
    ("network", "weights", "path"),
)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, own: Sequence[Piece] = (), trust_code: bool = True
) -> Config:
    """The config in a TOML file. Overrides are `KEY.PATH=VALUE`, VALUE in TOML, or else a string.

    Args:
        own: pieces of one's own that it names, passed again.
        trust_code: whether what it names as `module:object` may be imported.

    Raises:
        UserError: no such file, not TOML (which line), an unknown key or name, a wrong type or value.
    """
    path = Path(path)
    try:
        text = read_text(path, "utf-8-sig")
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config {path} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    if LONG_KEY.search(text):
        raise UserError(f"config {path} is not TOML as it is needed here: a key has {KEY_PARTS} parts or more")
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOML's own error is a ValueError; so is a number of 5000 digits
        raise UserError(f"config {path} is not TOML: {error}") from None
    if not raw:
        raise UserError(f"config {path} is empty")
    for override in overrides:
        _override(raw, override)
    return parse_config({"name": _run_name(path), **raw}, str(path), own=own, trust_code=trust_code)


def parse_config(
    raw: Mapping[str, Any], where: str = "config", *, own: Sequence[Piece] = (), trust_code: bool = True
) -> Config:
    """The config in nested tables, as a TOML file holds them, or NumPy arrays for lists; paths are made absolute.

    Raises:
        UserError: as `load_config`.
    """
    try:
        plain = _plain(raw)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: tables or lists are nested too deep") from None
    try:
        raw = change_names(plain, absolute)
        refuse_untrusted(names(raw), where, own, trust_code)
        return Config.model_validate(raw, context={"own": own})
    except ValidationError as error:
        raise UserError(f"{where}: {_describe(error, raw)}") from None
    except RecursionError:
        raise UserError(f"{where}: tables or lists are nested too deep") from None


def dump_config(config: Config) -> str:
    """The config as TOML: every key, so that it trains the same again."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _run_name(path: Path) -> str:
    """A name for the run from the file's: letters, digits, '-', '_' and '.'."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in path.stem) or "run"


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"override {override!r} is not of the form KEY.PATH=VALUE, such as train.epochs=10")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except (ValueError, RecursionError) as error:
        raise UserError(f"override {short(override)}: {error}") from None
    table = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            where = ".".join(parents[: depth + 1])
            raise UserError(f"override {override!r}: {where} is not a table, so it is set as a whole: {where}=...")
    table[last] = value


def _plain(raw: Any, key: tuple[str, ...] = ()) -> Any:
    """A copy of what stands at a key, or in a list there: paths absolute, arrays as lists, no integer too long."""
    if isinstance(raw, Mapping):
        return {name: _plain(value, (*key, name)) for name, value in raw.items()}
    if isinstance(raw, np.ndarray):
        return raw.tolist()
    if isinstance(raw, list):
        return [_plain(value, key) for value in raw]
    if isinstance(raw, int) and raw.bit_length() > LONG_INTEGER:
        raise ValueError(f"{'.'.join(key)} has more than {LONG_INTEGER} bits")
    return str(Path(raw).absolute()) if key in PATH_KEYS and isinstance(raw, str) and raw else raw


def _describe(error: ValidationError, raw: Mapping[str, Any]) -> str:
    """The first fault of a config in one line: the key, what is wrong, and what would be right."""
    fault = error.errors(include_url=False)[0]
    location, kind, message = fault["loc"], fault["type"], fault["msg"].removeprefix("Value error, ")
    key, context, given = _key(location, raw), fault.get("ctx", {}), fault["input"]
    if kind == "extra_forbidden":
        table = key[: key.rfind(".") + 1]
        return f"unknown key {key}; {nearest(str(location[-1]), _known_keys(location[:-1]), table)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "union_tag_not_found":
        return f"{key}.kind is missing"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key} must be a table, not {short(given)}"
    if kind in ("union_tag_invalid", "literal_error"):
        key, given = (f"{key}.kind", context["tag"]) if "tag" in context else (key, given)
        expected = context.get("expected_tags") or context["expected"]
        known = [name.strip(" '") for name in re.split(", | or ", expected)]
        return f"{key}: unknown {short(given)}; {nearest(str(given), known)}"
    if kind != "value_error":
        message = f"{message[0].lower()}{message[1:]}, not {short(given)}"
    return f"{key}: {message}" if key else message


def _key(location: Sequence[str | int], raw: Any) -> str:
    """The dotted key of a fault, without what pydantic names on the way: kinds, and the 0 of what is no list."""
    parts: list[str] = []
    for part in location:
        if isinstance(part, int) != isinstance(raw, list):
            continue
        if part == raw or (isinstance(raw, Mapping) and part not in raw and part == raw.get("kind")):
            continue
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            raw = None
        parts.append(str(part))
    return ".".join(parts)


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys of the table at a fault's location."""
    models: list[type[BaseModel]] = [Config]
    for part in location:
        fields = [model.model_fields[str(part)] for model in models if str(part) in model.model_fields]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        elif isinstance(part, str):  # the kind of one member of a union
            models = [model for model in models if part in get_args(model.model_fields["kind"].annotation)]
    return sorted({key for model in models for key in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for member in get_args(annotation) for model in _models_in(member)]
