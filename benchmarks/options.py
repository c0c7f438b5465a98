"""What the commands here say of options that cannot be: one line, and exit status 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from gpu_bp import UserError, select
from gpu_bp.backends import Backend


def at_least(least: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """The `type` of an option that is a number of that kind."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    return number


def backend_for(parser: argparse.ArgumentParser, name: str) -> Backend:
    """The backend of that name; which one it is, and why, is printed."""
    try:
        backend, why = select(name)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(why)
    return backend
