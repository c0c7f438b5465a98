"""Every schedule that PyTorch has against PyTorch's, to 1e-12."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_bp.schedule import SCHEDULES, Schedule, WarmUp

torch = pytest.importorskip("torch", reason="PyTorch is the reference of these tests")
pytestmark = pytest.mark.reference

lr_scheduler = torch.optim.lr_scheduler
RATE, STEPS = 0.37, 40

# Ours end at the last of their steps, most of PyTorch's after it, so they are given one step less.
REFERENCES: dict[str, Callable[..., Any]] = {
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
    "linear": lambda o, final, steps: lr_scheduler.LinearLR(o, 1.0, final / RATE, steps - 1),
    "cosine": lambda o, final, steps: lr_scheduler.CosineAnnealingLR(o, steps - 1, final),
    "one_cycle": lambda o, steps, **others: lr_scheduler.OneCycleLR(o, RATE, steps, cycle_momentum=False, **others),
    "exponential": lambda o, factor, every: lr_scheduler.ExponentialLR(o, factor ** (1 / every)),
    "step": lambda o, factor, every: lr_scheduler.StepLR(o, every, factor),
    "inverse_time": lambda o, after: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step / after)),
    "plateau": lambda o, threshold, minimum, metric, **others: lr_scheduler.ReduceLROnPlateau(
        o, threshold=threshold, min_lr=minimum, eps=0.0, **others
    ),
}
# What each is compared with, keys in the order of the values.
PARAMETERS: dict[str, tuple[tuple[str, ...], list[tuple[float, ...]]]] = {
    "constant": ((), [()]),
    "linear": (("final", "steps"), [(0.0, STEPS), (0.02, 25), (0.3, 2)]),
    "cosine": (("final", "steps"), [(0.0, STEPS), (0.02, STEPS), (0.9, STEPS)]),
    "one_cycle": (
        ("steps", "pct_start", "div_factor", "final_div_factor"),
        [(STEPS, 0.3, 25.0, 1e4), (STEPS, 0.21, 7.0, 3.0), (STEPS, 0.95, 1.0, 1e6)],
    ),
    "exponential": (("factor", "every"), [(0.3, 1), (0.3, 7)]),
    "step": (("factor", "every"), [(0.3, 1), (0.3, 7)]),
    "inverse_time": (("after",), [(1,), (9,)]),
    "plateau": (
        ("factor", "patience", "threshold", "minimum"),
        [(0.1, 10, 1e-4, 0.0), (0.5, 0, 0.05, 0.01), (0.9, 3, 0.0, 0.1)],
    ),
}


def cases(kinds: set[str]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (kind, dict(zip(names, values, strict=True)))
        for kind, (names, rows) in PARAMETERS.items()
        if kind in kinds
        for values in rows
    ]


def optimizer() -> Any:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)


def agree(schedule: Schedule, scheduler: Any, steps: int) -> None:
    """The rates of so many steps."""
    for step in range(steps):
        assert schedule(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15), step
        scheduler.optimizer.step()
        scheduler.step()


def test_every_kind_has_a_reference() -> None:
    assert set(REFERENCES) == set(PARAMETERS) == set(SCHEDULES)


@pytest.mark.parametrize(("kind", "parameters"), cases(set(SCHEDULES) - {"plateau"}))
def test_pure_schedules(kind: str, parameters: dict[str, Any]) -> None:
    agree(SCHEDULES[kind](RATE, **parameters), REFERENCES[kind](optimizer(), **parameters), STEPS)


# PyTorch warms up to one_cycle's maximum, after which the rate would fall to the cycle's start; plateau it refuses.
@pytest.mark.parametrize("start", [0.1, 1.0])
@pytest.mark.parametrize(("kind", "parameters"), cases(set(SCHEDULES) - {"plateau", "one_cycle"}))
def test_a_warmup_before_them(kind: str, parameters: dict[str, Any], start: float) -> None:
    sgd = optimizer()
    both = [lr_scheduler.LinearLR(sgd, start, 1.0, 6), REFERENCES[kind](sgd, **parameters)]
    scheduler = lr_scheduler.SequentialLR(sgd, both, [6])
    agree(WarmUp(SCHEDULES[kind](RATE, **parameters), 6, start), scheduler, 6 + STEPS)


def test_a_warmup_from_nothing() -> None:
    scheduler = lr_scheduler.LambdaLR(optimizer(), lambda step: min(step / 6, 1.0))
    agree(WarmUp(SCHEDULES["constant"](RATE), 6, 0.0), scheduler, STEPS)


def losses(name: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    falling = np.exp(-np.arange(200) / 30)
    return {
        "falling": falling,
        "levelling": falling + 0.2,
        "noisy": falling + 0.1 * rng.uniform(0, 1, 200),
        "rising": 2 - falling,
        "flat": np.ones(200),
        "with nan": np.where(rng.uniform(0, 1, 200) < 0.4, math.nan, falling + 0.3),
    }[name]


@pytest.mark.parametrize("name", ["falling", "levelling", "noisy", "rising", "flat", "with nan"])
@pytest.mark.parametrize(("kind", "parameters"), cases({"plateau"}))
def test_plateau(kind: str, parameters: dict[str, Any], name: str) -> None:
    parameters = {**parameters, "metric": "train_loss"}
    schedule, scheduler = SCHEDULES[kind](RATE, **parameters), REFERENCES[kind](optimizer(), **parameters)
    for step, loss in enumerate(losses(name), 1):
        scheduler.step(loss)
        schedule.observe({"step": step, "train_loss": loss})
        assert schedule(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12), step
