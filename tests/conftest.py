"""What all tests share: the backends, and a few small builders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpu_bp
from gpu_bp.backends import Backend, select

ROOT = Path(__file__).parents[1]
BACKENDS = ("numpy", "cupy")
FOUND = pytest.StashKey[dict[str, Backend]]()
LEFT_OUT = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=BACKENDS, help="run the tests of one backend only, and fail without it")


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("--backend")
    found, left_out = {}, {}
    for name in [wanted] if wanted else BACKENDS:
        try:
            found[name] = select(name)[0]
        except gpu_bp.UserError as error:
            left_out[name] = str(error)
    if wanted and left_out:
        raise pytest.UsageError(left_out[wanted])
    config.stash[FOUND], config.stash[LEFT_OUT] = found, left_out


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"backends: {', '.join(config.stash[FOUND])}", *config.stash[LEFT_OUT].values()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with a `backend` argument run on every backend that computes here; the header names the others."""
    if "backend" in metafunc.fixturenames:
        found = metafunc.config.stash[FOUND]
        metafunc.parametrize("backend", list(found.values()), ids=list(found))


@pytest.fixture
def tiny_config() -> Callable[..., dict[str, Any]]:
    """A small config as tables, any section changed: `tiny_config(train={"epochs": 3})`."""

    def make(**sections: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "name": "tiny",
            "data": {"kind": "double-moon", "rows": 50, "validation_rows": 20, "test_rows": 30},
            "network": {"hidden": [5]},
            "loss": {"kind": "squared_error"},
            "optimizer": {"kind": "sgd", "learning_rate": 0.1},
            "train": {"epochs": 2, "batch_size": 8},
        }
        for name, section in sections.items():
            config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
        return config

    return make


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bike_sharing() -> Path:
    """The csv file of UCI Bike Sharing, where it is to be found; else the test is skipped."""
    places = [ROOT / "data/bike-sharing/hour.csv", ROOT.parent / "shared/data/bike-sharing/hour.csv"]
    if "GPU_BP_DATA" in os.environ:
        places.insert(0, Path(os.environ["GPU_BP_DATA"]) / "bike-sharing/hour.csv")
    for place in places:
        if place.is_file():
            return place
    pytest.skip("UCI Bike Sharing is not here: see the README for where to get it, or set GPU_BP_DATA")


def random_targets(loss: gpu_bp.registry.Loss, rows: int, n_outputs: int, rng: np.random.Generator) -> np.ndarray:
    """Targets that suit a loss."""
    if loss.targets == "classes":
        return rng.integers(0, n_outputs, rows)
    if loss.targets == "unit":
        return rng.uniform(0, 1, (rows, n_outputs))
    return rng.standard_normal((rows, n_outputs))
