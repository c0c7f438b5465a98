"""Everything that a machine with a GPU can tell, in one command: `make gpu-check`.

    python -m benchmarks.gpu_check [--backend cupy] [--out FOLDER]

1. the first 500 steps of every config on the device and on NumPy: the loss curves must agree;
2. its first 100 steps replayed from a CUDA graph and asked for one by one: all bits must be the same;
3. trainings in which cublasLt does biases and activations in one with the products: the losses must agree;
4. a step in shards by one rank, through a communicator of NCCL, and by two ranks: all bits must be the same;
5. the benchmarks that exist;
6. the test suite on the device, but for what needs none (experiments, packaging, kernels on the CPU), in the time
   that is left of 8 minutes.

It needs no network, and writes `report.json` and `README.md` into benchmarks/results/DEVICE-DATE/, also where a part
of it fails. Exit status 1 where something does not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import curves, data, epilogues, graphs, ranks, step
from gpu_bp import UserError, select
from gpu_bp.backends import Backend, NumpyBackend

ROOT = Path(__file__).parents[1]
NOT_ON_A_DEVICE = "not slow and not kernels"
SECONDS = 480  # for everything
NEEDED = ("pytest", "hypothesis", "mpmath", "jsonschema")  # by the tests, beside the base


def versions(backend: Backend) -> dict[str, Any]:
    """What was used: device, driver, CUDA and package versions."""
    found: dict[str, Any] = {"backend": backend.name, "device": backend.device, "python": platform.python_version()}
    for package in ("gpu_bp", "numpy", "scipy", "cupy-cuda13x", "cupy-cuda12x", "nvmath-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        found["driver"] = driver.read_text().splitlines()[0]
    if backend.name == "cupy":
        import cupy

        for name, ask in {
            "CUDA of the driver": cupy.cuda.runtime.driverGetVersion,
            "CUDA runtime": cupy.cuda.runtime.runtimeGetVersion,
            "NVRTC": cupy.cuda.nvrtc.getVersion,
            "memory, free and in all": cupy.cuda.runtime.memGetInfo,
        }.items():
            try:
                found[name] = ask()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


def run_tests(backend: str, seconds: float, selection: str = NOT_ON_A_DEVICE, *more: str) -> dict[str, Any]:
    """The suite on that backend, for so many seconds at most: counts, and the outcome of every test that ended."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        return _counted({}, f"not run: {', '.join(missing)} must be installed (pip install -e '.[test]')")
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "outcomes")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selection, *more]
        command += ["--backend", backend, *(["-n", "4"] if find_spec("xdist") else [])]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = {**inherited, "GPU_BP_OUTCOMES": str(lines)}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
            trouble = "" if done.returncode == 0 else f"{done.stdout[-4000:]}{done.stderr[-2000:]}"
        except subprocess.TimeoutExpired:
            trouble = f"stopped after {seconds:.0f} s, before all tests had ended"
        text = lines.read_text() if lines.exists() else ""
    return _counted(dict(line.split("\t", 1)[::-1] for line in text.splitlines()), trouble)


def _counted(outcomes: dict[str, str], trouble: str) -> dict[str, Any]:
    counts = {outcome: list(outcomes.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
    return {**counts, "outcomes": outcomes, "trouble": trouble}


def page(report: dict[str, Any]) -> str:
    """The report as a readable page."""
    tests, facts = report["tests"], report["versions"]
    lines = [f"# {facts['device']}, {report['date']}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [
        "",
        "## Tests",
        "",
        f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped.",
        "",
    ]
    lines += [f"- failed: `{name}`" for name, outcome in tests["outcomes"].items() if outcome == "failed"]
    if tests["trouble"]:
        lines += ["```", tests["trouble"], "```", ""]
    head = ["| config | precision | steps | difference | allowed | |", "|---|---|---|---|---|---|"]
    lines += ["", "## Loss curves, against NumPy", "", *head]
    for c in report["curves"]:
        difference = f"{c['difference']:.1e}" if c["difference"] is not None else c["reason"]
        allowed = curves.TOLERANCES[c["precision"]]
        verdict = "ok" if c["passed"] else "does not pass"
        lines.append(f"| {c['config']} | {c['precision']} | {c['steps']} | {difference} | {allowed:.0e} | {verdict} |")
    replayed = [graphs.Comparison(**{k: c[k] for k in c if k != "passed"}) for c in report["graphs"]]
    lines += ["", "## Steps replayed from a CUDA graph, against steps one by one", "", graphs.table(replayed), ""]
    agreed = [epilogues.Agreement(**{k: a[k] for k in a if k != "passed"}) for a in report["epilogues"]]
    lines += ["## Biases and activations in one with their products", "", epilogues.agreement_table(agreed), ""]
    ways = [ranks.Way(**{k: w[k] for k in w if k != "passed"}) for w in report["ranks"]]
    lines += ["## Steps in shards, by several ranks", "", ranks.table(ways), ""]
    floors = [step.Floor(**floor) for floor in report["steps"]]
    lines += ["", "## A step against its bare products", "", step.table(floors), ""]
    ratios = [data.Ratio(**ratio) for ratio in report["data"]]
    lines += [
        "## Data, and the watch over a step, against what they must not be slower than",
        "",
        data.table(ratios),
        "",
    ]
    if report["trouble"]:
        lines += ["```", report["trouble"], "```", ""]
    return "\n".join(lines)


def check(backend: Backend, *, curve_steps: int, only_curves: bool) -> dict[str, Any]:
    """The whole report."""
    begin = time.monotonic()
    comparisons = []
    for config in curves.CONFIGS:
        for precision in curves.TOLERANCES:
            comparisons.append(curves.compare(config, precision, (backend, NumpyBackend()), curve_steps))
            print(f"{config.stem}, {precision}: {comparisons[-1].difference} {comparisons[-1].reason}", flush=True)
    replayed = graphs.run(backend, min(graphs.STEPS, curve_steps))
    agreed = epilogues.run(backend, min(epilogues.STEPS, 2 * curve_steps))
    ways = ranks.run(backend)
    floors, ratios, trouble, tests = [], [], "", _counted({}, "")
    if not only_curves:
        try:
            floors = step.run(backend)
            ratios = [*data.run(backend), *step.run_watched(backend)]
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        tests = run_tests(backend.name, SECONDS - 20 - (time.monotonic() - begin))
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": versions(backend),
        "curves": [asdict(c) | {"passed": c.passed} for c in comparisons],
        "graphs": [asdict(c) | {"passed": c.passed} for c in replayed],
        "epilogues": [asdict(a) | {"passed": a.passed} for a in agreed],
        "ranks": [asdict(way) | {"passed": way.passed} for way in ways],
        "steps": [asdict(floor) for floor in floors],
        "data": [asdict(ratio) for ratio in ratios],
        "trouble": trouble,
        "tests": tests,
    }


def write(report: dict[str, Any], folder: Path) -> None:
    """report.json and README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "README.md").write_text(page(report))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cupy")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--curve-steps", type=int, default=curves.STEPS)
    parser.add_argument("--only-curves", action="store_true")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        backend, why = select(options.backend)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(why, flush=True)
    report = check(backend, curve_steps=options.curve_steps, only_curves=options.only_curves)
    device = re.sub(r"[^A-Za-z0-9]+", "-", backend.device).strip("-").lower()
    folder = options.out or ROOT / "benchmarks" / "results" / f"{device}-{report['date']}"
    write(report, folder)
    tests = report["tests"]
    passed = (
        all(c["passed"] for kind in ("curves", "graphs", "epilogues", "ranks") for c in report[kind])
        and not report["trouble"]
    )
    passed = passed and (options.only_curves or (tests["passed"] > 0 == tests["failed"] and not tests["trouble"]))
    print(f"{'all passed' if passed else 'not all passed'} in {time.monotonic() - begin:.0f} s: {folder / 'README.md'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
