"""One run, one folder: shown with real processes, which say over pipes how far they are."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_bp import UserError
from gpu_bp.lock import LOCK, Lock

fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")

# Reads a line from the test and answers it: "acquire", "release", or "fork", whose answer is the child's, its number.
PROCESS = """
import os, signal, sys
from pathlib import Path
from gpu_bp.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    if line == "fork\\n":
        if os.fork() == 0:
            lock.release()  # as at the end of a with block
            print(os.getpid(), flush=True)
            signal.pause()
        continue
    try:
        getattr(lock, line.strip())()
        print("done", flush=True)
    except ValueError as error:
        print(error, flush=True)
"""

# Takes the lock and gives it back many times over; a file of which there can be one says if two have it at once.
CONTENDER = """
import os, sys
from pathlib import Path
from gpu_bp import UserError
from gpu_bp.lock import Lock
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
taken = 0
while taken < 40:
    try:
        with Lock(folder):
            os.close(os.open(folder / "one", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "one")
            taken += 1
    except UserError:
        pass
print("done", flush=True)
"""

# Twenty processes that are let go together; each says what came of it, and stays until the test has heard all.
RACE = """
import os, sys
from pathlib import Path
from gpu_bp import UserError
from gpu_bp.lock import Lock
(gate, open_gate), (end, say_end) = os.pipe(), os.pipe()
print("ready", flush=True)
for _ in range(20):
    if os.fork() == 0:
        os.close(open_gate)
        os.close(say_end)
        os.read(gate, 1)
        try:
            Lock(Path(sys.argv[1])).acquire()
            said = "done"
        except UserError as error:
            said = str(error)
        os.write(1, (said + "\\n").encode())
        os.read(end, 1)
        os._exit(0)
os.close(open_gate)
sys.stdin.readline()
"""


class Process:
    """A process of the test's own, told what to do a line at a time."""

    def __init__(self, script: str, folder: Path) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", script, str(folder)], text=True, **pipes)  # type: ignore[call-overload]

    def tell(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return str(self.process.stdout.readline().rstrip("\n"))

    def __call__(self, line: str) -> str:
        self.tell(line)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process; all of them end with the test."""
    started: list[Process] = []

    def begin(script: str = PROCESS) -> Process:
        started.append(Process(script, tmp_path))
        assert started[-1].answer() == "ready"
        return started[-1]

    yield begin
    for process in started:
        process.end()


def test_a_second_process_is_refused(start: Start, tmp_path: Path) -> None:
    """Until the first gives the folder back, or ends: then nothing is left behind."""
    first, second = start(), start()
    assert first("acquire") == "done"
    holder = rf"process {first.process.pid} on {re.escape(platform.node())} since \d{{4}}-\d\d-\d\d \d\d:\d\d"
    refused = rf"run folder {re.escape(str(tmp_path))} is in use by {holder}; wait for it, or choose another folder .*"
    assert re.fullmatch(refused, second("acquire"))
    assert re.fullmatch(refused, second("acquire"))  # being refused changed nothing
    with pytest.raises(UserError, match=refused):
        Lock(tmp_path).acquire()
    assert first("release") == "done"
    assert list(tmp_path.iterdir()) == []
    assert second("acquire") == "done"
    assert f"in use by process {second.process.pid} on" in first("acquire")
    assert second("release") == "done"
    assert first("release") == "done"  # of one that is not held


def test_a_killed_process_leaves_nothing_that_matters(start: Start, tmp_path: Path) -> None:
    first = start()
    assert first("acquire") == "done"
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    assert (tmp_path / LOCK).exists()
    with Lock(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / LOCK).exists()


def test_of_20_processes_one_gets_it(start: Start) -> None:
    race = start(RACE)
    answers = [race.answer() for _ in range(20)]
    assert answers.count("done") == 1
    assert sum("is in use by " in answer for answer in answers) == 19


def test_there_is_never_a_second_holder(start: Start, tmp_path: Path) -> None:
    """Although the file is removed each time, and whoever opened it before that has its lock in hand."""
    processes = [start(CONTENDER) for _ in range(3)]
    for process in processes:
        process.tell("go")
    assert [process.answer() for process in processes] == ["done"] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking it, its holder may end and another begin."""
    real, others = fcntl.flock, [Lock(tmp_path), Lock(tmp_path)]

    def flock(fd: int, operation: int) -> None:
        if others:  # one comes and goes, and then another comes: this file is no longer there
            monkeypatch.setattr(fcntl, "flock", real)
            (tmp_path / LOCK).unlink()
            others.pop().acquire()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    other = others[-1]
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        Lock(tmp_path).acquire()
    other.release()


def test_one_process_may_not_train_twice(tmp_path: Path) -> None:
    with Lock(tmp_path) as held:
        for again in (held, Lock(tmp_path)):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
                again.acquire()
    with Lock(tmp_path), pytest.raises(KeyError):
        raise KeyError
    assert not (tmp_path / LOCK).exists()


def test_a_forked_process_does_not_hold_it(start: Start) -> None:
    """It may outlive its parent, and what it does at its end does not take the lock from it."""
    parent, other = start(), start()
    assert parent("acquire") == "done"
    child = int(parent("fork"))
    try:
        assert f"is in use by process {parent.process.pid} on" in other("acquire")
        os.kill(parent.process.pid, signal.SIGKILL)
        parent.process.wait()
        assert other("acquire") == "done"
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_program_that_was_started_does_not_hold_it(tmp_path: Path) -> None:
    held = Lock(tmp_path)
    held.acquire()
    command = [sys.executable, "-c", "print('begun', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"begun\n"
        held._forget()  # as if this process had ended
        with Lock(tmp_path):
            assert program.poll() is None
        program.communicate(b"\n")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING, "gpu_bp"), Lock(tmp_path), Lock(tmp_path):
        pass
    (message, _) = caplog.messages
    assert message == (
        f"run folder {tmp_path} cannot be locked ({os.strerror(code).lower()}): nothing keeps a second run from it"
    )


def test_other_faults_pass_on_with_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Lock(tmp_path / "none").acquire()
    assert caught.value.filename == str(tmp_path / "none" / LOCK)

    def flock(fd: int, operation: int) -> None:
        opened.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    opened: list[int] = []
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error") as failed:
        Lock(tmp_path).acquire()
    assert failed.value.filename == str(tmp_path / LOCK)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_a_folder_that_is_gone_at_the_end_is_no_fault(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with Lock(folder):
        (folder / LOCK).unlink()
        folder.rmdir()
    assert not folder.exists()


def test_what_another_put_in_its_place_stays(tmp_path: Path) -> None:
    """Somebody removed the file by hand, and a second run began: the first does not take its file away too."""
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire()
    (tmp_path / LOCK).unlink()
    second.acquire()
    first.release()
    with pytest.raises(UserError, match="is in use by"):
        Lock(tmp_path).acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    """In a run folder that came from elsewhere it would have another file overwritten."""
    (tmp_path / "letter.txt").write_text("Dear Simon")
    (tmp_path / LOCK).symlink_to(tmp_path / "letter.txt")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / LOCK))):
        Lock(tmp_path).acquire()
    assert (tmp_path / "letter.txt").read_text() == "Dear Simon"
