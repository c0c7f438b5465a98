"""Everything that a machine with a GPU can tell, in one command: `make gpu-check`.

    python -m benchmarks.gpu_check [--backend cupy] [--out FOLDER]

1. the whole test suite on the device (but for what needs none: experiments, packaging, kernels on the CPU);
2. the first 500 steps of every config on the device and on NumPy: the loss curves must agree;
3. the benchmarks that exist.

It needs no network, takes at most 8 minutes, and writes `report.json` and `README.md` into
benchmarks/results/DEVICE-DATE/. Exit status 1 where something does not pass; the report is written all the same.
"""

from __future__ import annotations

import argparse
import json
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
from xml.etree import ElementTree

from benchmarks import curves, step
from gpu_bp import UserError, select
from gpu_bp.backends import Backend, NumpyBackend

ROOT = Path(__file__).parents[1]
NOT_ON_A_DEVICE = "not slow and not kernels"
TEST_SECONDS = 330


def versions(backend: Backend) -> dict[str, Any]:
    """What was used: device, driver, CUDA and package versions."""
    found: dict[str, Any] = {"backend": backend.name, "device": backend.device, "python": platform.python_version()}
    for package in ("gpu_bp", "numpy", "scipy", "cupy-cuda13x", "cupy-cuda12x"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if backend.name == "cupy":
        from cupy.cuda import runtime

        found["cuda driver"], found["cuda runtime"] = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    return found


def run_tests(backend: str) -> dict[str, Any]:
    """The suite on that backend: counts, and the outcome of every test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", NOT_ON_A_DEVICE, "-p", "no:cacheprovider"]
        command += ["--backend", backend, f"--junit-xml={report}"]
        if find_spec("xdist"):
            command += ["-n", "4"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS, check=False)
            output = done.stdout[-4000:] + done.stderr[-2000:]
        except subprocess.TimeoutExpired:
            output = f"stopped after {TEST_SECONDS} s"
        outcomes = read_outcomes(report) if report.exists() else {}
    counts = {outcome: list(outcomes.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
    return {**counts, "outcomes": outcomes, "output": "" if counts["passed"] and not counts["failed"] else output}


def read_outcomes(report: Path) -> dict[str, str]:
    """The outcome of each test in a JUnit file: passed, failed or skipped."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


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
    if tests["output"]:
        lines += ["```", tests["output"], "```", ""]
    lines += [
        "## Loss curves, against NumPy",
        "",
        "| config | precision | steps | difference | allowed | |",
        "|---|---|---|---|---|---|",
    ]
    for c in report["curves"]:
        difference = f"{c['difference']:.1e}" if c["difference"] is not None else c["reason"]
        allowed = curves.TOLERANCES[c["precision"]]
        verdict = "ok" if c["passed"] else "too far apart"
        lines.append(f"| {c['config']} | {c['precision']} | {c['steps']} | {difference} | {allowed:.0e} | {verdict} |")
    lines += [
        "",
        "## A step against its bare products",
        "",
        step.table([step.Cell(**cell) for cell in report["steps"]]),
        "",
    ]
    return "\n".join(lines)


def check(
    backend: Backend, *, curve_steps: int, data: tuple[str, ...], tests: bool, benchmarks: bool
) -> dict[str, Any]:
    """The whole report."""
    comparisons = []
    for config in curves.CONFIGS:
        overrides = data if config.stem == "bike-sharing" else ()
        for precision in curves.TOLERANCES:
            comparisons.append(curves.compare(config, precision, (backend, NumpyBackend()), curve_steps, overrides))
            print(f"{config.stem}, {precision}: {comparisons[-1].difference}", flush=True)
    cells = step.run(backend) if benchmarks else []
    no_tests = {"passed": 0, "failed": 0, "skipped": 0, "outcomes": {}, "output": ""}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": versions(backend),
        "curves": [asdict(c) | {"passed": c.passed} for c in comparisons],
        "steps": [asdict(cell) for cell in cells],
        "tests": run_tests(backend.name) if tests else no_tests,
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
    parser.add_argument("--bikes", help="hour.csv of UCI Bike Sharing, where it is elsewhere than the config says")
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
    everything = not options.only_curves
    data = (f"data.path={options.bikes}",) if options.bikes else ()
    report = check(backend, curve_steps=options.curve_steps, data=data, tests=everything, benchmarks=everything)
    device = re.sub(r"[^A-Za-z0-9]+", "-", backend.device).strip("-").lower()
    folder = options.out or ROOT / "benchmarks" / "results" / f"{device}-{report['date']}"
    write(report, folder)
    passed = report["tests"]["failed"] == 0 and all(c["passed"] for c in report["curves"])
    passed = passed and (report["tests"]["passed"] > 0 or not everything)
    print(f"{'all passed' if passed else 'not all passed'} in {time.monotonic() - begin:.0f} s: {folder / 'README.md'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
