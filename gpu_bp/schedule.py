"""The learning rate of each step, counting from 0.

A schedule is a pure function of the step. The one exception, the plateau, changes with the metrics too; what it has
made of them is its state, which a training that goes on later restores. A warm-up goes before any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from gpu_bp.errors import UserError


class Schedule:
    """The learning rate of each step: a function of the step alone.

    Args:
        rate: from the step to its learning rate.
    """

    def __init__(self, rate: Callable[[int], float]) -> None:
        self._rate = rate

    def __call__(self, step: int) -> float:
        """The learning rate of a step."""
        return self._rate(step)

    def observe(self, line: Mapping[str, Any]) -> None:
        """Takes in a line of metrics: `step`, the steps taken so far, and losses by name. Most schedules need none."""

    def state(self) -> dict[str, Any]:
        """What was made of the lines so far, fit for JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on as the schedule did that gave this state."""


def constant(rate: float) -> Schedule:
    """The same rate throughout."""
    return Schedule(lambda step: rate)


def linear(rate: float, final: float, steps: int) -> Schedule:
    """From `rate` at step 0 in a straight line to `final` at the last of so many steps, and `final` after it."""
    last = max(1, steps - 1)
    return Schedule(lambda step: _between(rate, final, step / last))


def cosine(rate: float, final: float, steps: int) -> Schedule:
    """As `linear`, along half a wave of the cosine (Loshchilov and Hutter, SGDR, 2017, without restarts)."""
    last = max(1, steps - 1)
    return Schedule(lambda step: _along_cosine(rate, final, step / last))


def one_cycle(rate: float, steps: int, pct_start: float, div_factor: float, final_div_factor: float) -> Schedule:
    """Up to `rate` and down to next to nothing (Smith and Topin, Super-convergence, 2017), along the cosine.

    It begins at rate / div_factor, has its maximum after the part `pct_start` of the steps, and reaches
    rate / div_factor / final_div_factor at the last of them, as `torch.optim.lr_scheduler.OneCycleLR` does, and stays
    there.

    Raises:
        UserError: no step to rise or to fall in.
    """
    if not 1 < pct_start * steps < steps:
        raise UserError(
            f"schedule: one_cycle has no step to rise or to fall in: pct_start * steps is {pct_start} * {steps}, "
            "and must be more than 1 and less than steps; give it more steps"
        )
    top, last = pct_start * steps - 1, steps - 1  # the top is at a step, or between two
    first = rate / div_factor
    final = first / final_div_factor
    return Schedule(
        lambda step: (
            _along_cosine(first, rate, step / top)
            if step <= top
            else _along_cosine(rate, final, (step - top) / (last - top))
        )
    )


def exponential(rate: float, factor: float, every: int) -> Schedule:
    """Multiplied by `factor` in every so many steps, smoothly."""
    return Schedule(lambda step: rate * factor ** (step / every))


def by_step(rate: float, factor: float, every: int) -> Schedule:
    """Multiplied by `factor` after every so many steps, at once."""
    return Schedule(lambda step: rate * factor ** (step // every))


def inverse_time(rate: float, after: int) -> Schedule:
    """rate / (1 + step / after): search, then converge (Darken and Moody, 1990); half the rate at step `after`."""
    return Schedule(lambda step: rate / (1 + step / after))


class Plateau(Schedule):
    """Multiplied by `factor` where a loss stays as it is: once more than `patience` lines in a row were no improvement.

    A line is an improvement where its loss is less than the best so far, by more than `threshold` of the
    best's size; NaN never is one. This is `torch.optim.lr_scheduler.ReduceLROnPlateau`, except where losses are
    negative: there it takes one for an improvement that is a little worse.

    Args:
        metric: the loss in the lines, "train_loss" or "validation_loss".
        minimum: the rate is never less.

    Raises:
        UserError: the minimum is above the rate.
    """

    def __init__(
        self, rate: float, factor: float, patience: int, threshold: float, minimum: float, metric: str
    ) -> None:
        if minimum > rate:
            raise UserError(f"schedule.minimum is {minimum}, above the learning rate of {rate}; set it below")
        super().__init__(lambda step: self._now)
        self._now = rate
        self._best: float | None = None
        self._waited = 0
        self._factor, self._patience, self._threshold = factor, patience, threshold
        self._minimum, self._metric = minimum, metric

    def observe(self, line: Mapping[str, Any]) -> None:
        loss, best = line[self._metric], self._best
        if math.isfinite(loss) and (best is None or loss < best - self._threshold * abs(best)):
            self._best, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited > self._patience:
            self._now, self._waited = max(self._factor * self._now, self._minimum), 0

    def state(self) -> dict[str, Any]:
        return {"rate": self._now, "best": self._best, "waited": self._waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._now, self._best, self._waited = state["rate"], state["best"], state["waited"]


# The kinds of a config: (rate, **parameters) -> Schedule. Where one has `steps`, that is how long it is.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "exponential": exponential,
    "step": by_step,
    "inverse_time": inverse_time,
    "plateau": Plateau,
}


class WarmUp(Schedule):
    """From a part of a schedule's first rate in a straight line to the whole of it, then the schedule.

    Args:
        then: the schedule; its step 0 is step `steps` here. Lines of metrics from before are not for it.
        steps: of the warm-up. start: the part at step 0.
    """

    def __init__(self, then: Schedule, steps: int, start: float) -> None:
        super().__init__(
            lambda step: then(step - steps) if step >= steps else then(0) * _between(start, 1.0, step / steps)
        )
        self._then, self._steps = then, steps

    def observe(self, line: Mapping[str, Any]) -> None:
        if line["step"] > self._steps:
            self._then.observe(line)

    def state(self) -> dict[str, Any]:
        return self._then.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._then.restore(state)


def _between(start: float, end: float, part: float) -> float:
    """So much of the way from start to end, `end` beyond it; exactly `start` and `end` there."""
    part = min(part, 1.0)
    return (1 - part) * start + part * end


def _along_cosine(start: float, end: float, part: float) -> float:
    """Likewise, slow at both ends."""
    return _between(start, end, (1 - math.cos(math.pi * min(part, 1.0))) / 2)
