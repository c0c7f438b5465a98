"""The learning rate as a pure function of the step, counting from 0."""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(rate: float) -> Schedule:
    """The same rate throughout."""
    return lambda step: rate


def linear(rate: float, final: float, steps: int) -> Schedule:
    """From `rate` at step 0 in a straight line to `final` at the last of so many steps, and `final` after it."""
    last = max(1, steps - 1)
    return lambda step: rate + (final - rate) * min(step / last, 1.0)


def exponential(rate: float, factor: float, every: int) -> Schedule:
    """Multiplied by `factor` in every so many steps, smoothly."""
    return lambda step: rate * factor ** (step / every)


def by_step(rate: float, factor: float, every: int) -> Schedule:
    """Multiplied by `factor` after every so many steps, at once."""
    return lambda step: rate * factor ** (step // every)
