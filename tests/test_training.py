"""A training from config to run folder, and the run looked at again."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gpu_bp
from gpu_bp import Model, UserError, parse_config
from gpu_bp.backends import Backend
from gpu_bp.model import PLAIN
from gpu_bp.spec import GroupedLoss
from gpu_bp.trainer import Trainer

Tiny = Callable[..., dict[str, Any]]
train = functools.partial(gpu_bp.train, pictures=False)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_folder(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    """Every file, and every figure that is promised in it."""
    run = tmp_path / "run"
    result = gpu_bp.train(tiny_config(), backend=backend, run=run)
    assert sorted(path.name for path in run.iterdir()) == [
        "boundary.png",
        "checkpoints",
        "config.toml",
        "curves.png",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
    ]
    assert sorted(result.pictures) == sorted(run.glob("*.png"))
    summary = json.loads((run / "summary.json").read_text())
    assert summary == result.summary
    assert summary["backend"] == backend.name
    assert summary["device"]
    assert (summary["steps"], summary["rows"]) == (14, 100)  # 2 epochs of 50 rows in batches of 8
    assert summary["rows_per_second"] == pytest.approx(100 / summary["seconds"])
    for name in ("train", "validation", "test"):
        assert set(summary[name]) == {"rows", "loss", "errors", "accuracy"}
    lines = lines_of(run)
    assert [(line["epoch"], line["step"], line["rows"]) for line in lines] == [(1, 7, 50), (2, 14, 100)]
    assert {"seconds", "learning_rate", "train_loss", "validation_loss", "validation_errors"} <= set(lines[0])
    assert lines[-1]["validation_loss"] == summary["validation"]["loss"]
    tensors = load_file(run / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "layers.0.weights": (5, 2),
        "layers.0.biases": (5,),
        "layers.1.weights": (1, 5),
        "layers.1.biases": (1,),
    }


def test_the_resolved_config_trains_the_same_again(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    """The same seed gives the same bits; another seed other ones."""
    first = train(tiny_config(), backend=backend, run=tmp_path / "a")
    train(tmp_path / "a/config.toml", backend=backend, run=tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    other = train(tiny_config(seed=1), backend=backend, run=tmp_path / "c")
    assert other.summary["train"] != first.summary["train"]


def test_evaluate_repeats_the_summary(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    result = train(tiny_config(), backend=backend, run=tmp_path / "run")
    again = gpu_bp.evaluate(tmp_path / "run", backend=backend)
    assert again == {name: result.summary[name] for name in ("train", "validation", "test")}


def test_the_training_loss_of_a_line_is_the_mean_since_the_last(
    backend: Backend, tiny_config: Tiny, tmp_path: Path
) -> None:
    """With a rate so small that nothing moves, it is the loss of the training rows, short last batch and all."""
    config = tiny_config(optimizer={"learning_rate": 1e-30}, train={"epochs": 2, "precision": "float64"})
    result = train(config, backend=backend, run=tmp_path / "run")
    for line in lines_of(tmp_path / "run"):
        assert line["train_loss"] == pytest.approx(result.summary["train"]["loss"], rel=1e-12)


def test_running_loss(backend: Backend, tiny_config: Tiny) -> None:
    """Looked at between two lines, it changes nothing of the next."""
    one, other = (Trainer(parse_config(tiny_config()), backend) for _ in range(2))
    looked, lines = [], []
    for line in one.run():
        looked += [one.running_loss()] if line is None else []
        lines += [line["train_loss"]] if line else []
    assert len(looked) == 12
    assert all(0 < loss < 10 for loss in looked)
    assert math.isnan(one.running_loss()), "after the last line there was no step"
    assert lines == [line["train_loss"] for line in other.run() if line]


def test_log_every(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    config = tiny_config(train={"epochs": None, "steps": 10, "log_every": 4})
    config["train"].pop("epochs")
    train(config, backend=backend, run=tmp_path / "run")
    assert [(line["step"], line["epoch"]) for line in lines_of(tmp_path / "run")] == [(4, 1), (8, 2), (10, 2)]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"kind": "constant"}, [0.1, 0.1, 0.1, 0.1, 0.1]),
        ({"kind": "linear", "final": 0.02}, [0.1, 0.08, 0.06, 0.04, 0.02]),
        ({"kind": "linear", "final": 0.0, "steps": 3}, [0.1, 0.05, 0.0, 0.0, 0.0]),
        ({"kind": "exponential", "factor": 0.25, "every": 2}, [0.1, 0.05, 0.025, 0.0125, 0.00625]),
        ({"kind": "step", "factor": 0.5, "every": 2}, [0.1, 0.1, 0.05, 0.05, 0.025]),
    ],
)
def test_schedules_count_steps(
    backend: Backend, tiny_config: Tiny, tmp_path: Path, schedule: dict[str, Any], rates: list[float]
) -> None:
    config = tiny_config(train={"steps": 5, "log_every": 1}, schedule=schedule)
    config["train"].pop("epochs")
    train(config, backend=backend, run=tmp_path / "run")
    assert [line["learning_rate"] for line in lines_of(tmp_path / "run")] == pytest.approx(rates)


def test_stop_at_errors(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    config = tiny_config(train={"epochs": 500, "stop_at_errors": 10, "batch_size": 1})
    summary = train(config, backend=backend, run=tmp_path / "run").summary
    assert summary["stopped"] == "stop_at_errors"
    assert summary["steps"] < 500 * 50
    assert summary["train"]["errors"] <= 10
    lines = lines_of(tmp_path / "run")
    assert [line["train_errors"] <= 10 for line in lines] == [False] * (len(lines) - 1) + [True]


def test_interruption_leaves_a_whole_run(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    steps = iter(range(100))
    interrupted = lambda: next(steps) == 4  # noqa: E731
    result = train(tiny_config(train={"log_every": 1}), backend=backend, run=tmp_path / "run", interrupted=interrupted)
    assert (result.summary["stopped"], result.summary["steps"]) == ("interrupted", 5)
    assert gpu_bp.evaluate(tmp_path / "run", backend=backend)["test"] == result.summary["test"]


def test_divergence_is_told(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    config = tiny_config(optimizer={"learning_rate": 1e6}, train={"epochs": 50}, network={"activation": "identity"})
    with pytest.raises(
        UserError, match=r"the training diverged at step \d+: .* is not finite.*; try a smaller optimizer.learning_rate"
    ):
        train(config, backend=backend, run=tmp_path / "run")
    steps = [line["step"] for line in lines_of(tmp_path / "run")]
    assert steps == list(range(7, 7 * len(steps) + 1, 7))
    assert all(math.isfinite(line["train_loss"]) for line in lines_of(tmp_path / "run"))


def test_divergence_in_the_last_step_is_told(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    """The loss of the last line is that before the last update; nothing is saved as if it were trained."""
    config = tiny_config(
        optimizer={"learning_rate": 1e39}, train={"epochs": 1, "batch_size": 50}, network={"activation": "identity"}
    )
    with pytest.raises(UserError, match=r"diverged at step 1: parameters.*its metrics are in .*metrics\.jsonl"):
        train(config, backend=backend, run=tmp_path / "run")
    assert not (tmp_path / "run/model.safetensors").exists()


def test_evaluate_keeps_the_preparation_of_the_model(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    """The file may have been reordered or shortened since; what does not fit any more is told."""
    rows = [f"{a},{b},{a + 2 * b}" for a, b in np.random.default_rng(0).standard_normal((40, 2)).tolist()]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["a,b,y", *rows]) + "\n")
    data = {"kind": "table", "path": str(path), "target_columns": ["y"]}
    result = train({**tiny_config(), "data": data}, backend=backend, run=tmp_path / "run")
    path.write_text("\n".join(["y,b,a", *(",".join(reversed(row.split(","))) for row in rows)]) + "\n")
    again = gpu_bp.evaluate(tmp_path / "run", backend=backend)
    assert again["train"] == pytest.approx(result.summary["train"], rel=1e-6)
    other = train(tiny_config(), backend=backend, run=tmp_path / "other")
    other.model.save(tmp_path / "run/model.safetensors")
    with pytest.raises(UserError, match="data.kind is table, and the model was trained on another kind"):
        gpu_bp.evaluate(tmp_path / "run", backend=backend)


def test_stop_at_errors_needs_a_classification(tiny_config: Tiny) -> None:
    config = {**tiny_config(train={"stop_at_errors": 0}), "data": {"kind": "linear"}}
    with pytest.raises(UserError, match="stop_at_errors needs a classification"):
        train(config, backend="numpy")


def test_numbers_beyond_the_precision(tiny_config: Tiny, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1.0, 2.0], [3.0, -1e300]]))
    np.save(tmp_path / "d.npy", np.array([1.0, 2.0]))
    data = {"kind": "arrays", "inputs": str(tmp_path / "x.npy"), "targets": str(tmp_path / "d.npy")}
    with pytest.raises(UserError, match=r"inputs, row 1, column 1 .*: -1e\+300 is too large for float32"):
        train({**tiny_config(), "data": data}, backend="numpy")


def test_a_config_of_another_type() -> None:
    with pytest.raises(TypeError, match="config must be"):
        train(5)  # type: ignore[arg-type]


def test_weights_from_a_file(backend: Backend, tiny_config: Tiny, tmp_path: Path) -> None:
    """A run that starts from another run's model starts with its loss."""
    first = train(tiny_config(), backend=backend, run=tmp_path / "a")
    path = str(tmp_path / "a/model.safetensors")
    config = tiny_config(network={"weights": {"kind": "file", "path": path}}, optimizer={"learning_rate": 1e-30})
    second = train(config, backend=backend, run=tmp_path / "b")
    assert second.summary["test"] == first.summary["test"]
    save_file({"layers.0.weights": np.zeros((5, 2), np.float32)}, tmp_path / "part.safetensors")
    config["network"]["weights"]["path"] = str(tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="tensor layers.1.weights is missing"):
        train(config, backend=backend, run=tmp_path / "c")
    (tmp_path / "part.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        train(config, backend=backend, run=tmp_path / "c")
    assert not (tmp_path / "c").exists(), "a training that never began leaves no folder"


def test_precision(backend: Backend, tiny_config: Tiny) -> None:
    """float64 and float32 start from the same draws, and differ by rounding alone."""
    outcomes = {}
    for precision in ("float32", "float64"):
        trainer = Trainer(parse_config(tiny_config(train={"precision": precision})), backend)
        for _ in trainer.run():
            pass
        outcomes[precision] = trainer.model.network.tensors()["layers.0.weights"]
        assert outcomes[precision].dtype == precision
    np.testing.assert_allclose(outcomes["float32"], outcomes["float64"], rtol=1e-4, atol=1e-5)
    assert (outcomes["float32"] != outcomes["float64"]).any()


@pytest.mark.parametrize("loss", gpu_bp.registry.LOSSES)
def test_models_are_read_as_they_were_written(backend: Backend, tiny_config: Tiny, tmp_path: Path, loss: str) -> None:
    activation = {"kind": "leaky_relu", "slope": 0.3}
    config = tiny_config(loss={"kind": loss}, network={"activation": activation, "biases": False})
    record = gpu_bp.registry.loss(loss)
    if record.targets == "counts" or isinstance(record, GroupedLoss):
        config["data"] = {"kind": "xor"}  # whose targets are numbers, 0 and 1
    model = train(config, backend=backend, run=tmp_path / "run").model
    again = Model.load(tmp_path / "run/model.safetensors", backend)
    inputs = np.random.default_rng(0).standard_normal((9, 2))
    np.testing.assert_array_equal(again.network.predict(inputs), model.network.predict(inputs))
    assert again.preparation == model.preparation
    said = record if isinstance(record, GroupedLoss) else PLAIN  # others have one output a target
    assert (again.loss.name, dict(again.loss.values)) == (said.name, dict(said.values))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (None, "not a model of gpu_bp: its metadata have no key 'gpu_bp'"),
        ({"gpu_bp": "{"}, "not a model of gpu_bp"),
        ({"gpu_bp": "[]"}, "not a model of gpu_bp"),
        ({"gpu_bp": '{"format": 9}'}, "it has model format 9, this version reads 1"),
        ({"gpu_bp": '{"format": 1, "widths": "ab"}'}, "not a model of gpu_bp: widths: input should be a valid array"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, backend: Backend, description: Any, message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(1)}, path, metadata=description)
    with pytest.raises(UserError, match=message):
        Model.load(path, backend)


def test_run_folders_that_are_refused(tiny_config: Tiny, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    with pytest.raises(UserError, match="used is not empty"):
        train(tiny_config(), backend="numpy", run=tmp_path / "used")
    with pytest.raises(UserError, match="no such folder"):
        gpu_bp.evaluate(tmp_path / "none")
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.toml"):
        gpu_bp.evaluate(tmp_path / "used")
    with pytest.raises(UserError, match="is a file"):
        train(tiny_config(), backend="numpy", run=tmp_path / "used/file")
    with pytest.raises(NotADirectoryError):
        train(tiny_config(), backend="numpy", run=tmp_path / "used/file/run")


def test_default_run_folders_do_not_collide(tiny_config: Tiny, in_tmp: Path) -> None:
    folders = {train(tiny_config(), backend="numpy").folder for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.parent == Path("runs") and folder.name.startswith("tiny-") for folder in folders)


def test_a_loss_that_needs_more_outputs(tiny_config: Tiny) -> None:
    config = {**tiny_config(loss={"kind": "cross_entropy"}), "data": {"kind": "xor"}}
    with pytest.raises(UserError, match=r"loss\.kind: cross_entropy needs at least 2 outputs, the targets give 1"):
        train(config, backend="numpy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"batch_size": 49}}, "train.batch_size = 50 or more"),
        ({"train": {"batch_size": 50, "sampling": "replacement"}}, "shuffled or ordered"),
        ({"train": {"batch_size": 50}, "schedule": {"kind": "linear"}}, "leave schedule out"),
        ({"train": {"batch_size": 50}, "schedule": {"kind": "constant", "warmup_steps": 1}}, "leave schedule out"),
    ],
)
def test_rprop_takes_all_rows_and_no_schedule(tiny_config: Tiny, change: dict[str, Any], message: str) -> None:
    optimizer = {"kind": "rprop", "learning_rate": 0.01}
    with pytest.raises(gpu_bp.UserError, match=message):
        gpu_bp.Trainer(gpu_bp.parse_config(tiny_config(optimizer=optimizer, **change)), gpu_bp.NumpyBackend())
    gpu_bp.Trainer(
        gpu_bp.parse_config(tiny_config(optimizer=optimizer, train={"batch_size": 100})), gpu_bp.NumpyBackend()
    )
