"""Targets that are standardised: what the network sees, what predictions are in, and where it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gpu_bp
from gpu_bp import Model, NumpyBackend, Task, UserError, load_data, parse_config
from gpu_bp.backends import Backend
from gpu_bp.data.preparation import Preparation
from gpu_bp.data.shards import write_shards
from gpu_bp.data.sources import SetReader
from gpu_bp.data.synthetic import make_set
from gpu_bp.generate import all_rows

Tiny = Callable[..., dict[str, Any]]
SPLIT = {"validation_rows": 20, "test_rows": 30}
SETS: dict[str, dict[str, Any]] = {
    "linear": {"n_targets": 3, "scaling": "standardise"},
    "teacher": {"n_targets": 2},
    "friedman1": {},
    "friedman2": {"scaling": "max-abs"},
    "friedman3": {},
    "sine-mixture": {},
    "heteroscedastic": {},
}


def config_of(tiny_config: Tiny, data: dict[str, Any], **sections: Any) -> gpu_bp.Config:
    return parse_config({**tiny_config(**sections), "data": {**SPLIT, **data}})


def files_of(config: gpu_bp.Config, kind: str, folder: Path) -> dict[str, Any]:
    """The section of the same rows in files."""
    rows = all_rows(config)
    reader = SetReader(NumpyBackend(), make_set(config.data, config.seed), config.seed, "made", rows)
    common = config.data.model_dump(include={*SPLIT, "scaling", "target_scaling"})
    if kind == "shards":
        write_shards(reader, folder / "shards", rows=rows, config={}, shard_rows=70)
        return {"kind": kind, "path": str(folder / "shards"), **common}
    read = reader.read(0, rows)
    np.save(folder / "x.npy", read.inputs)
    np.save(folder / "d.npy", read.wanted)
    return {"kind": kind, "inputs": str(folder / "x.npy"), "targets": str(folder / "d.npy"), **common}


@pytest.mark.parametrize("kind", SETS)
def test_targets_are_standardised(backend: Backend, tiny_config: Tiny, kind: str) -> None:
    """Those of the training rows have mean 0 and standard deviation 1; all are the raw ones again, times and plus."""
    data = {"kind": kind, "rows": 500, **SETS[kind]}
    raw, dataset = (
        load_data(config_of(tiny_config, {**data, "target_scaling": scaling}), backend=backend)
        for scaling in ("none", "standardise")
    )
    wanted = raw.rows("train").targets
    assert raw.preparation.target_shift == raw.preparation.target_scale == ()
    np.testing.assert_allclose(dataset.preparation.target_shift, wanted.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(dataset.preparation.target_scale, wanted.std(axis=0), rtol=1e-10)
    for name in dataset.sources:
        split, plain = dataset.rows(name), raw.rows(name)
        np.testing.assert_array_equal(split.inputs, plain.inputs)
        by_hand = (plain.targets - wanted.mean(axis=0)) / wanted.std(axis=0)
        np.testing.assert_allclose(split.targets, by_hand, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(
            dataset.preparation.raw_outputs(split.targets), plain.targets, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("kind", ["arrays", "shards"])
def test_files_are_scaled_as_generated_rows(tiny_config: Tiny, tmp_path: Path, kind: str) -> None:
    """To the same bits."""
    data = {"kind": "linear", "rows": 300, "n_targets": 2, "scaling": "standardise", "target_scaling": "standardise"}
    config = config_of(tiny_config, data)
    generated = load_data(config)
    read = load_data(config_of(tiny_config, files_of(config, kind, tmp_path)))
    assert read.preparation == generated.preparation
    for name in read.sources:
        for one, other in zip(
            (read.rows(name).inputs, read.rows(name).targets),
            (generated.rows(name).inputs, generated.rows(name).targets),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


def test_rows_of_shards_are_not_scaled_in_place(tiny_config: Tiny, tmp_path: Path) -> None:
    """Where inputs could be read into the batch as they are, targets are scaled all the same."""
    config = config_of(tiny_config, {"kind": "friedman2", "rows": 100, "target_scaling": "standardise"})
    read = load_data(config_of(tiny_config, files_of(config, "shards", tmp_path)))
    assert not read.preparation.scales
    for _ in range(2):
        assert abs(read.rows().targets.mean()) < 1e-12
        np.testing.assert_allclose(read.rows().targets.std(), 1)


def test_friedman2_can_be_trained(tiny_config: Tiny, in_tmp: Path) -> None:
    """Predictions are in raw units, from the run and from its file; the metrics are of standardised targets."""
    made = tiny_config(
        network={"hidden": [10]},
        optimizer={"kind": "adam", "learning_rate": 0.01},
        train={"epochs": 40, "batch_size": 16},
    )
    made["data"] = {"kind": "friedman2", "rows": 500, "noise": 0.0, "scaling": "standardise", **SPLIT}
    made["data"]["target_scaling"] = "standardise"
    result = gpu_bp.train(made, backend="numpy", run=in_tmp / "run", pictures=True)
    assert result.summary["test"]["mse"] < 0.05
    assert gpu_bp.evaluate(in_tmp / "run", backend="numpy")["test"] == result.summary["test"]
    config = parse_config({**made, "data": {**made["data"], "target_scaling": "none", "scaling": "none"}})
    raw = load_data(config).rows("test")
    np.save("x.npy", raw.inputs)
    for model in (result.model, Model.load(in_tmp / "run/model.safetensors", NumpyBackend())):
        names, (predicted,) = model.predict(Path("x.npy"))
        assert names == ["y"]
        mse = np.square(predicted - raw.targets[:, 0]).mean()
        (scale,) = model.preparation.target_scale
        assert mse == pytest.approx(result.summary["test"]["mse"] * scale**2, rel=1e-4)


def test_a_preparation_in_a_file(tiny_config: Tiny, in_tmp: Path) -> None:
    """It comes back as it was; without scaled targets it is as in older files, which still load."""
    data = {"kind": "friedman2", "rows": 50}
    for scaling in ("none", "standardise"):
        preparation = load_data(config_of(tiny_config, {**data, "target_scaling": scaling})).preparation
        plain = json.loads(json.dumps(preparation.to_json()))
        assert Preparation.from_json(plain) == preparation
        assert ("target_shift" in plain) == ("target_scale" in plain) == (scaling != "none")
    made = {**tiny_config(), "data": {**data, **SPLIT}}
    gpu_bp.train(made, backend="numpy", run=in_tmp / "run", pictures=False)
    path = in_tmp / "run/model.safetensors"
    with safe_open(path, framework="numpy") as file:
        description = json.loads(file.metadata()["gpu_bp"])
    assert set(description["preparation"]) == {"decision", "classes", "columns", "shift", "scale"}
    save_file(load_file(path), path, metadata={"gpu_bp": json.dumps(description)})
    assert Model.load(path, NumpyBackend()).preparation.target_shift == ()


@pytest.mark.parametrize(
    ("targets", "loss", "message"),
    [
        (
            np.arange(60) % 3,
            "cross_entropy",
            "is for targets that are real numbers, and loss cross_entropy takes others",
        ),
        (np.arange(60) % 2 * 1.0, "binary_cross_entropy", "and loss binary_cross_entropy takes others"),
        (np.arange(60) * 1.0, "poisson", "and loss poisson takes others"),
        (
            np.where(np.arange(60) < 5, 0, 1.7e308),
            "squared_error",
            "the targets of column 0 (counting from 0) are too large to be",
        ),
    ],
)
def test_targets_that_are_not_scaled(tiny_config: Tiny, tmp_path: Path, targets: Any, loss: str, message: str) -> None:
    np.save(tmp_path / "x.npy", np.ones((60, 2)))
    np.save(tmp_path / "d.npy", targets)
    data = {"kind": "arrays", "inputs": str(tmp_path / "x.npy"), "targets": str(tmp_path / "d.npy")}
    config = config_of(tiny_config, {**data, "target_scaling": "standardise"}, loss={"kind": loss})
    with pytest.raises(UserError) as caught:
        load_data(config)
    assert message in str(caught.value)


def test_classes_are_not_scaled(tiny_config: Tiny, tmp_path: Path) -> None:
    """Labels of a shard folder, whatever the loss makes of them; a set of classes has no such key."""
    moons = config_of(tiny_config, {"kind": "double-moon", "rows": 50, "scaling": "none"})
    files = {**files_of(moons, "shards", tmp_path), "target_scaling": "standardise"}
    with pytest.raises(UserError, match="target_scaling = 'standardise' is for .* real numbers, and these are classes"):
        load_data(config_of(tiny_config, files))
    with pytest.raises(UserError, match="unknown key data.target_scaling"):
        config_of(tiny_config, {"kind": "double-moon", "target_scaling": "standardise"})


def test_targets_that_do_not_vary(tiny_config: Tiny, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((60, 2)))
    np.save(tmp_path / "d.npy", np.full(60, 0.1))
    data = {"kind": "arrays", "inputs": str(tmp_path / "x.npy"), "targets": str(tmp_path / "d.npy")}
    dataset = load_data(config_of(tiny_config, {**data, "target_scaling": "standardise"}))
    assert (dataset.preparation.target_shift, dataset.preparation.target_scale) == ((0.1,), (1.0,))
    np.testing.assert_array_equal(dataset.rows().targets, 0)


def test_a_spread_in_raw_units() -> None:
    """A deviation in the target's unit, a variance in its square; nothing is added."""
    task = Task("none")
    preparation = Preparation(task, None, (0.0,), (1.0,), (100.0, -5.0), (3.0, 0.5))
    np.testing.assert_array_equal(preparation.raw_spread(np.ones((2, 2)), 1), [[3.0, 0.5]] * 2)
    np.testing.assert_array_equal(preparation.raw_spread(np.ones((2, 2)), 2), [[9.0, 0.25]] * 2)
