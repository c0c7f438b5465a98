"""Sums over ranks that have a GPU each: messages of NCCL, on a stream of their own, and additions in the tree.

NCCL's own sums are not used: in which order they add depends on how many ranks there are and how they are connected.
The way is that of `tree_sum.py`: at each level half of what is still shared goes to a partner, whose half comes and
is added; then the sums go the way back. Neither a message nor an addition waits for the host, and a CUDA graph can hold
them all; the stream is joined to whichever asks, by events.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from gpu_bp.backends import cuda_kernels as kernels
from gpu_bp.backends.cuda_launch import cupy, launch, nccl
from gpu_bp.backends.cuda_products import first_line
from gpu_bp.errors import UserError
from gpu_bp.ranks import Ranks
from gpu_bp.spec import Array
from gpu_bp.tree_sum import SMALL, halving

PIECE = 2**26  # bytes that are summed at a time: scratch is for half of them
INSTALL = "pip install nvidia-nccl-cu13, or nvidia-nccl-cu12 with cupy-cuda12x"


def why_not_nccl(ranks: Ranks) -> str:
    """Why NCCL cannot be between these ranks, the same on all; "" where it can."""
    device = cupy.cuda.Device()
    uuid = cupy.cuda.runtime.getDeviceProperties(device.id).get("uuid")
    own = f"{device.pci_bus_id} {uuid}", _lacks()
    devices, lacks = zip(*ranks.all_gather(own), strict=True)
    for rank, lack in enumerate(lacks):
        if lack:
            return f"{lack} on rank {rank}"
    for rank, each in enumerate(devices):
        if (first := devices.index(each)) < rank:
            return f"ranks {first} and {rank} share a GPU"
    return ""


def _lacks() -> str:
    """What is missing here, in words."""
    if os.environ.get("GPU_BP_NCCL") == "0":
        return "GPU_BP_NCCL=0"
    return "" if nccl().available else f"NCCL is not installed ({INSTALL})"


class ByNccl:
    """An `Exchange` between the devices of the ranks; all of them have to make one.

    Raises:
        UserError: NCCL cannot connect them.
    """

    beside = True

    def __init__(self, ranks: Ranks) -> None:
        ranks.wait_on_devices()
        with _in_one_line():
            own = nccl().get_unique_id() if ranks.rank == 0 else b""
        number = ranks.broadcast(own)
        with _in_one_line():
            self._communicator = nccl().NcclCommunicator(ranks.size, number, ranks.rank)
        # It is never destroyed: NCCL would wait for the end of every graph that has its messages, which may come later
        # when Python clears up, or never; the end of the process does as well.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._communicator))
        self._rank, self._size = ranks.rank, ranks.size
        self._types = {"float32": nccl().NCCL_FLOAT32, "float64": nccl().NCCL_FLOAT64}
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._asked, self._summed = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self._scratch = cupy.empty(PIECE // 2 + SMALL, np.uint8)
        self.by = f"by NCCL {_dotted(nccl().get_version())}"

    def begin(self, arrays: Sequence[Array]) -> None:
        self._asked.record()
        self._stream.wait_event(self._asked)
        with self._stream:
            for array in arrays:
                width = PIECE // array.itemsize
                for start in range(0, len(array), width):
                    self._sum(array[start : start + width])

    def end(self) -> None:
        self._summed.record(self._stream)
        cupy.cuda.get_current_stream().wait_event(self._summed)

    def _sum(self, flat: Array) -> None:
        levels = halving(len(flat), self._rank, self._size)
        if flat.nbytes <= SMALL:  # partners swap all, in half as many messages
            for partner, _, _ in levels:
                self._swap_and_add(flat, flat, partner)
            return
        for partner, mine, theirs in levels:
            self._swap_and_add(flat[theirs], flat[mine], partner)
        for partner, mine, theirs in reversed(levels):
            self._swap(flat[mine], flat[theirs], partner)

    def _swap_and_add(self, given: Array, kept: Array, partner: int) -> None:
        """What the partner gives is added to what is kept; the lower rank's is the left one, as in the tree."""
        got = self._scratch[: kept.nbytes].view(kept.dtype)
        self._swap(given, got, partner)
        lower, upper = (kept, got) if self._rank < partner else (got, kept)
        launch(kernels.add(), lower, upper, kept)

    def _swap(self, given: Array, got: Array, partner: int) -> None:
        communicator, kind, stream = self._communicator, self._types[given.dtype.name], self._stream.ptr
        nccl().groupStart()
        try:
            communicator.send(given.data.ptr, given.size, kind, partner, stream)
            communicator.recv(got.data.ptr, got.size, kind, partner, stream)
        finally:
            nccl().groupEnd()


@contextmanager
def _in_one_line() -> Iterator[None]:
    """What NCCL says of why it cannot connect the devices."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"NCCL cannot connect the GPUs: {first_line(error)}; NCCL_DEBUG=INFO says more, and GPU_BP_NCCL=0 does "
            "without, through the host's memory"
        ) from None


def _dotted(version: int) -> str:
    """NCCL's number of a version, 22707, as it is written: 2.27.7."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
