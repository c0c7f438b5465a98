"""The state of a training: given to another one, all that follows is the same, in every bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from trainings import (
    TRAININGS,
    Moments,
    moments,
    new,
    other_process,
    tables,
    write_data,
)

from gpu_bp import UserError, registry, select
from gpu_bp.backends import Backend
from gpu_bp.training_state import Record, Tensors, TrainingState, restore, take


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_goes_on_as_if_it_had_never_stopped(backend: Backend, data: Path, name: str) -> None:
    """At a line and between two, at the end of an epoch, in its short last step, and twice in a row."""
    config = tables(name, data)
    whole = moments(new(config, backend))
    for stops in ([1], [3, 4], [6, 1], [7, 2]):
        trainer, seen = new(config, backend), []
        for steps in stops:
            seen += moments(trainer, steps)
            assert trainer.paused
            trainer = other_process(trainer, config, backend)
        seen += moments(trainer)
        assert seen == whole


def test_a_training_goes_on_in_the_same_process(backend: Backend, data: Path) -> None:
    config = tables("plateau", data)
    trainer, seen = new(config, backend), []
    while len(seen) < 42:
        seen += moments(trainer, 5)
    assert seen == moments(new(config, backend))
    assert not trainer.paused
    assert moments(trainer) == [], "it is at its end"


@pytest.mark.parametrize("kind", registry.UPDATES)
def test_every_optimizer(backend: Backend, data: Path, kind: str) -> None:
    config = tables("ordered", data, optimizer={"kind": kind}, train={"epochs": 2})
    if registry.update(kind).full_batch:
        config["train"] |= {"batch_size": 50, "epochs": 9}
        del config["train"]["part_rows"]
    whole = moments(new(config, backend))
    trainer = new(config, backend)
    seen = moments(trainer, 4)
    assert seen + moments(other_process(trainer, config, backend)) == whole


Paused = tuple[TrainingState, Tensors]
# By training: after how many steps it is looked at, such that the pieces are not what they were at the beginning.
LOOKED_AT = {"noise": 17, "plateau": 22, "patience": 6, "replacement": 11, "ordered": 11, "files": 12}


@functools.cache
def begun_and_paused(name: str, folder: Path) -> tuple[Paused, Paused, Moments]:
    """The state of a training that begins, that of one that is paused, and what comes after that."""
    trainer = new(tables(name, folder), select("numpy")[0])
    before = take(trainer)
    moments(trainer, LOOKED_AT[name])
    return before, take(trainer), moments(trainer)


@pytest.fixture(scope="module")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def planted(paused: Paused, before: Paused, piece: str) -> Paused:
    """A state with one of its pieces, a number by its dotted name or a tensor, as in a training that begins."""
    (state, tensors), (fresh, begun) = paused, before
    if piece in tensors:
        return state, tensors | {piece: begun[piece]}
    key, _, inner = piece.partition(".")
    value = getattr(fresh, key)
    if inner:
        value = getattr(state, key).model_copy(update={inner: getattr(value, inner)})
    return state.model_copy(update={key: value}), tensors


def pieces(paused: Paused, before: Paused) -> set[str]:
    """The pieces that are not what they were at the beginning."""
    (state, tensors), (_, begun) = paused, before
    found = {name for name, tensor in tensors.items() if tensor.tobytes() != begun[name].tobytes()}
    for key, value in state:
        inner = [f"{key}.{name}" for name, _ in value] if isinstance(value, Record) else [key]
        found |= {piece for piece in inner if planted(paused, before, piece)[0] != state}
    return found


# What says nothing of how a training goes on that neither ended nor diverged: these two have tests of their own below;
# the time; what the config or the next step says again; and what counts where the config has changed.
NOT_SEEN = {"stopped", "rate_factor", "rewinds", "seconds", "selection.rises", "loss.weighted"}
NOT_SEEN |= {"step_rows", "selection.metric"}
# Of float16, which NumPy has not: see cuda_on_cpu/test_precisions.py.
NOT_SEEN |= {"scaling.scale", "scaling.good"}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_piece_of_state_that_is_left_out_is_noticed(shared_data: Path, name: str) -> None:
    """A planted fault each, all else being right: what follows differs. Without one it does not."""
    before, paused, rest = begun_and_paused(name, shared_data)

    def goes_on_from(state: TrainingState, tensors: Tensors) -> Moments:
        trainer = new(tables(name, shared_data), select("numpy")[0])
        restore(trainer, state, tensors)
        return moments(trainer)

    assert goes_on_from(*paused) == rest
    for piece in pieces(paused, before) - NOT_SEEN:
        assert goes_on_from(*planted(paused, before, piece)) != rest, piece


def test_every_piece_of_state_is_in_one_of_these_trainings(shared_data: Path) -> None:
    """So that the test before leaves out none."""
    known, seen = set(), set()
    for key, field in TrainingState.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [name for kind in kinds if hasattr(kind, "model_fields") for name in kind.model_fields]
        known |= {f"{key}.{name}" for name in inner} or {key}
    for name in LOOKED_AT:
        before, paused, _ = begun_and_paused(name, shared_data)
        found = pieces(paused, before)
        assert found > set(paused[1]), "every tensor has changed"
        seen |= {piece.partition(".layers")[0] for piece in found}
    assert {piece for piece in known if piece not in seen} == NOT_SEEN - {"seconds", "loss.weighted"}
    assert {"parameters", "average", "best", "best_average", "optimizer.mean"} <= seen


def test_what_a_training_that_ended_or_rewound_has(data: Path) -> None:
    """Planted faults too: `stopped`, `rate_factor` and `rewinds` left out."""
    backend, config = select("numpy")[0], tables("patience", data)
    trainer = new(config, backend)
    moments(trainer)
    state, tensors = take(trainer)
    assert state.stopped == "patience"
    assert moments(other_process(trainer, config, backend)) == []
    forgetful = new(config, backend)
    restore(forgetful, state.model_copy(update={"stopped": ""}), tensors)
    assert len(moments(forgetful)) > 0
    config = tables("noise", data)
    trainer = new(config, backend)
    trainer.step.optimizer.rate_factor, trainer.rewinds = 0.25, 2
    first = moments(trainer, 9)
    assert first[-1]["state"]["rewinds"] == 2
    state, tensors = take(trainer)
    rest = moments(other_process(trainer, config, backend))
    assert rest == moments(trainer)
    for left_out in ({"rate_factor": 1.0}, {"rewinds": 0}):
        forgetful = new(config, backend)
        restore(forgetful, state.model_copy(update=left_out), tensors)
        assert moments(forgetful) != rest


OPTIMIZERS = [name for name, record in registry.UPDATES.items() if not record.full_batch]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small trainings from all over what a config can ask for."""
    rows, hidden = draw(st.integers(3, 30)), draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    train: dict[str, Any] = {
        "batch_size": draw(st.integers(1, 12)),
        "sampling": choose("shuffled", "ordered", "replacement"),
        "precision": choose("float32", "float64"),
        "log_every": draw(st.integers(1, 9)),
    } | choose({"steps": draw(st.integers(2, 40))}, {"epochs": draw(st.integers(1, 4))})
    train |= choose({}, {"part_rows": draw(st.integers(1, 12))}) | choose({}, {"average_decay": 0.7})
    train |= choose({}, {"shards": draw(st.sampled_from([2, 4, 16]))})
    metrics = ["train_loss", "validation_loss", "validation_r2"] + ["average_validation_mse"] * (
        "average_decay" in train
    )
    return {
        "seed": draw(st.integers(0, 99)),
        "data": {"kind": "linear", "n_inputs": 2, "rows": rows, "validation_rows": 5}
        | choose({}, {"residency": "host", "block_rows": draw(st.integers(1, 7)), "window_blocks": 2}),
        "network": {"hidden": hidden, "normalise": choose(False, True), "biases": choose(False, True)},
        "regularisation": choose(
            {}, {"dropout": 0.4}, {"input_noise": 0.2, "clip_norm": 0.5}, {"l1": 0.01, "max_norm": 1.0}
        ),
        "optimizer": {"kind": choose(*OPTIMIZERS), "learning_rate": 0.05},
        "schedule": choose(
            {"kind": "constant"},
            {"kind": "cosine"},
            {"kind": "plateau", "patience": 0, "threshold": 0.2},
            {"kind": "step", "factor": 0.5, "every": 3, "warmup_steps": 1},
        ),
        "train": train,
    } | choose({}, {"stopping": {"metric": choose(*metrics), "patience": choose(1, 2, 50)}})


@given(config=configs(), stops=st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(max_examples=60)
def test_any_training_stopped_anywhere(config: dict[str, Any], stops: list[int]) -> None:
    backend = select("numpy")[0]
    try:
        trainer = new(config, backend)
    except UserError:  # such as a warm-up longer than the training
        reject()
    seen = []
    for steps in stops:
        seen += moments(trainer, steps)
        trainer = other_process(trainer, config, backend)
    assert seen + moments(trainer) == moments(new(config, backend))
