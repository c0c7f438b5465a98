"""One run, one folder: the process that writes into a run folder, or a shard folder, holds its lock.

The lock is the operating system's, on a file `.lock`, and goes with its process however that ends: what a killed one
left behind is taken over without asking. The file says who holds it; it is there only for that long.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from gpu_bp.errors import UserError

_log = logging.getLogger("gpu_bp")

LOCK = ".lock"  # in the run folder
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # what is written into it must not end in another file
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system that has none


class Lock:
    """The lock of a folder, held from `acquire` to `release`, or within a `with`.

    It is of this object: another one in the same process is refused too, and a process that is forked off does not
    hold it. Where the file system has no locks, a warning says so, and nothing is held.

    Raises:
        UserError: (by `acquire`) the folder is in use (by whom).
        OSError: (by `acquire`) the file cannot be written (which).
    """

    def __init__(self, folder: Path, what: str = "run folder", option: str = "--run") -> None:
        self.folder = folder
        self.path = folder / LOCK
        self._called, self._option = f"{what} {folder}", option
        self._fd: int | None = None

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock, or raises at once."""
        fd = self._locked()
        if fd is None:
            return
        self._fd = fd
        _held.add(self)
        with suppress(OSError):  # on a full disk it is held all the same
            os.ftruncate(fd, 0)
            since = f"{datetime.now():%Y-%m-%d %H:%M}"
            os.pwrite(fd, f"process {os.getpid()} on {platform.node()} since {since}\n".encode(), 0)

    def _locked(self) -> int | None:
        """The file, opened and locked; None where it cannot be locked."""
        while True:
            fd, taken = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666), False
            try:
                _take(fd)
                taken = self._is_in_place(fd)
                if taken:  # else its holder removed it after it was opened here: once more
                    return fd
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise self._refusal(error, fd) from None
                _log.warning(
                    f"{self._called} cannot be locked ({os.strerror(error.errno).lower()}): nothing keeps a "
                    "second run from it"
                )
                return None
            finally:
                if not taken:
                    os.close(fd)

    def _refusal(self, error: OSError, fd: int) -> Exception:
        """What is said where the file cannot be locked."""
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return OSError(error.errno, error.strerror, str(self.path))
        holder = " ".join(os.pread(fd, 200, 0).decode(errors="replace").split())  # empty if it has just begun
        return UserError(
            f"{self._called} is in use by {holder or 'another process'}; "
            f"wait for it, or choose another folder with {self._option}"
        )

    def release(self) -> None:
        """Gives it back, and removes the file; nothing where it is not held."""
        if self._fd is None:
            return
        # removed while it is held, so that it is no other's: whoever has opened it already finds it out of place
        with suppress(OSError):  # a file that stays does no harm
            if self._is_in_place(self._fd):
                self.path.unlink()
        self._forget()

    def _is_in_place(self, fd: int) -> bool:
        """Whether the open file is still the one in the folder."""
        try:
            return os.path.samestat(os.fstat(fd), self.path.stat())
        except FileNotFoundError:
            return False

    def _forget(self) -> None:
        fd, self._fd = self._fd, None
        _held.discard(self)
        if fd is not None:
            os.close(fd)


def _take(fd: int) -> None:
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # Windows
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    flock(fd, LOCK_EX | LOCK_NB)


# A forked process shares its parent's open files, and would keep the lock when the parent is dead: it closes them.
_held: set[Lock] = set()


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
