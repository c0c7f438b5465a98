"""Ranks by MPI; the only importer of mpi4py.

How a job ends. A rank that is killed is the launcher's affair: it kills the others. One that raises, or ends while the
others go on, would leave them waiting for ever, so each rank ends through `__exit__`, where they tell each other what
came of them. If all get there, rank 0 says what went wrong on the first one on which something did, and all have its
exit status. Where another goes on, to be seen by a message from it that waits for an answer, or does not come for long
after a failure, the rank says itself what happened and aborts the job.

To see this, all that ranks do together is made of messages with one tag, to and from the partners rank ^ 1, ^ 2, ^ 4;
those at the end have another.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn, Self, TypeVar, cast

import numpy as np
from mpi4py import MPI

from gpu_bp.errors import Diverged, in_words
from gpu_bp.ranks import write_line
from gpu_bp.tree_sum import TreeSum, halving

T = TypeVar("T")

log = logging.getLogger(__name__)

WORK, END = 1, 2  # tags
LARGEST = 2**30  # bytes of a message; MPI counts up to 2^31
PATIENCE = 600.0  # seconds that a rank with an error waits for one that may be saving its network
ON_DEVICES = 5.0  # and for one that may wait for it on a device, which nobody sees
READ = 0.2  # seconds that a launcher has to read what was written, which otherwise may be lost in an abort
POLL = 0.01
INTERRUPTED = (130, 143)


class _Array(NamedTuple):
    """What has to be known of an array before it comes."""

    shape: tuple[int, ...]
    dtype: np.dtype


class _Outcome(NamedTuple):
    """Of a rank: its exit status, what is to be said of it, and where it was."""

    status: int
    line: str = ""
    trace: str = ""


class Mpi:
    """The ranks of MPI's world; see `gpu_bp.ranks.Ranks`."""

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD.Dup()  # no message of others is taken for one of these
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size
        machine = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank: int = machine.rank
        self.local_size: int = machine.size
        self._on_devices = False
        self.sum_tree = TreeSum(self._comm, WORK)
        self._partners = [level.partner for level in halving(0, self.rank, self.size)]
        machine.Barrier()
        if machine.rank == 0:
            _unlink_segments()

    def broadcast(self, value: T) -> T:
        described: object = value
        if isinstance(value, np.ndarray):
            described = _Array(value.shape, value.dtype)
        described = self.all_gather(described if self.rank == 0 else None)[0]
        if not isinstance(described, _Array):
            return cast(T, described)
        array = np.ascontiguousarray(value) if self.rank == 0 else np.empty(*described)
        flat = array.reshape(-1).view(np.uint8)
        for partner in self._partners:
            here, there = min(self.rank, partner), max(self.rank, partner)
            if here >= there - here:  # ranks below this distance have it, and each tells the one at this distance
                continue
            for start in range(0, len(flat), LARGEST):
                piece = flat[start : start + LARGEST]
                if self.rank == here:
                    self._comm.Send(piece, there, WORK)
                else:
                    self._comm.Recv(piece, here, WORK)
        return value if self.rank == 0 else cast(T, array)

    def all_gather(self, value: T) -> list[T]:
        values = {self.rank: value}
        for partner in self._partners:
            values |= self._comm.sendrecv(values, partner, WORK, source=partner, recvtag=WORK)
        return [values[rank] for rank in range(self.size)]

    def wait_on_devices(self) -> None:
        self._on_devices = True

    def abort(self, line: str, status: int) -> NoReturn:
        write_line(f"error: rank {self.rank}: {line}")
        time.sleep(READ)
        MPI.COMM_WORLD.Abort(status)
        os._exit(status)  # it may come back before the launcher has acted

    def __enter__(self) -> Self:
        """Rank 0 logs which process each rank is: a launcher names the process that was killed."""
        places: dict[str, list[str]] = {}
        for rank, (host, process) in enumerate(self.all_gather((MPI.Get_processor_name(), os.getpid()))):
            places.setdefault(host, []).append(f"{rank} (pid {process})")
        if self.rank == 0:
            on_hosts = "; ".join(f"on {host} {', '.join(ranks)}" for host, ranks in places.items())
            log.info("%d ranks: %s", self.size, on_hosts)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        own = _outcome(error)
        try:
            # those that have diverged have seen it together, and one of them may be saving its network
            hurries = self._on_devices and not isinstance(error, Diverged)
            outcomes = self._end(own, ON_DEVICES if hurries else PATIENCE)
        except BaseException:  # Ctrl-C again
            outcomes = []
        if not outcomes:
            line = own.line or ("interrupted" if own.status else "ended while other ranks go on")
            self.abort(line if not own.trace else f"{line}\n{own.trace}", own.status or 1)
        failed = next((rank for rank, outcome in enumerate(outcomes) if outcome.status), None)
        if failed is None:
            return
        first = outcomes[failed]
        if self.rank == 0 and first.line:
            write_line("\n".join(filter(None, (f"error: rank {failed}: {first.line}", first.trace))))
        raise SystemExit(first.status) from None

    def _end(self, own: _Outcome, patience: float) -> list[_Outcome]:
        """What came of each rank, once all have ended; none where another goes on."""
        comm, outcomes, begin = self._comm, {self.rank: own}, time.monotonic()
        for partner in self._partners:
            sent = comm.isend(outcomes, partner, END)
            while not comm.iprobe(partner, END):
                late = own.status and time.monotonic() - begin > patience
                if late or comm.iprobe(MPI.ANY_SOURCE, WORK):
                    return []
                time.sleep(POLL)  # and not spinning: rank 0 may have pictures to draw
            outcomes |= comm.recv(source=partner, tag=END)
            sent.wait()
        return [outcomes[rank] for rank in range(self.size)]


def _unlink_segments() -> None:
    """MPICH's shared memory, which all ranks of the machine have by now, loses its name.

    It goes with the last of them then. Else MPICH leaves 2 MB in /dev/shm whenever a job is aborted, and a loop of
    retries fills it. (Open MPI's ranks come to share memory later, and its launcher removes what they leave.)
    """
    with suppress(OSError):
        maps = Path("/proc/self/maps").read_text().splitlines()
        for path in {line.split(maxsplit=5)[-1] for line in maps if "/dev/shm/mpich_shm_" in line}:
            Path(path).unlink(missing_ok=True)


def _outcome(error: BaseException | None) -> _Outcome:
    """What is to be said of what a rank has raised."""
    if error is None:
        return _Outcome(0)
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        line = error.code if isinstance(error.code, str) else f"exit status {status}"
        return _Outcome(status, "" if status in (0, *INTERRUPTED) else line)
    if isinstance(error, KeyboardInterrupt):
        return _Outcome(130)
    if isinstance(error, BrokenPipeError):  # whoever read the output has gone
        return _Outcome(141)
    if line := in_words(error):
        return _Outcome(2, line)
    where = "".join(traceback.format_exception(error)).rstrip()
    return _Outcome(1, " ".join(f"{type(error).__name__}: {error}".split()), where)


def world() -> tuple[int, int]:
    """Which rank of how many this is to MPI."""
    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size


def library() -> str:
    """The MPI library in words."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"
