"""Every benchmark runs, in its smallest form; what it measures is not judged here.

More of those of peers is in test_peers.py, and of the check of a GPU in test_gpu_check.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from on_mpi import Mpi

from benchmarks import checkpoint, data, distributed, ranks, rounds, scaling, soak, step
from benchmarks.peers import __main__ as peers
from benchmarks.peers.cells import Cell
from gpu_bp.backends import Backend

COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in (ROOT / "benchmarks").rglob("*.py")
    if re.search("^if __name__ == ", path.read_text(), re.M)
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks and arrays; each round is a single call, however long it takes."""
    for module in (rounds, checkpoint):
        monkeypatch.setattr(module, "ROUND_SECONDS", 0.0)
    for name, number in (("FILL", 1000), ("BATCH", 16), ("WIDTH", 8)):
        monkeypatch.setattr(data, name, number)
    monkeypatch.setattr(step, "CELLS", (Cell(3, 8, 4, "tanh", "adam", "squared_error"),))
    monkeypatch.setattr(step, "WATCHED", (([2, 3, 1], 4, 0.01),))
    monkeypatch.setattr(step, "WATCH_ROUNDS", 3)
    monkeypatch.setattr(step, "WATCH_SECONDS", 0.0)
    sections = {"data": {**checkpoint.CONFIG["data"], "rows": 64, "n_inputs": 4}, "network": {"hidden": [4]}}
    monkeypatch.setattr(checkpoint, "CONFIG", {**checkpoint.CONFIG, **sections})


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    """It can be started, and says how."""
    done = subprocess.run([sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m {name} " in done.stdout


@pytest.mark.usefixtures("small")
def test_step(backend: Backend) -> None:
    """Its table has a line a cell; and of the watch over a step."""
    floors = step.run(backend)
    assert [floor.shape for floor in floors] == ["3x8 batch 4"]
    assert floors[0].seconds > 0 < floors[0].gemm_seconds
    assert step.table(floors).count("\n") == 2
    ratios = step.run_watched(backend)
    assert [ratio.limit for ratio in ratios] == [None, 0.01]
    assert all(ratio.value and ratio.value > 0 for ratio in ratios)


@pytest.mark.usefixtures("small")
def test_data(backend: Backend) -> None:
    """It says what was not measured."""
    ratios = data.run(backend, gib=0.001)
    assert all(ratio.value is None or ratio.value > 0 for ratio in ratios)
    assert ("not measured" in data.table(ratios)) == (backend.name == "numpy")
    assert len(ratios) == (6 if backend.name == "numpy" else 2)


@pytest.mark.usefixtures("small")
def test_checkpoint(backend: Backend) -> None:
    cost = checkpoint.measure(backend, 3)
    assert min(cost.step, cost.step_with, cost.ratio, cost.ratio_of_fastest, cost.waited, cost.computed) > 0


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("benchmark", "options", "n"), [(step, [], 3), (data, ["--gib", "0.001"], 6), (checkpoint, ["--rounds", "1"], 1)]
)
def test_command(
    benchmark: ModuleType, options: list[str], n: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints is also what it writes."""
    file = tmp_path / "report.json"
    benchmark.main([*options, "--backend", "numpy", "--json", str(file)])
    report = json.loads(file.read_text())
    lines = report if isinstance(report, list) else [report]
    printed = capsys.readouterr().out
    assert len(lines) == n
    for line in lines:
        name, number = line.get("what", ""), line.get("value", line.get("ratio"))
        assert name in printed
        texts = ["not measured"] if number is None else [f"{number:.{digits}f}" for digits in (2, 3, 4)]
        assert any(text in printed for text in texts)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux, which says what a process holds")
def test_soak_command(capsys: pytest.CaptureFixture[str]) -> None:
    """What is held at the end of a long training is in test_soak.py."""
    soak.main(["300", "--backend", "numpy"])
    held = json.loads(capsys.readouterr().out)
    assert [min(held[when].values()) > 0 for when in ("begin", "end")] == [True, True]


@pytest.mark.mpi
def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums and steps on 1, 2 and 4 ranks are measured and predicted; what it prints is also what it writes."""
    file = tmp_path / "report.json"
    mpiexec = str(Mpi("mpich").mpiexec)
    scaling.main(["--little", "--rounds", "1", "--seconds", "0", "--mpiexec", mpiexec, "--json", str(file)])
    report, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert [(check["what"], check["ranks"]) for check in report["checks"]] == [
        *((f"sum of {size}", n) for n in (2, 4) for size in ("1.0 KiB", "1.0 MiB")),
        *(("step of 3 x 8, batch 16", n) for n in (1, 2, 4)),
    ]
    for check in report["checks"]:
        assert min(check["predicted"], check["measured"], check["usual"]) > 0
        assert f"| {1e3 * check['predicted']:.3g} | {1e3 * check['measured']:.3g} |" in printed
    assert list(report["links"]) == ["2", "4"]


def test_scaling_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is measured for it; that docs/scaling.md has it is in test_scaling.py."""
    scaling.main(["--paper"])
    assert capsys.readouterr().out.count("| 1,024 | ") >= len(scaling.NETWORKS)


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [
        (scaling, ["--mpiexec", "no/mpiexec"], "error: no mpi4py, or no MPI beside it: pip install 'gpu_bp[mpi]'"),
        (peers, ["--rounds", "1"], "argument --rounds: must be at least 2, not 1"),
        (checkpoint, ["--rounds", "0"], "argument --rounds: must be at least 1, not 0"),
        (data, ["--gib", "nan"], "argument --gib: must be at least 0.001, not nan"),
        (soak, ["99"], "argument steps: must be at least 100, not 99"),
        *(
            (module, ["--backend", "cupy"], "error: backend cupy cannot be used: planted;")
            for module in (step, data, checkpoint, soak, distributed, ranks)
        ),
    ],
)
def test_options_that_cannot_be(
    benchmark: ModuleType,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("gpu_bp.backends._cupy", lambda local_rank: (None, "planted"))
    with pytest.raises(SystemExit) as caught:
        benchmark.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
