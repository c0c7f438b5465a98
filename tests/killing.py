"""Runs that are killed, and gone on with until they end: a program of its own, which test_kill.py starts.

    python tests/killing.py lines NAME VISIT...        at every line of the code that writes files, a kill each
    python tests/killing.py writes NAME                in the middle of every write
    python tests/killing.py signals KILLS SEED         at random instants, by all sorts of signals

Every run is a process that is forked off this one, so that it does not have to start Python. What is printed last is a
JSON object: `kills`, by their kind, and `failures`: what was not as in the run that nobody killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from trainings import REWINDS, TRAININGS, outcome, tables, write_data

import gpu_bp
import gpu_bp.cli
import gpu_bp.report
from gpu_bp.checkpoint import FOLDER, CheckpointFolder
from gpu_bp.config import Config
from gpu_bp.config_file import dump_config, parse_config
from gpu_bp.whole_file import PartFile

# Whose lines are the kill points: all that writes a run, and decides what is written.
MODULES = (
    "checkpoint",
    "lock",
    "resuming",
    "run_folder",
    "runs",
    "saving",
    "tensor_file",
    "training_state",
    "whole_file",
)
LIVES = 5  # of a run that is killed at random; then it may end


def fork(do: Callable[[], Any], output: Path) -> int:
    """A process that does this, and says what it says into that file; its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        do()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def end_of(pid: int) -> int:
    """How it ended: its status, or less the number of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# kill points --------------------------------------------------------------------------------------------------

Place = tuple[str, int]


def at_lines(seen: Callable[[Place], None]) -> None:
    """Calls `seen` before every line of the modules is done, in every thread."""
    files = {str(Path(gpu_bp.__file__).parent / f"{name}.py"): name for name in MODULES}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        name = files.get(frame.f_code.co_filename)
        if name is None:
            return None
        if event == "line":
            seen((name, frame.f_lineno))
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


def kill_at(place: Place, visit: int) -> None:
    """This process is killed when it comes to that line so many times."""
    visits = 0

    def seen(here: Place) -> None:
        nonlocal visits
        if here == place:
            visits += 1
            if visits == visit:
                die()

    at_lines(seen)


def tear(write: int) -> None:
    """This process is killed in the middle of that write to a file."""
    whole, writes = PartFile.write, 0

    def half(self: PartFile, data: Any) -> int:
        nonlocal writes
        writes += 1
        if writes == write:
            whole(self, memoryview(data).cast("B")[: len(data) // 2])
            die()
        return whole(self, data)

    PartFile.write = half  # type: ignore[method-assign]


def train(config: Config, run: Path, planted: Callable[[], None] = lambda: None) -> Callable[[], None]:
    def do() -> None:
        planted()
        gpu_bp.train(config, backend="numpy", run=run, resume=True, pictures=False)

    return do


def visits_of(config: Config, folder: Path) -> Counter[Place]:
    """How often a whole run comes to each line, a run that is stopped in the middle and gone on with."""
    told, tell = os.pipe()

    def do() -> None:
        visits: Counter[Place] = Counter()
        lock = threading.Lock()

        def seen(place: Place) -> None:
            with lock:
                visits[place] += 1

        at_lines(seen)
        asked = iter(range(1000))
        run = {"backend": "numpy", "run": folder / "counted", "resume": True, "pictures": False}
        gpu_bp.train(config, **run, interrupted=lambda: next(asked) == 7)  # type: ignore[arg-type]
        gpu_bp.train(config, **run)  # type: ignore[arg-type]
        sys.settrace(None)
        with os.fdopen(tell, "w") as pipe:
            json.dump([[*place, n] for place, n in visits.items()], pipe)

    pid = fork(do, folder / "output.txt")
    os.close(tell)
    with os.fdopen(told) as pipe:
        text = pipe.read()
    if end_of(pid):
        raise RuntimeError((folder / "output.txt").read_text())
    return Counter({(name, line): n for name, line, n in json.loads(text)})


def one_by_one(config: Config, folder: Path, points: list[tuple[str, Callable[[], None]]]) -> dict[str, Any]:
    """A run for each kill point, killed there, resumed and killed at some other one, resumed and not killed."""
    rng = np.random.default_rng(0)
    (folder / "output.txt").touch()
    status = end_of(fork(train(config, folder / "whole"), folder / "output.txt"))
    whole, kills, failures = outcome(folder / "whole"), Counter(), []  # type: ignore[var-annotated]
    for k, (what, planted) in enumerate(points):
        run, output = folder / f"run{k}", folder / f"output{k}.txt"
        _, then = points[int(rng.integers(len(points)))]
        reached = 0
        for killing in (planted, then, lambda: None):
            status = end_of(fork(train(config, run, killing), output))
            kills[{-signal.SIGKILL: "killed", 0: "ended"}.get(status, "failed")] += 1
            found = whole_steps(run)
            if min(found, default=0) < 0 or max(found, default=0) < reached:
                failures.append(f"{what}: the run had reached step {reached}, and has checkpoints {found}")
            reached = max(found, default=0)
        if status or outcome(run) != whole:
            failures.append(f"{what}: status {status}, {differing(run, whole)}; {output.read_text()[-2000:]}")
    return {"points": len(points), "kills": kills, "failures": failures}


def whole_steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, -1 for one that is not whole."""
    found = []
    for path in (run / FOLDER).glob("step-*.json"):
        alone = run.with_name(f"{run.name}-alone")  # a folder in which there is no other
        shutil.rmtree(alone, ignore_errors=True)
        shutil.copytree(run / FOLDER, alone / FOLDER, ignore=lambda _, names: {n for n in names if n.endswith(".json")})
        shutil.copy(path, alone / FOLDER)
        checkpoint = CheckpointFolder(alone, 1).newest()
        found.append(checkpoint.facts.training.step if checkpoint else -1)
    return found


def differing(run: Path, whole: dict[str, Any]) -> str:
    try:
        ours = outcome(run)
    except Exception as error:
        return repr(error)
    return "differing: " + ", ".join(key for key in {**whole, **ours} if whole.get(key) != ours.get(key))


# signals ------------------------------------------------------------------------------------------------------


def wait_or_end(pid: int, seconds: float) -> bool:
    """Whether it has ended before so many seconds; it is not waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        time.sleep(min(0.001, seconds))
    return False


def hurt(pid: int, signals: list[signal.Signals], gap: float) -> None:
    """Sends the signals, one after the other."""
    for number in signals:
        os.kill(pid, number)  # it is not waited for yet, so that the number is no other's
        if wait_or_end(pid, gap):
            return


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
ENDS = (-KILL, -TERM, -INT, 128 + TERM, 128 + INT)
SIGNALS = [[KILL]] * 12 + [[TERM], [INT], [TERM, TERM], [INT, KILL], [INT, INT], [TERM, KILL]]


def command(run: Path, config: Path, resume: bool) -> list[str]:
    what = ["resume", str(run), "--trust-code"] if resume else ["train", str(config), "--run", str(run), "--resume"]
    return [*what, "--backend", "numpy", "--quiet"]


def start(arguments: list[str], output: Path, in_python: bool) -> int:
    """A process that runs gpu-bp: forked off, or from the start of Python."""
    if not in_python:
        return fork(lambda: gpu_bp.cli.main(arguments), output)
    with output.open("a") as file:
        return subprocess.Popen([sys.executable, "-m", "gpu_bp", *arguments], stdout=file, stderr=file).pid


def at_random(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """So many kills, each training in turn; every one is resumed until it ends by itself."""
    rng, counted, failures = np.random.default_rng(seed), Counter(), []  # type: ignore[var-annotated]
    gpu_bp.report.draw  # noqa: B018  matplotlib is loaded once
    wholes: dict[str, tuple[dict[str, Any], float]] = {}
    names = [*TRAININGS, "rewinds"]
    for k in range(10**6):
        if counted.total() >= kills:
            return {"kills": counted, "runs": k, "failures": failures}
        name = names[k % len(names)]
        output, config, run = folder / f"{k}-{name}.txt", folder / f"{name}.toml", folder / f"{k}-{name}"
        if name not in wholes:
            made = REWINDS if name == "rewinds" else tables(name, folder, train={"epochs": None, "steps": 400})
            config.write_text(dump_config(parse_config(made)))
            begin = time.monotonic()
            status = end_of(start(command(folder / name, config, False), output, False))
            if status:
                raise RuntimeError(output.read_text())
            wholes[name] = outcome(folder / name), time.monotonic() - begin
        whole, life = wholes[name]
        did = []
        for lives in range(LIVES + 1):
            resume = (run / "config.toml").exists() and bool(rng.integers(2))
            in_python = rng.random() < 0.1
            pid = start(command(run, config, resume), output, in_python)
            signals = [KILL] if name == "rewinds" else SIGNALS[int(rng.integers(len(SIGNALS)))]
            if lives < LIVES and not wait_or_end(pid, rng.uniform(0, life + in_python)):
                hurt(pid, signals, rng.uniform(0, 0.02))
            status = end_of(pid)
            did.append(f"{[s.name for s in signals]}: {status}")
            if status == 0:
                break
            counted["+".join(s.name for s in signals)] += 1
            if status not in ENDS and not (in_python and INT in signals):
                failures.append(f"{run}: {did}; {output.read_text()[-2000:]}")
        if status or outcome(run) != whole:
            failures.append(f"{run}: {did}; {differing(run, whole)}; {output.read_text()[-2000:]}")
    raise AssertionError


def points_of(config: Config, folder: Path, visits: list[int]) -> Iterator[tuple[str, Callable[[], None]]]:
    """The kill points of a training: its lines at these of their visits, or where there are none its writes."""
    if not visits:
        for k in range(1, 80):
            yield f"write {k}", partial(tear, k)
    for place, n in visits_of(config, folder).items() if visits else ():
        for visit in visits:
            if visit <= n:
                yield f"{place}, visit {visit}", partial(kill_at, place, visit)


def main(how: str, *arguments: str) -> None:
    # in memory where that can be: what is not on the disk yet is not lost with a process
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        write_data(folder)
        if how == "signals":
            result = at_random(folder, *map(int, arguments))
        else:
            config = parse_config(tables(arguments[0], folder, train={"epochs": 2, "log_every": 4}))
            result = one_by_one(config, folder, list(points_of(config, folder, [int(x) for x in arguments[1:]])))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
