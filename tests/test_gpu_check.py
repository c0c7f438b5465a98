"""`make gpu-check`, as far as it goes without a GPU: on the stand-in, and on NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, bike_sharing
from cuda_on_cpu.backend import cupy_on_cpu

from benchmarks import curves, gpu_check, graphs
from gpu_bp.backends import Backend, NumpyBackend

NO_RESULT = "No result from a real device exists yet."


def run(backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, list[dict[str, Any]]]:
    """Its exit status, its page, and the curves of its report, for the first steps of the configs on this backend."""
    monkeypatch.setattr(gpu_check, "select", lambda name: (backend, "as asked"))
    status = gpu_check.main(["--only-curves", "--curve-steps", "5", "--out", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    assert report["versions"]["device"]
    return status, (folder / "README.md").read_text(), report["curves"]


@pytest.mark.kernels
def test_curves_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bike_sharing()
    status, _, found = run(cupy_on_cpu(), tmp_path, monkeypatch)
    assert status == 0
    assert len(found) == 2 * len(curves.CONFIGS)
    assert {c["steps"] for c in found} == {5}
    replayed = json.loads((tmp_path / "report.json").read_text())["graphs"]
    assert [c["differing"] for c in replayed] == [0] * len(found)
    assert all(c["graphs"] > 0 and c["passed"] for c in replayed)


@pytest.mark.kernels
def test_a_replay_that_differs_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that did not take place."""
    backend = type(cupy_on_cpu())
    path = next(path for path in curves.CONFIGS if path.stem == "xor")
    assert graphs.compare(path, "float32", backend, 6).passed
    without = graphs.compare(path, "float32", lambda graphs: backend(graphs=False), 6)
    assert (without.differing, without.graphs, without.passed) == (0, 0, False)

    class Forgetful(backend):  # type: ignore[misc,valid-type]
        def watch(self, gradients: Any, *rest: Any) -> None:
            if self._graphs:
                self.fill(gradients[:1], 0)

    differs = graphs.compare(path, "float32", Forgetful, 6)
    assert not differs.passed
    assert differs.differing
    assert "does not pass" in graphs.table([differs])
    broken = graphs.compare(path, "float32", NumpyBackend, 6)
    assert "TypeError" in graphs.table([broken])


def test_data_that_are_not_here_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "find_bikes", lambda: None)
    status, page, found = run(NumpyBackend(), tmp_path, monkeypatch)
    assert status == 1
    assert "not run: no file" in page
    assert [c["config"] for c in found if not c["passed"]] == ["bike-sharing"] * 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda *arguments: None, "does not pass"),
        (lambda self, activation, delta, *rest: self.fill(delta, np.nan), "diverged"),
        (lambda *arguments: [][1], "IndexError"),
    ],
)
def test_whatever_fails_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], message: str
) -> None:
    """Curves that differ, that end, and a backend that raises."""

    class Broken(NumpyBackend):
        hidden_delta = fault

    status, page, found = run(Broken(), tmp_path, monkeypatch)
    assert status == 1
    assert message in page
    assert not all(c["passed"] for c in found)


def test_the_suite_is_run_and_its_outcomes_kept() -> None:
    tests = gpu_check.run_tests("numpy", 100, "not slow and not kernels", "tests/test_random.py")
    assert tests["passed"] == len(tests["outcomes"]) > 5
    assert (tests["failed"], tests["trouble"]) == (0, "")
    assert gpu_check.run_tests("numpy", 0.01, "not slow", "tests/test_random.py")["trouble"].startswith("stopped after")
    assert "no tests ran" in gpu_check.run_tests("numpy", 100, "slow", "tests/test_random.py")["trouble"]


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_bp.backends._cupy", lambda: (None, "planted"))
    assert gpu_check.main([]) == 2
    assert "planted" in capsys.readouterr().err


def test_what_is_said_of_real_devices_is_true() -> None:
    """docs/gpu.md says that there is no result for as long as there is none, and no longer."""
    results = list((ROOT / "benchmarks/results").glob("*/report.json"))
    assert (NO_RESULT in (ROOT / "docs/gpu.md").read_text()) == (not results)
