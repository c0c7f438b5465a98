"""The processes that train together, called ranks as in MPI: who they are, and what they tell each other.

    with join() as ranks:
        ...
        ranks.sum_tree(gradients)

`join` finds out whether a launcher such as mpiexec has started several; a process by itself needs no MPI, and does not
import it. Within the `with`, what goes wrong on one rank ends all of them, and one line says on which: see `mpi.py`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import NoReturn, Protocol, Self, TypeVar

import numpy as np

from gpu_bp.errors import UserError

T = TypeVar("T")

# What launchers call the number of processes they have started; of Slurm the step's, since within a batch script there
# are all tasks of the job, but one process. mpiexec may itself have been started by Slurm: its own word comes first.
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
INSTALL = "pip install 'gpu_bp[mpi]'"


class Ranks(Protocol):
    """The ranks of a job, as one of them sees it. What is said of all must be called by all, in the same order.

    Attributes:
        rank: which one this is, from 0 on. size: how many there are, a power of two.
        local_rank: which one it is of those on the same machine. local_size: how many these are.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    def sum_tree(self, flat: np.ndarray) -> None:
        """Puts the sum over all ranks into `flat` (n,), float32 or float64, in the tree of `tree_sum.py`."""
        ...

    def broadcast(self, value: T) -> T:
        """What rank 0 has, on all ranks; an array is not copied on rank 0."""
        ...

    def all_gather(self, value: T) -> list[T]:
        """What each rank has, small, in the order of the ranks, on all of them."""
        ...

    def wait_on_devices(self) -> None:
        """From here on ranks may wait for each other unseen: one that fails will not wait long for the others."""
        ...

    def abort(self, line: str, status: int) -> NoReturn:
        """Ends all ranks at once, with this line and exit status."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Alone:
    """A process by itself."""

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def sum_tree(self, flat: np.ndarray) -> None:
        pass

    def broadcast(self, value: T) -> T:
        return value

    def all_gather(self, value: T) -> list[T]:
        return [value]

    def wait_on_devices(self) -> None:
        pass

    def abort(self, line: str, status: int) -> NoReturn:
        write_line(f"error: {line}")
        sys.exit(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def join(environment: Mapping[str, str] | None = None) -> Ranks:
    """The ranks of this job, of which this process is one.

    MPI is asked where the environment (this process's own, unless one is given) says that a launcher started several,
    or where Python was started as `python -m mpi4py`.

    Raises:
        UserError: there are several but no MPI to join them, or another than the launcher's, which would train each by
            itself; or their number is no power of two.
    """
    started = launched(os.environ if environment is None else environment)
    if started == 1 and "mpi4py" not in sys.modules:
        return Alone()
    _yield_where_crowded()
    several = f"{started} processes were started together, but" if started > 1 else "Python was started by mpi4py, but"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as mpi4py's of a wrong launcher, which is refused below
            from gpu_bp.mpi import Mpi, library, world
    except ModuleNotFoundError:
        raise UserError(f"{several} mpi4py is not installed: {INSTALL}") from None
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{several} mpi4py cannot load MPI ({str(error).splitlines()[0]}): {INSTALL}") from None
    rank, size = world()
    if size != started > 1:
        raise UserError(
            f"{several} {library()}, which mpi4py has loaded, knows of {size}: take the mpiexec that belongs to it"
        )
    if size & (size - 1):
        message = f"{size} ranks: their number must be a power of two, such as {1 << (size.bit_length() - 1)}"
        raise UserError(message) if rank == 0 else SystemExit(2)  # one of them says it
    return Mpi() if size > 1 else Alone()


def launched(environment: Mapping[str, str]) -> int:
    """How many processes a launcher has started, by what it has put into the environment; 1 where it has not."""
    for name in SIZES:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return 1


def _yield_where_crowded() -> None:
    """Ranks that wait take a core each; where there are fewer, MPICH is told to let go of it: several times faster."""
    ranks = os.environ.get("MPI_LOCALNRANKS", "")
    if ranks.isdecimal() and int(ranks) > (os.cpu_count() or 1):
        os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")


def write_line(line: str) -> None:
    """To stderr in a single write: launchers mix what their ranks write in several."""
    with suppress(OSError, ValueError):  # whoever read it has gone
        if sys.stderr:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
