"""Disks that are full, folders that cannot be written, and trainings that go on once they can."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trainings import last_checkpoint, outcome, tables, write_data

import gpu_bp

pytestmark = pytest.mark.slow
pytest.importorskip("resource", reason="Windows has no such limits")

LIMITED = """
import resource, sys
from gpu_bp.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
main(sys.argv[2:])
"""


def gpu_bp_command(*arguments: str | Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command line; files of more bytes than `limit` are refused to it, as on a full disk."""
    program = ["-m", "gpu_bp"] if limit is None else ["-c", LIMITED, str(limit)]
    command = [sys.executable, *program, *map(str, arguments), "--backend", "numpy", "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


Runs = tuple[Path, Path]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[int], Runs]:
    """A run that was stopped after 9 steps, and one that nobody disturbed; with so many hidden units."""

    def runs(width: int) -> Runs:
        write_data(tmp_path)
        config = tables("plateau", tmp_path, network={"hidden": [width, width]}, train={"log_every": 1})
        asked = iter(range(100))
        gpu_bp.train(config, backend="numpy", run=tmp_path / "whole")
        gpu_bp.train(config, backend="numpy", run=tmp_path / "run", interrupted=lambda: next(asked) == 8)
        return tmp_path / "run", tmp_path / "whole"

    return runs


def goes_on(run: Path, whole: Path) -> None:
    """What is there is whole, and once there is room the run goes on to the same end."""
    assert last_checkpoint(run).facts.training.step >= 9
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert (run / "metrics.jsonl").read_text().endswith("\n")
    done = gpu_bp_command("resume", run, "checkpoint.every_steps=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert outcome(run) == outcome(whole)


def test_a_checkpoint_that_finds_no_room(make: Callable[[int], Runs]) -> None:
    run, whole = make(60)
    tensors = run / "checkpoints/step-0000000009.safetensors"
    done = gpu_bp_command("resume", run, limit=tensors.stat().st_size - 1)  # more than any other file has
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {run}/checkpoints/step-0000000012.safetensors: File too large\n"
    goes_on(run, whole)


def test_a_line_of_metrics_that_finds_no_room(make: Callable[[int], Runs]) -> None:
    """Half of it would have had room: it is not left there."""
    run, whole = make(6)
    lines = (run / "metrics.jsonl").read_bytes()
    done = gpu_bp_command("resume", run, "checkpoint.every_steps=1000", limit=len(lines) + 100)
    assert done.returncode == 2
    assert done.stderr == f"error: {run}/metrics.jsonl: No space left on device\n"
    assert (run / "metrics.jsonl").read_bytes() == lines
    goes_on(run, whole)


def test_a_folder_of_checkpoints_that_is_none(make: Callable[[int], Runs]) -> None:
    run, whole = make(6)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()
    (run / "summary.json").unlink()  # as of a run that was killed
    done = gpu_bp_command("resume", run)
    assert done.returncode == 2
    assert done.stderr == f"error: {run}/checkpoints: File exists\n"
    (run / "checkpoints").unlink()
    assert gpu_bp_command("resume", run).returncode == 0
    assert outcome(run) == outcome(whole)


# In namespaces of its own, a disk of 100 kB: it fills up, gets room, can only be read, and can be written again.
DISK = """
import json, shutil, subprocess, sys
config, disk, out = sys.argv[1:]
def sh(*command):
    return subprocess.run(command, capture_output=True, text=True)
def gpu_bp(*arguments):
    done = sh(sys.executable, "-m", "gpu_bp", *arguments, "--backend", "numpy", "--quiet")
    print(json.dumps([done.returncode, done.stderr]))
mounted = sh("mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk)
if mounted.returncode:
    sys.exit(mounted.stderr)
run = disk + "/run"
gpu_bp("train", config, "--run", run)
sh("mount", "-o", "remount,ro", disk)
gpu_bp("resume", run)
sh("mount", "-o", "remount,rw,size=1M", disk)
gpu_bp("resume", run)
shutil.copytree(run, out)
"""


def test_a_disk_that_fills_up(make: Callable[[int], Runs], tmp_path: Path) -> None:
    """A real one, in memory; a file grows on it beside the run."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs user namespaces, to mount a small disk")
    _, whole = make(30)
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    config = whole / "config.toml"
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", DISK, config, disk, out], capture_output=True, text=True, check=False
    )
    if done.returncode and "permission denied" in done.stderr:
        pytest.skip(f"needs to mount a small disk: {done.stderr}")
    full, read_only, room = (json.loads(line) for line in done.stdout.splitlines())
    assert full[0] == read_only[0] == 2
    assert re.fullmatch(rf"error: {disk}/run/\S+: No space left on device\n", full[1])
    assert re.fullmatch(rf"error: {disk}/run/\S+: Read-only file system\n", read_only[1])
    assert room == [0, ""]
    assert outcome(out) == outcome(whole)
