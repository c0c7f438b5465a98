"""The one exception for what the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: one line that says what is wrong, where, and what would be right."""


class Diverged(UserError):
    """A training whose loss or gradients are no longer finite."""


def unknown(what: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a misspelt name: it names the nearest right one, and the rest."""
    return UserError(f"unknown {what} {name!r}; {nearest(str(name), known)}")


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean ...? known: ...`, the first part only where a known name is near; `prefix` goes before it."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    return f"{hint}known: {', '.join(names)}"
