"""A process for each side, asked over a pipe, so that no library's threads, memory or warm caches are another's.

It imports its library once. For each cell it forks: the child makes the side of that cell alone, in the state right
after the import, answers what it is asked, and ends.
"""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.peers.cells import Cell
from benchmarks.peers.sides import Peer, Side

CURVE = 20  # steps whose losses are compared
# Seconds before each timing: other libraries' threads spin for a while after their turn, and caches are full of theirs.
WARM_UP = 0.03


class LeftOut(Exception):
    """Why a side is not measured."""


@dataclass(frozen=True)
class Begun:
    """What a side says of itself before it is timed.

    `compile_seconds`: what the first step took more than a later one. `memory_bytes`: see `_memory`, or the GPU's.
    """

    losses: list[float]
    compile_seconds: float
    memory_bytes: int | None
    threads: int


class Process:
    """A side's process, as its owner sees it. Each method raises `LeftOut` where it gets no answer.

    `cpu_seconds`: what its cores have worked for `seconds`.
    """

    def __init__(self, peer: Peer, device: str, scratch: Path) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, peer, device, scratch), daemon=True)
        self._process.start()
        other.close()
        self.cpu_seconds = 0.0

    def machine(self) -> dict[str, Any]:
        """What the function `machine` of its module says."""
        answer: dict[str, Any] = self._ask("machine")
        return answer

    def begin(self, cell: Cell) -> Begun:
        """Makes the side of that cell, and takes its first steps."""
        answer: Begun = self._ask(cell)
        return answer

    def seconds(self, what: str, budget: float) -> float:
        """What a "step" takes, or the "products" of one, measured for about so many seconds."""
        taken, cpu = self._ask((what, budget))
        self.cpu_seconds += cpu
        return float(taken)

    def end(self) -> None:
        """Of the cell."""
        self._ask(None)

    def stop(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def _ask(self, question: Any) -> Any:
        try:
            self._pipe.send(question)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise LeftOut("its process ended") from None
        if isinstance(answer, LeftOut):
            raise answer
        return answer


def _serve(pipe: Connection, peer: Peer, device: str, scratch: Path) -> None:
    """A child for each cell; it has the pipe as long as it lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner closes the pipe
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)  # empty, so that all is compiled
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)  # no library is at work yet
    module = import_module(peer.module)
    while True:
        try:
            question = pipe.recv()
        except (EOFError, OSError):
            return
        if not isinstance(question, Cell | str):
            continue  # for a child that is dead, as the owner is told
        child = os.fork()
        if child == 0:
            _answer(pipe, peer, device, module, question)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            pipe.send(LeftOut(f"its process ended with status {status}"))


def _answer(pipe: Connection, peer: Peer, device: str, module: Any, question: Cell | str) -> NoReturn:
    try:
        if isinstance(question, str):
            pipe.send(module.machine(device))
        else:
            _measure(pipe, lambda: getattr(module, peer.make)(question, device, **peer.options))
    except (EOFError, BrokenPipeError):
        pass  # the owner is gone
    except Exception as error:
        pipe.send(LeftOut(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
    except BaseException:
        os._exit(1)
    os._exit(0)


def _measure(pipe: Connection, make: Callable[[], Side]) -> None:
    before = _memory("RssAnon")
    side = make()
    steps = side.steps_a_call
    begin = time.perf_counter()
    losses = side.losses(steps)
    first = time.perf_counter()
    losses += side.losses(CURVE - steps)
    later = (time.perf_counter() - first) * steps / (CURVE - steps)
    seconds_a_call(side.step, side.wait, WARM_UP)
    memory = side.device_bytes()
    if memory is None and before is not None:
        memory = (_memory("VmHWM") or 0) - (_memory("RssFile") or 0) - before
    compiled = side.compile_seconds + max(0.0, first - begin - later)
    pipe.send(Begun(losses, compiled, memory, side.threads))
    calls, worked = {"step": side.step}, time.process_time()
    while (asked := pipe.recv()) is not None:
        what, budget = asked
        if what == "step":
            side.begin()
        elif what not in calls:
            calls[what] = side.products()
        taken = seconds_a_call(calls[what], side.wait, budget)
        # since the last answer: threads may spin for a while after it, and that is no other work of the machine
        last, worked = worked, time.process_time()
        pipe.send((taken / steps if what == "step" else taken, worked - last))
    pipe.send(None)


def seconds_a_call(call: Callable[[], None], wait: Callable[[], None], budget: float) -> float:
    """Of as many calls as fit into the budget, after some that are not counted.

    Where other work comes between, and calls take much longer than they did, there are fewer.
    """

    def mean(n: int, limit: float) -> float:
        made, part, begin = 0, max(1, n // 16), time.perf_counter()
        while made == 0 or (made < n and time.perf_counter() - begin <= limit):
            for _ in range(part):
                call()
            made += part
        wait()
        return (time.perf_counter() - begin) / made

    n, begin = 1, time.perf_counter()
    last = mean(n, WARM_UP)
    while time.perf_counter() - begin < WARM_UP:
        n *= 2
        last = mean(n, WARM_UP)
    return mean(max(1, int(budget / last)), 3 * budget)


def machine_cpu_seconds() -> float | None:
    """What all cores of the machine have worked since it was started; None where the system does not say."""
    try:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _memory(what: str) -> int | None:
    """Bytes, from Linux; None elsewhere.

    Of the resident set RssAnon is what is in no file, RssFile the pages of libraries that were read so far, and VmHWM
    the highest of both together.
    """
    try:
        found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
