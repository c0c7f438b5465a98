"""`make gpu-check`, as far as it goes without a GPU: on the stand-in, and on NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import curves, gpu_check, step
from gpu_bp.backends import Backend, NumpyBackend

NO_RESULT = "No result from a real device exists yet."


def run(backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Its exit status and its page, for the first steps of the configs on this backend."""
    monkeypatch.setattr(gpu_check, "select", lambda name: (backend, "as asked"))
    arguments = ["--only-curves", "--curve-steps", "5", "--out", str(folder), "--bikes", str(folder / "none.csv")]
    return gpu_check.main(arguments), (folder / "README.md").read_text()


def test_curves_agree(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, page = run(backend, tmp_path, monkeypatch)
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0
    assert len(report["curves"]) == 2 * len(curves.CONFIGS)
    assert {c["steps"] for c in report["curves"] if c["difference"] is not None} == {5}
    assert "no file" in page, "data that are not here are told"
    assert report["versions"]["device"]


def test_curves_that_differ_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = NumpyBackend()
    monkeypatch.setattr(backend, "hidden_delta", lambda *arguments: None)
    status, page = run(backend, tmp_path, monkeypatch)
    assert status == 1
    assert "too far apart" in page


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_bp.backends._cupy", lambda: (None, "planted"))
    assert gpu_check.main([]) == 2
    assert "planted" in capsys.readouterr().err


def test_outcomes(tmp_path: Path) -> None:
    cases = '<testcase classname="a" name="x"/><testcase classname="a" name="y"><failure/></testcase>'
    cases += (
        '<testcase classname="a" name="z"><skipped/></testcase><testcase classname="b" name="x"><error/></testcase>'
    )
    (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    outcomes = gpu_check.read_outcomes(tmp_path / "junit.xml")
    assert outcomes == {"a::x": "passed", "a::y": "failed", "a::z": "skipped", "b::x": "failed"}


def test_step_benchmark(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, and its table has a line a cell; what it measures is not judged here."""
    monkeypatch.setattr(step, "ROUND_SECONDS", 0.0)
    cell = step.measure(backend, 8, 4, "tanh", "adam")
    assert cell.seconds > 0 < cell.gemm_seconds
    assert step.table([cell]).count("\n") == 2


def test_what_is_said_of_real_devices_is_true() -> None:
    """docs/gpu.md says that there is no result for as long as there is none, and no longer."""
    results = list((ROOT / "benchmarks/results").glob("*/report.json"))
    assert (NO_RESULT in (ROOT / "docs/gpu.md").read_text()) == (not results)
