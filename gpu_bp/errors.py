"""The one exception for what the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: one line that says what is wrong, where, and what would be right."""


def unknown(what: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a misspelt name: it names the nearest right one, and the rest."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {what} {name!r}; {hint}known: {', '.join(sorted(names))}")
