"""Nested tables, as configs and manifests are, compared key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs, by dotted key: the value before and now, None where there is none."""
    ours, theirs = _flat(now), _flat(before)
    keys = {**ours, **theirs}
    return {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    if not isinstance(value, Mapping):
        return {key: value}
    return {k: v for name, member in value.items() for k, v in _flat(member, f"{key}.{name}" if key else name).items()}
