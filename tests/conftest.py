"""What all tests share: the backends, and a few small builders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from on_mpi import PREFIXES, Mpi

import gpu_bp
from benchmarks.curves import find_bikes
from gpu_bp.backends import Backend, select
from gpu_bp.testing import random_targets as random_targets

ROOT = Path(__file__).parents[1]
# No deadlines: a busy machine is no failure.
hypothesis.settings.register_profile("gpu_bp", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("gpu_bp")

# cupy-on-cpu is the CuPy backend on a stand-in for CuPy, its kernels compiled by g++: see cuda_on_cpu/.
BACKENDS = ("numpy", "cupy-on-cpu", "cupy")
LEFT_OUT = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=BACKENDS, help="run the tests that take a backend on this one only")


def pytest_configure(config: pytest.Config) -> None:
    """Asks once whether there is a GPU. Without one the `cupy` tests are left out, and the header says why."""
    config.stash[LEFT_OUT] = {}
    wanted = config.getoption("--backend")
    try:
        select("cupy")
    except gpu_bp.UserError as error:
        if wanted == "cupy":
            raise pytest.UsageError(str(error)) from None
        config.stash[LEFT_OUT]["cupy"] = str(error)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"left out: {reason}" for reason in config.stash[LEFT_OUT].values()]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Appends a test's outcome to the file that $GPU_BP_OUTCOMES names, so that it is known even if the rest is not."""
    path = os.environ.get("GPU_BP_OUTCOMES")
    if path and "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or not report.passed):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{report.outcome}\t{report.nodeid}\n")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with a `backend` argument run on every backend; slow ones not on the CPU's stand-in for a GPU."""
    if "backend" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("--backend")
    slow = metafunc.definition.get_closest_marker("slow") is not None
    names = [
        pytest.param(name, marks=pytest.mark.kernels if name == "cupy-on-cpu" else ())
        for name in ([wanted] if wanted else BACKENDS)
        if name not in metafunc.config.stash[LEFT_OUT] and not (slow and name == "cupy-on-cpu")
    ]
    metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """A backend by name; fails where cupy-on-cpu lacks CuPy's wheel or g++."""
    if request.param == "cupy-on-cpu":
        from cuda_on_cpu.backend import cupy_on_cpu

        return cupy_on_cpu()
    return select(request.param)[0]


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
    path = find_bikes()
    if path is None:
        pytest.skip("UCI Bike Sharing is not here: see the README for where to get it, or set GPU_BP_DATA")
    return path


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.mpi) for name in PREFIXES])
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """Each MPI that is installed."""
    return Mpi(request.param)


@pytest.fixture(params=[pytest.param("mpich", marks=pytest.mark.mpi)])
def mpich(request: pytest.FixtureRequest) -> Mpi:
    return Mpi(request.param)
