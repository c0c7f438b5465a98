"""Nested tables, as configs and manifests are, compared key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs, by dotted key: the value before and now, None where there is none."""
    ours, theirs = _flat(now), _flat(before)
    keys = {**ours, **theirs}
    return {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as one, with dotted keys. Those of a file may be nested deep: not by recursion."""
    flat: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", tables)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, Mapping):
            pending += [(f"{key}.{name}" if key else name, member) for name, member in reversed(list(value.items()))]
        else:
            flat[key] = value
    return flat
