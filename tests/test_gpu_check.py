"""`make gpu-check`, as far as it goes without a GPU: on the stand-in, and on NumPy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, bike_sharing
from cuda_on_cpu.backend import cupy_on_cpu

from benchmarks import curves, epilogues, gpu_check, graphs, ranks
from gpu_bp.backends import Backend, NumpyBackend

NO_RESULT = "No result from a real device exists yet."


def run(backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, list[dict[str, Any]]]:
    """Its exit status, its page, and the curves of its report, for the first steps of the configs on this backend."""
    monkeypatch.setattr(gpu_check, "select", lambda name: (backend, "as asked"))
    monkeypatch.setattr(ranks, "find_spec", lambda name: None)  # no ranks: they would have no stand-in for a device
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
    assert [a["passed"] for a in json.loads((tmp_path / "report.json").read_text())["epilogues"]] == 3 * [True]


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
    monkeypatch.setattr("gpu_bp.backends._cupy", lambda local_rank: (None, "planted"))
    assert gpu_check.main([]) == 2
    assert "planted" in capsys.readouterr().err


@pytest.mark.kernels
def test_epilogue_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs, its trainings agree, and its results are the same apart and in one, whatever is faster here."""
    backend = cupy_on_cpu()
    monkeypatch.setattr(epilogues, "select", lambda name: (backend, "as asked"))
    for name, small in (("ROWS", (3, 9)), ("WIDTHS", (5, 8)), ("SECONDS", 0.0)):
        monkeypatch.setattr(epilogues, name, small)
    monkeypatch.setattr(epilogues, "run", partial(epilogues.run, steps=20))
    assert epilogues.main(["--json", str(tmp_path / "found.json")]) == 0
    assert "FASTER: tuple[Faster, ...] = (" in capsys.readouterr().out
    report = json.loads((tmp_path / "found.json").read_text())
    assert [a["passed"] for a in report["agreements"]] == 3 * [True]
    reasons = Counter((c["epilogue"], c["reason"]) for c in report["cells"])
    none = "cublasLt has no such product"
    # four shapes each; biases are float32, which those of 16 bits do not take, and a gelu needs 8 units
    assert reasons == {
        ("bias", ""): 4 * 4,
        ("bias", none): 4 * 2,
        ("relu_bias", ""): 4 * 4,
        ("relu_bias", none): 4 * 2,
        ("gelu_bias", ""): 2 * 4,
        ("gelu_bias", none): 2 * 4 + 4 * 2,
        ("bias_gradient", ""): 4 * 4,
    }
    for c in report["cells"]:
        assert c["difference"] <= 1e-5 or c["product"][2] == "tf32"
        assert c["reason"] or all(x > 0 for x in (*c["apart"], *c["in_one"]))


@pytest.mark.kernels
def test_an_epilogue_that_differs_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that fails."""
    backend = cupy_on_cpu()
    agrees = epilogues.run(backend, 4)[1]
    assert agrees.passed
    monkeypatch.setattr(epilogues, "STEP", -1.0)
    assert not agrees.passed
    monkeypatch.setattr(epilogues, "agree", lambda *arguments: [][1])
    failed = epilogues.run(backend)
    assert "IndexError" in epilogues.agreement_table(failed)
    assert not any(a.passed for a in failed)
    assert epilogues.run(NumpyBackend()) == []
    assert "TypeError" in epilogues.run_cell(NumpyBackend, "bias", ("float32", "float32", "float32"), 2, 2).reason


def test_which_epilogues_are_faster() -> None:
    """By quartiles apart, a margin, and results that agree; and from which shapes on that is so."""
    product, slow, fast = ("float32", "float32", "float32"), (9.0, 10.0, 11.0), (5.0, 6.0, 7.0)
    cell = partial(epilogues.Cell, "bias", product, 4, 8, apart=slow)
    assert cell(in_one=fast).faster
    assert not cell(in_one=(5.0, 6.0, 9.5)).faster
    assert not cell(in_one=fast, difference=2e-5).faster
    assert not cell(in_one=fast, reason="any").faster
    assert not epilogues.Cell("bias", product, 4, 8, apart=(9.9, 10.0, 10.1), in_one=(9.7, 9.8, 9.85)).faster
    assert not epilogues.Cell("bias", product, 4, 8, reason=epilogues.TOO_LARGE).faster

    def grid(*faster: tuple[int, int]) -> list[tuple[int, int]]:
        cells = [
            epilogues.Cell("bias", product, rows, width, slow, fast if (rows, width) in faster else slow)
            for rows in (1, 2, 4)
            for width in (8, 16)
        ]
        return [(row.least_rows, row.least_width) for row in epilogues.rows_of(cells, "90", "here")]

    assert grid() == []
    assert grid((4, 16)) == [(4, 16)]
    assert grid((1, 8), (2, 8), (4, 8), (1, 16), (2, 16), (4, 16)) == [(1, 8)]
    assert grid((4, 8), (2, 16), (4, 16)) == [(2, 16), (4, 8)]
    assert grid((1, 8), (4, 16)) == [(4, 16)]  # one small one by chance
    assert grid((1, 8), (2, 8)) == []
    fits = cell(in_one=fast)
    for reason, rows in ((epilogues.TOO_LARGE, 1), ("cublasLt has no such product", 0)):
        assert len(epilogues.rows_of([fits, replace(fits, rows=8, reason=reason)], "90", "here")) == rows


def test_epilogues_need_a_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_bp.backends._cupy", lambda local_rank: (None, "planted"))
    assert epilogues.main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: backend cupy cannot be used: planted")
    assert err.count("\n") == 1


def test_what_is_said_of_real_devices_is_true() -> None:
    """docs/gpu.md says that there is no result for as long as there is none, and no longer."""
    results = list((ROOT / "benchmarks/results").glob("*/report.json"))
    assert (NO_RESULT in (ROOT / "docs/gpu.md").read_text()) == (not results)
