"""Data at the ends of what there is: very large and very small numbers, very many rows, memory that is too small."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpu_bp
from gpu_bp import NumpyBackend, UserError, load_data, parse_config
from gpu_bp.data.arrays import ArrayReader, NpyFile
from gpu_bp.data.preparation import fit_scaling
from gpu_bp.data.shards import MOST_SHARDS, write_shards
from gpu_bp.data.sources import ResidentSource, SetReader, settle
from gpu_bp.data.synthetic import make_set

SECTIONS: dict[str, Any] = {
    "data": {"kind": "linear", "rows": 2000, "test_rows": 500},
    "optimizer": {"kind": "sgd", "learning_rate": 0.01},
    "train": {"epochs": 1},
}


def config_of(**sections: Any) -> gpu_bp.Config:
    return parse_config({**SECTIONS, **{name: {**SECTIONS.get(name, {}), **s} for name, s in sections.items()}})


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("kind", ["linear", "teacher", "friedman1", "sine-mixture"])
def test_a_generated_regression_is_no_classification(kind: str, loss: str) -> None:
    with pytest.raises(UserError, match=f"{kind}: the targets do not fit the loss"):
        load_data(config_of(data={"kind": kind}, loss={"kind": loss}))


@pytest.mark.parametrize("values", [[0.0, 1e-170], [0.0, 1e-300], [1e150, 1e151]])
def test_scaling_of_extreme_numbers(values: list[float], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.resize(values, (100, 1)))
    x = NpyFile(tmp_path / "x.npy", "x")
    (shift,), (scale,) = fit_scaling(ArrayReader(x, x), 100, "standardise")
    assert scale == pytest.approx((values[1] - values[0]) / 2, rel=1e-6)
    scaled = (np.resize(values, 100) - shift) / scale
    np.testing.assert_allclose(np.abs(scaled), 1, rtol=1e-6)


@pytest.mark.parametrize("scaling", ["standardise", "max-abs"])
def test_numbers_too_large_to_scale(scaling: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[0, 1.6e308], [0, 1.7e308]]))
    x = NpyFile(tmp_path / "x.npy", "x")
    with pytest.raises(UserError, match="the inputs of column 1 .* too large to be scaled"):
        fit_scaling(ArrayReader(x, x), 2, scaling)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "double-moon", "radius": 1e200}, "data.radius: input should be less than or equal to 1000"),
        ({"kind": "double-moon", "distance": -1e200}, "data.distance: input should be greater than or equal to -1000"),
        ({"noise": 1e300}, "data.noise: input should be less than or equal to 1000"),
    ],
)
def test_numbers_out_of_range(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(data=data)


def test_weights_that_nobody_can_hold() -> None:
    with pytest.raises(MemoryError):
        load_data(config_of(data={"n_inputs": 2 * 10**9, "n_targets": 2 * 10**9}))


def test_more_shards_than_a_manifest_should_name(tmp_path: Path) -> None:
    config = config_of(data={"rows": 10**15})
    reader = SetReader(NumpyBackend(), make_set(config.data, 0), 0, "linear", 10**15)
    with pytest.raises(UserError, match=f"more than {MOST_SHARDS} shards; use --shard-rows of at least"):
        write_shards(reader, tmp_path / "shards", rows=10**15, config={})


def test_resident_rows_take_little_more_than_themselves() -> None:
    backend = NumpyBackend()
    source = load_data(config_of(data={"rows": 400_000, "test_rows": 0}), backend=backend).sources["train"]
    tracemalloc.start()
    resident = ResidentSource(backend, source, "float32")
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept = resident.inputs.nbytes + resident.targets.nbytes
    assert size < 1.01 * kept
    assert peak < kept + 8 * 2**20


@pytest.mark.parametrize("residency", ["auto", "device"])
def test_memory_that_is_smaller_than_it_says(residency: str) -> None:
    """Where rows should fit and do not, "auto" streams them, and "device" says so."""

    class Small(NumpyBackend):
        def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            raise MemoryError

    backend = Small()
    sources = load_data(config_of(), backend=backend).sources
    if residency == "auto":
        kept, line = settle(backend, sources, residency, "float32")
        assert kept == sources
        assert "generated as they are needed" in line
    else:
        with pytest.raises(UserError, match="do not fit on the device"):
            settle(backend, sources, residency, "float32")
