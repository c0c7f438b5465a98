"""The one exception for what the user can mend, and how errors are said."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: one line that says what is wrong, where, and what would be right."""


class Diverged(UserError):
    """A training whose loss or gradients are no longer finite."""


def in_words(error: BaseException) -> str:
    """The line for what the user can mend, of which nothing can command a terminal; empty for any other error."""
    if isinstance(error, UserError):
        return one_line(str(error))
    if isinstance(error, OSError):
        return one_line(f"{error.filename or 'output'}: {error.strerror or error}")
    if isinstance(error, UnicodeError):
        return one_line(f"text that cannot be written or read in this encoding: {error}")
    if isinstance(error, MemoryError):
        return one_line(
            f"out of memory: {str(error) or 'smaller network.hidden, data.rows or train.batch_size would fit'}"
        )
    return ""


def one_line(message: str) -> str:
    """A message on one line of bounded length."""
    line = harmless(" ".join(message.split()))
    return line if len(line) <= 4000 else f"{line[:3997]}..."


def harmless(line: str) -> str:
    """What is said may quote a file, and so what would command a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def unknown(what: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a misspelt name: it names the nearest right one, and the rest."""
    return UserError(f"unknown {what} {short(name)}; {nearest(str(name), known)}")


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean ...? known: ...`, the first part only where a known name is near; `prefix` goes before it."""
    names = list(known)
    compared = [other for other in names[:1000] if len(other) <= 100]  # to compare is quadratic in the length
    near = difflib.get_close_matches(name[:100], compared, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    return f"{hint}known: {', '.join(names[:100])}{', ...' if len(names) > 100 else ''}"


def short(value: object) -> str:
    """A value as it is shown in a message: text in quotes, and not a page of it."""
    try:
        text = repr(value) if isinstance(value, str | list | dict) else str(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists in lists
        return f"a value that is too large to be shown ({type(value).__name__})"
    return text if len(text) <= 60 else text[:57] + "..."
