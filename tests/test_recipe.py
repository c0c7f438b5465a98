"""From the config to the step: every key of the recipe does what it says, and nothing where it is off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import gpu_bp
from gpu_bp import Batches, Model, Objective, Optimizer, Step, UserError, parse_config, registry
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.config_regularisation import RegularisationSection
from gpu_bp.config_training import StoppingSection
from gpu_bp.data.sources import settle
from gpu_bp.noise import Noise
from gpu_bp.runs import Lines
from gpu_bp.selection import Selection
from gpu_bp.trainer import Trainer

Tiny = Callable[..., dict[str, Any]]
SEED = 3
STEPS = 6

# What a training with a key of [regularisation] is made of by hand: options of (Objective, Optimizer, Step).
BY_HAND: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "l1": (0.01, {}, {"penalties": {"l1": 0.01}}, {}),
    "l2": (0.1, {}, {"penalties": {"l2": 0.1}}, {}),
    "weight_decay": (0.1, {}, {"penalties": {"weight_decay": 0.1}}, {}),
    "clip_value": (0.01, {}, {"penalties": {"clip_value": 0.01}}, {}),
    "biases": (True, {}, {"biases": True, "penalties": {"l2": 0.1}}, {}),
    "dropout": ([0.5, 0.25], {"noise": Noise(SEED, (0.5, 0.25))}, {}, {}),
    "input_dropout": (0.5, {"noise": Noise(SEED, (), 0.5)}, {}, {}),
    "input_noise": (0.3, {"noise": Noise(SEED, (), 0.0, 0.3)}, {}, {}),
    "clip_norm": (0.01, {}, {}, {"clip_norm": 0.01}),
    "max_norm": (0.5, {}, {}, {"max_norm": 0.5}),
}
BESIDE = {"biases": {"l2": 0.1}}  # what a key needs to have an effect


def trainer_of(tiny_config: Tiny, backend: Backend, **sections: Any) -> Trainer:
    network = {"hidden": [5, 5], **sections.pop("network", {})}
    train = {"epochs": None, "steps": STEPS, "batch_size": 16, "precision": "float64", **sections.pop("train", {})}
    config = tiny_config(seed=SEED, network=network, train=train, **sections)
    return Trainer(parse_config(config), backend)


def trained(trainer: Trainer) -> np.ndarray:
    """The parameters after the training."""
    for _ in trainer.run():
        pass
    return np.asarray(trainer.model.network.backend.to_host(trainer.model.network.parameters))


def test_every_key_is_here() -> None:
    assert set(BY_HAND) == set(RegularisationSection.model_fields)


@pytest.mark.parametrize("key", BY_HAND)
def test_a_key_is_what_it_is_by_hand(tiny_config: Tiny, backend: Backend, key: str) -> None:
    value, of_objective, of_optimizer, of_step = BY_HAND[key]
    beside = BESIDE.get(key, {})
    by_config = trained(trainer_of(tiny_config, backend, regularisation={key: value, **beside}))
    without = trained(trainer_of(tiny_config, backend, regularisation=beside))
    assert not np.array_equal(by_config, without)

    made = trainer_of(tiny_config, backend)
    network = made.model.network
    sources, _ = settle(backend, made.dataset.sources, "auto", "float64")
    batches = Batches(backend, sources["train"], 16, "shuffled", SEED, dtype="float64")
    objective = Objective(network, registry.loss("squared_error"), 16, **of_objective)
    step = Step(objective, Optimizer(registry.update("sgd"), network, lambda step: 0.1, **of_optimizer), **of_step)
    for number in range(STEPS):
        epoch, first = divmod(number, batches.per_epoch)
        step(next(iter(batches.epoch(epoch, first, follows=False))))
    np.testing.assert_array_equal(by_config, backend.to_host(network.parameters))


def test_parts_of_a_step_change_nothing(tiny_config: Tiny, backend: Backend) -> None:
    """Dropout too: it depends on the row's place in the step alone. 16 rows a step in parts of 16, 5 and 1."""
    regularisation = {"dropout": 0.3, "input_noise": 0.1, "clip_norm": 1.0}
    whole = trainer_of(tiny_config, backend, regularisation=regularisation)
    wanted = trained(whole)
    for part_rows in (16, 5, 1):
        parts = trainer_of(tiny_config, backend, regularisation=regularisation, train={"part_rows": part_rows})
        np.testing.assert_allclose(trained(parts), wanted, rtol=1e-12, atol=1e-14)
        assert (parts.steps, parts.rows) == (whole.steps, whole.rows)
        assert len(parts.step.objective.signals[0].output) == part_rows


def test_network_keys(tiny_config: Tiny, backend: Backend) -> None:
    network = trainer_of(tiny_config, backend, network={"normalise": True, "residual": True}).model.network
    assert (network.normalise, network.residual) == (True, True)
    assert [layer.shortcut for layer in network.layers] == [False, True, False]


def test_class_weights_reach_the_training(tiny_config: Tiny, backend: Backend) -> None:
    """Weights of 3 and 1 are those of rows that come with such weights: the first mean loss is their weighted mean."""
    loss = {"kind": "binary_cross_entropy", "class_weight": {"upper": 3.0}}
    trainer = trainer_of(tiny_config, backend, loss=loss, train={"batch_size": 50, "steps": 1, "epochs": None})
    split = trainer.dataset.rows("train")
    outputs = trainer.model.network.predict(split.inputs)[:, 0].astype(float)
    d = split.targets[:, 0]
    losses = -d * np.log(outputs) - (1 - d) * np.log(1 - outputs)
    line = next(iter(trainer.run()))
    assert line is not None
    assert line["train_loss"] == pytest.approx(np.average(losses, weights=1 + 2 * d), rel=1e-12)


def test_lines_whose_rows_weigh_nothing(tiny_config: Tiny, backend: Backend) -> None:
    """They have no loss, and the training goes on; the parameters are those of the steps with rows that weigh."""
    loss = {"kind": "binary_cross_entropy", "class_weight": {"upper": 0.0}}
    train = {"batch_size": 1, "steps": 12, "log_every": 1, "sampling": "ordered"}
    trainer = trainer_of(tiny_config, backend, loss=loss, train=train)
    losses = [line["train_loss"] for line in trainer.run() if line]
    assert [np.isnan(loss) for loss in losses] == [True, False] * 6  # even rows are of the upper ring
    assert np.isfinite(trained(trainer)).all()


# Averages and selection ---------------------------------------------------------------------------------------


def test_the_average_is_evaluated_and_saved(tiny_config: Tiny, backend: Backend, in_tmp: Path) -> None:
    config = tiny_config(train={"average_decay": 0.8, "epochs": 4, "precision": "float64"})
    result = gpu_bp.train(config, backend=backend, run="run", pictures=False)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    again = gpu_bp.evaluate("run", model="average", backend=backend)
    assert again == result.summary["average"]
    assert lines[-1]["average_validation_loss"] == again["validation"]["loss"] != lines[-1]["validation_loss"]

    network = Trainer(parse_config(config), backend)
    average = None
    for _ in network.run():
        now = np.asarray(backend.to_host(network.model.network.parameters)).copy()
        average = now if average is None else 0.8 * average + 0.2 * now
    tensors = network.model.network.layout.views(average)
    for name, tensor in load_file("run/average.safetensors").items():
        np.testing.assert_allclose(tensor, tensors[name], rtol=1e-12, atol=1e-15)


VALUES = [float("nan"), 0.5, 0.4, 0.45, float("nan"), 0.395, 0.3, 0.3, 0.31, 0.295]


@pytest.mark.parametrize(
    ("patience", "minimum_improvement", "best", "stops"),
    [
        (None, 0.0, 10, None),
        (2, 0.0, 3, 5),  # steps 4 and 5 are no better than 3, a NaN being no better than anything
        (3, 0.0, 10, None),
        (3, 0.01, 3, 6),  # 0.395 is not better enough than 0.4
        (4, 0.01, 7, None),  # nor 0.295 than 0.3
        (3, 1.0, 2, 5),
        (1, 0.0, None, 1),  # the first is a NaN
    ],
)
@pytest.mark.parametrize("metric", ["validation_loss", "validation_accuracy"])
def test_selection_by_hand(
    backend: Backend, metric: str, patience: int | None, minimum_improvement: float, best: int | None, stops: int | None
) -> None:
    """Of a metric that rises, the negatives."""
    network = gpu_bp.Network([2, 3, 1], ["tanh", "identity"], backend=backend)
    section = StoppingSection(metric=metric, patience=patience, minimum_improvement=minimum_improvement)
    rises = metric.endswith("accuracy")
    selection = Selection(section, rises, [network])
    stopped = None
    for step, value in enumerate(VALUES, 1):
        network.parameters.fill(step)
        if selection.observe({"step": step, metric: -value if rises else value}):
            stopped = step
            break
    assert stopped == stops
    network.parameters.fill(0)
    assert selection.restore() == (best or 0)
    assert set(backend.to_host(network.parameters).tolist()) == {best or 0}
    assert selection.best == {
        "metric": metric,
        "value": None if best is None else -VALUES[best - 1] if rises else VALUES[best - 1],
        "step": best or 0,
    }


@pytest.mark.parametrize("loss", [{"kind": "quantile", "levels": [0.1, 0.9]}, {"kind": "gaussian_nll"}])
def test_the_average_says_what_its_outputs_are(tiny_config: Tiny, in_tmp: Path, loss: dict[str, Any]) -> None:
    """As the network beside it: named, and in raw units."""
    data = {"kind": "heteroscedastic", "rows": 50, "target_scaling": "standardise"}
    config = {**tiny_config(loss=loss, train={"average_decay": 0.5}), "data": data}
    gpu_bp.train(config, backend="numpy", run="run", pictures=False)
    np.save("x.npy", np.linspace(0, 1, 5)[:, None])
    raw, average = (Model.load(Path(f"run/{name}.safetensors"), NumpyBackend()) for name in ("model", "average"))
    assert (average.loss.name, average.loss.values) == (raw.loss.name, raw.loss.values)
    assert average.predict(Path("x.npy"))[0] == raw.predict(Path("x.npy"))[0]


def test_the_best_and_the_last_are_saved(tiny_config: Tiny, backend: Backend, in_tmp: Path) -> None:
    """With patience the training stops so many lines after its best one, which is the model; the average is of then."""
    train = {"epochs": 60, "average_decay": 0.9, "precision": "float64"}
    data = {"kind": "double-moon", "rows": 30, "distance": -8, "validation_rows": 40}
    config = tiny_config(data=data, train=train, stopping={"patience": 4}, optimizer={"learning_rate": 0.5})
    result = gpu_bp.train(config, backend=backend, run="run", pictures=False)
    summary = result.summary
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["validation_loss"])
    assert summary["best"] == {"metric": "validation_loss", "value": best["validation_loss"], "step": best["step"]}
    assert summary["stopped"] == "patience"
    assert lines[-5] == best
    for model, key, line in (
        ("model", "validation_loss", best),
        ("last", "validation_loss", lines[-1]),
        ("average", "average_validation_loss", best),
    ):
        assert gpu_bp.evaluate("run", model=model, backend=backend)["validation"]["loss"] == line[key]
    assert summary["validation"]["loss"] == best["validation_loss"]
    assert summary["average"]["validation"]["loss"] == best["average_validation_loss"]


def test_a_training_that_diverges_leaves_its_best(tiny_config: Tiny, in_tmp: Path) -> None:
    def broken(trainer: Trainer, lines: Lines) -> Lines:
        for line in lines:
            yield line
            if line and line["step"] == 5:
                trainer.model.network.parameters.fill(np.nan)

    config = tiny_config(train={"epochs": 50, "log_every": 1}, stopping={})
    with pytest.raises(UserError, match=r"diverged at step 6: .* its network after \d steps in run.model.safetensors"):
        gpu_bp.train(config, backend="numpy", run="run", pictures=False, watch=broken)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    best = min(line["validation_loss"] for line in lines[:5])
    assert gpu_bp.evaluate("run", backend="numpy")["validation"]["loss"] == best
    assert not Path("run/last.safetensors").exists()  # it is broken


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"stopping": {}, "data": {"validation_rows": 0}}, "there are no validation rows; give data.validation_rows"),
        ({"stopping": {"metric": "validation_acc"}}, "stopping.metric: .*did you mean validation_accuracy"),
        ({"stopping": {"metric": "seconds"}}, "stopping.metric: unknown metric 'seconds'"),
        ({"stopping": {"metric": "average_validation_loss"}}, "no average is kept; set train.average_decay"),
        ({"network": {"hidden": []}, "regularisation": {"dropout": 0.5}}, "a list of 1 for 0 hidden layers"),
        ({"regularisation": {"dropout": [0.5, 0.5, 0.5]}}, "a list of 3 for 2 hidden layers; give one rate a layer"),
        ({"network": {"hidden": [], "normalise": True}}, "network.normalise acts on hidden layers"),
        ({"network": {"hidden": [], "residual": True}}, "network.residual acts on hidden layers"),
        ({"network": {"hidden": [3, 4], "residual": True}}, r"no hidden layer is as wide .* \[2, 3, 4, 1\]"),
        ({"network": {"hidden": []}, "regularisation": {"max_norm": 1.0}}, "regularisation.max_norm acts on hidden"),
        (
            {"optimizer": {"kind": "adamw"}, "regularisation": {"weight_decay": 0.1}},
            "adamw has a weight_decay of its own; leave one of the two out",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(tiny_config: Tiny, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer_of(tiny_config, NumpyBackend(), **sections)


def test_models_that_a_run_does_not_have(tiny_config: Tiny, in_tmp: Path) -> None:
    gpu_bp.train(tiny_config(), backend="numpy", run="run", pictures=False)
    for model, message in (
        ("last", r"only a run with \[stopping\]"),
        ("average", "only a run with train.average_decay"),
        ("bset", "unknown model 'bset'; did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            gpu_bp.evaluate("run", model=model, backend="numpy")


def test_the_end_of_patience_is_not_taken_for_an_interruption(tiny_config: Tiny) -> None:
    """Both at one step: it has ended, and there is nothing to go on with."""
    trainer = trainer_of(tiny_config, NumpyBackend(), train={"log_every": 1, "steps": 50}, stopping={"patience": 1})
    trainer.selection._best = -1.0  # type: ignore[union-attr]
    for _ in trainer.run(lambda: "interrupted"):
        pass
    assert (trainer.stopped, trainer.steps, trainer.paused) == ("patience", 1, False)
