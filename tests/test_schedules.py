"""Schedules: their bounds and ends, the warm-up before them, the plateau's state, and all of them in a training.

PyTorch's are the reference of test_reference_schedules.py.
"""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import hypothesis.strategies as st
import jsonschema
import pytest
from hypothesis import given, settings

import gpu_bp
from gpu_bp import Config, Trainer, UserError, dump_config, parse_config, report
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.config_schedule import AnySchedule
from gpu_bp.schedule import SCHEDULES, Plateau, Schedule, WarmUp, inverse_time, one_cycle

Tiny = Callable[..., dict[str, Any]]

fractions = st.floats(0.01, 0.99)
rates = st.floats(1e-8, 100.0)
lengths = st.integers(2, 60)
counts = st.integers(1, 60)
STEPS = 80  # that are looked at: more than any length

# Parameters of each kind, by which it is tested.
PARAMETERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "constant": {},
    "linear": {"final": st.just(0.0) | rates, "steps": lengths},
    "cosine": {"final": st.just(0.0) | rates, "steps": lengths},
    "one_cycle": {
        "steps": st.integers(20, 60),
        "pct_start": st.floats(0.1, 0.9),
        "div_factor": st.floats(1.0, 100.0),
        "final_div_factor": st.floats(1.0, 1e6),
    },
    "exponential": {"factor": fractions, "every": counts},
    "step": {"factor": fractions, "every": counts},
    "inverse_time": {"after": counts},
    "plateau": {
        "factor": fractions,
        "patience": st.integers(0, 5),
        "threshold": st.floats(0.0, 0.5),
        "minimum": st.just(0.0),
        "metric": st.just("train_loss"),
    },
}
# How each stands in a config; the rates of the steps are compared with those that a training logs.
IN_A_CONFIG: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"final": 0.02},
    "cosine": {"final": 0.001},
    "one_cycle": {"pct_start": 0.5, "div_factor": 10.0, "final_div_factor": 100.0},
    "exponential": {"factor": 0.25, "every": 2},
    "step": {"factor": 0.5, "every": 2},
    "inverse_time": {"after": 3},
    "plateau": {
        "factor": 0.5,
        "patience": 0,
        "threshold": 0.9,
        "minimum": 0.02,
        "metric": "validation_loss",
    },
}


def kinds_of_a_config() -> set[str]:
    return {kind for section in get_args(AnySchedule) for kind in get_args(section.model_fields["kind"].annotation)}


def test_every_kind_is_tested() -> None:
    assert set(SCHEDULES) == kinds_of_a_config() == set(PARAMETERS) == set(IN_A_CONFIG)


def drawn(data: st.DataObject, kind: str) -> tuple[Schedule, float, dict[str, Any]]:
    """A schedule with parameters that hypothesis draws, its rate and these parameters."""
    rate = data.draw(rates, "rate")
    parameters = {name: data.draw(values, name) for name, values in PARAMETERS[kind].items()}
    return SCHEDULES[kind](rate, **parameters), rate, parameters


def lines(losses: list[float], first: int = 1) -> list[dict[str, Any]]:
    """Lines of metrics, one a step."""
    return [{"step": first + k, "train_loss": loss} for k, loss in enumerate(losses)]


def final_rate(kind: str, rate: float, parameters: dict[str, Any]) -> float:
    """The rate that a schedule ends with, or falls towards."""
    if kind == "constant":
        return rate
    if kind == "one_cycle":
        return rate / parameters["div_factor"] / parameters["final_div_factor"]
    return parameters.get("final", 0.0)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_resolved_config_means_the_same(tiny_config: Tiny, kind: str) -> None:
    """Also where the kind is a bare name, or one with its defaults; and the JSON Schema admits both."""
    schema = Config.model_json_schema()
    written = tiny_config(schedule={"kind": kind, "warmup_steps": 2, **IN_A_CONFIG[kind]})
    needed = {"exponential", "step", "inverse_time"}  # these have no default
    for raw in [written, *([] if kind in needed else [tiny_config(schedule=kind)])]:
        config = parse_config(raw)
        jsonschema.validate(raw, schema)
        resolved = tomllib.loads(dump_config(config))
        jsonschema.validate(resolved, schema)
        assert parse_config(resolved) == config
        assert resolved["schedule"]["kind"] == kind


@pytest.mark.parametrize("kind", SCHEDULES)
@settings(max_examples=50)
@given(data=st.data())
def test_rates_lie_within_bounds_and_end_where_they_should(kind: str, data: st.DataObject) -> None:
    schedule, rate, parameters = drawn(data, kind)
    first, final = rate / parameters.get("div_factor", 1.0), final_rate(kind, rate, parameters)
    assert schedule(0) == first
    if "steps" in parameters:
        assert schedule(parameters["steps"] - 1) == schedule(parameters["steps"]) == schedule(10**9) == final
    low, high = min(final, first), max(final, rate)
    steps = data.draw(st.lists(st.integers(0, 1000), min_size=1), "steps")
    losses = data.draw(st.lists(st.floats(0, 1), min_size=len(steps), max_size=len(steps)), "losses")
    for step, line in zip(steps, lines(losses), strict=True):
        schedule.observe(line)
        assert low * (1 - 1e-15) <= schedule(step) <= high * (1 + 1e-15)


@pytest.mark.parametrize("kind", SCHEDULES)
@settings(max_examples=50)
@given(data=st.data())
def test_rates_go_one_way(kind: str, data: st.DataObject) -> None:
    """Up or down, and in a cycle up to its top first."""
    schedule, rate, parameters = drawn(data, kind)
    values = [schedule(step) for step in range(STEPS)]
    top = parameters["pct_start"] * parameters["steps"] - 1 if kind == "one_cycle" else 0
    way = 1 if final_rate(kind, rate, parameters) > rate else -1
    changes = [b - a for a, b in itertools.pairwise(values)]
    assert all(change >= -1e-15 * max(values) for change in changes[: math.floor(top)])
    assert all(way * change >= -1e-15 * max(values) for change in changes[math.ceil(top) :])


@given(rates, counts, st.integers(0, 10**6))
def test_inverse_time(rate: float, after: int, step: int) -> None:
    """Against the formula in fractions."""
    exact = Fraction(rate) / (1 + Fraction(step, after))
    assert inverse_time(rate, after)(step) == pytest.approx(float(exact), rel=1e-15)
    assert inverse_time(rate, after)(after) == rate / 2


@pytest.mark.parametrize("kind", SCHEDULES)
@settings(max_examples=50)
@given(data=st.data(), steps=counts, start=st.floats(0, 1))
def test_a_warmup_joins_the_schedule(kind: str, data: st.DataObject, steps: int, start: float) -> None:
    """It begins with its part of the schedule's first rate, and goes up by equal amounts to all of it."""
    then, _, _ = drawn(data, kind)
    schedule = WarmUp(then, steps, start)
    assert schedule(0) == start * then(0)
    for step in range(steps):
        assert schedule(step + 1) - schedule(step) == pytest.approx(then(0) * (1 - start) / steps, abs=1e-14 * then(0))
    assert [schedule(steps + step) for step in range(STEPS)] == [then(step) for step in range(STEPS)]


def plateau(**parameters: Any) -> Plateau:
    given = {"rate": 1.0, "factor": 0.5, "patience": 1, "threshold": 0.1, "minimum": 0.0}
    return Plateau(**{**given, "metric": "train_loss", **parameters})


@pytest.mark.parametrize(
    ("losses", "rates_after"),
    [
        ([8, 8, 8, 8, 8], [1, 1, 0.5, 0.5, 0.25]),  # the first is the best; each second one without improvement counts
        ([8, 7.3, 7.1, 6, 6], [1, 1, 1, 1, 1]),  # an improvement on 8 is below 7.2: 7.3 is none, 7.1 one, and 6
        ([8, 7.3, 7.3, 1, 1, 1], [1, 1, 0.5, 0.5, 0.5, 0.25]),
        ([math.nan, math.nan, 8, 8, 8], [1, 0.5, 0.5, 0.5, 0.25]),
        ([8, math.nan, math.nan, 7, math.inf, math.nan], [1, 1, 0.5, 0.5, 0.5, 0.25]),
        ([-8, -8.1, -7.5, -9, -9], [1, 1, 0.5, 0.5, 0.5]),  # of a negative best, below -8.8
    ],
)
def test_a_plateau_by_hand(losses: list[float], rates_after: list[float]) -> None:
    schedule, found = plateau(), []
    for line in lines(losses):
        schedule.observe(line)
        found.append(schedule(line["step"]))
    assert found == rates_after


def test_a_plateau_goes_to_its_minimum() -> None:
    schedule, found = plateau(patience=0, minimum=0.3), []
    for line in lines([1.0] * 5):
        schedule.observe(line)
        found.append(schedule(0))
    assert found == [1, 0.5, 0.3, 0.3, 0.3]


def test_a_warmup_does_not_count_for_a_plateau() -> None:
    """Nor does a line that ends with it."""
    schedule = WarmUp(plateau(patience=0), 3, 0.0)
    for line in lines([1.0, 1.0, 1.0]):
        schedule.observe(line)
    assert schedule.state() == {"rate": 1.0, "best": None, "waited": 0}
    for line in lines([5.0, 5.0], first=4):
        schedule.observe(line)
    assert schedule(5) == 0.5


@pytest.mark.parametrize("kind", SCHEDULES)
@settings(max_examples=50)
@given(data=st.data(), warmup=st.integers(0, 10))
def test_a_restored_schedule_goes_on_equally(kind: str, data: st.DataObject, warmup: int) -> None:
    """Its state goes through a file of JSON, which has no infinity and no NaN."""
    then, rate, parameters = drawn(data, kind)
    other = SCHEDULES[kind](rate, **parameters)
    one, two = (WarmUp(schedule, warmup, 0.5) if warmup else schedule for schedule in (then, other))
    losses = data.draw(st.lists(st.floats(-1, 1) | st.sampled_from([math.nan, math.inf]), max_size=60), "losses")
    restored = data.draw(st.integers(0, len(losses)), "restored")
    for line in lines(losses)[:restored]:
        one.observe(line)
    two.restore(json.loads(json.dumps(one.state(), allow_nan=False)))
    for line in lines(losses)[restored:]:
        assert one(line["step"]) == two(line["step"])
        one.observe(line)
        two.observe(line)
    assert one.state() == two.state()


# In a training -----------------------------------------------------------------------------------------------


def trained(config: dict[str, Any], backend: Backend) -> list[dict[str, Any]]:
    return [line for line in Trainer(parse_config(config), backend).run() if line]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_training_follows_its_schedule(backend: Backend, tiny_config: Tiny, kind: str, warmup: int) -> None:
    """Its length is what the warm-up leaves of the training."""
    parameters = dict(IN_A_CONFIG[kind])
    section = {"kind": kind, **parameters} | ({"warmup_steps": warmup, "warmup_start": 0.25} if warmup else {})
    config = tiny_config(schedule=section, train={"steps": 12, "log_every": 1})
    del config["train"]["epochs"]
    if {"final", "pct_start"} & set(parameters):
        parameters["steps"] = 12 - warmup
    schedule, found = SCHEDULES[kind](0.1, **parameters), trained(config, backend)
    wanted = [schedule(0) * (0.25 + 0.25 * step) for step in range(warmup)]
    for line in found[warmup:]:
        wanted.append(schedule(line["step"] - 1 - warmup))
        schedule.observe(line)
    assert [line["learning_rate"] for line in found] == pytest.approx(wanted, rel=1e-15)
    assert kind == "constant" or len(set(wanted[warmup:])) > 1


def test_lines_of_metrics_are_the_unit_of_patience(backend: Backend, tiny_config: Tiny) -> None:
    """A line in two steps: the first is the best, all others are none, and what ends the training is no line."""
    section = {"kind": "plateau", "patience": 0, "threshold": 0.99, "factor": 0.5}
    config = tiny_config(schedule=section, train={"steps": 9, "log_every": 2})
    del config["train"]["epochs"]
    trainer = Trainer(parse_config(config), backend)
    found = [line for line in trainer.run() if line]
    assert [line["step"] for line in found] == [2, 4, 6, 8, 9]
    assert [line["learning_rate"] for line in found] == [0.1, 0.1, 0.05, 0.025, 0.0125]
    assert trainer.step.optimizer.learning_rate == 0.0125


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"schedule": {"kind": "constant", "warmup_start": 0.5}}, "schedule: warmup_start needs warmup_steps"),
        (
            {"schedule": {"kind": "cosine", "warmup_steps": 14}},
            "schedule.warmup_steps is 14, and the whole training has 14 steps; set it below",
        ),
        (
            {"schedule": {"kind": "one_cycle", "warmup_steps": 4, "steps": 11}},
            "schedule.steps is 11, and the training has 10 after the warm-up, so that one_cycle would never end",
        ),
        ({"schedule": {"kind": "one_cycle", "steps": 3}}, "one_cycle has no step to rise or to fall in: .* 0.3 * 3"),
        ({"schedule": {"kind": "plateau", "minimum": 0.2}}, "schedule.minimum is 0.2, above the learning rate of 0.1"),
        (
            {"schedule": {"kind": "plateau", "metric": "validation_loss"}, "data": {"validation_rows": 0}},
            "schedule.metric is validation_loss, and there are no validation rows; give data.validation_rows, or ",
        ),
        ({"schedule": {"kind": "plateau", "metric": "loss"}}, "schedule.metric: unknown 'loss'; did you mean"),
        ({"schedule": "inverse_time"}, "schedule.after is missing"),
    ],
)
def test_refusals(tiny_config: Tiny, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Trainer(parse_config(tiny_config(**sections)), NumpyBackend())
    assert all(part in str(caught.value) for part in message.split(".*"))
    assert "\n" not in str(caught.value)


def test_a_cycle_needs_its_length() -> None:
    with pytest.raises(TypeError, match="steps"):
        one_cycle(0.1, pct_start=0.3, div_factor=25.0, final_div_factor=1e4)  # type: ignore[call-arg]


# In the picture ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "scale"),
    [
        ({"kind": "constant"}, None),
        ({"kind": "linear"}, "linear"),  # to 0, which has no logarithm
        ({"kind": "step", "factor": 0.5, "every": 4}, "linear"),
        ({"kind": "exponential", "factor": 0.1, "every": 4}, "log"),
    ],
)
def test_the_rate_is_drawn_where_it_changes(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: dict[str, Any], scale: str | None
) -> None:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(report, "_save", lambda figure, path: figures.setdefault(path.name, figure) and path)
    config = tiny_config(schedule=schedule, train={"steps": 12, "log_every": 1})
    del config["train"]["epochs"]
    run = gpu_bp.train(config, backend="numpy", run=tmp_path / "run").folder
    rates = [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    top, *below = figures["curves.png"].axes
    assert [line.get_label() for line in top.lines] == ["training", "validation"]
    assert [axis.get_yscale() for axis in below] == ([scale] if scale else [])
    assert [(axis.get_ylabel(), axis.get_xlabel()) for axis in below] == [("learning rate", "step")] * len(below)
    assert all(axis.lines[0].get_ydata().tolist() == rates for axis in below)
