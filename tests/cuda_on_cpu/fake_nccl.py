"""A stand-in for the module `cupy.cuda.nccl`: its messages go from thread to thread, each with a device of its own.

A message is sent and waited for when its stream comes to it, not when it is asked for. One that nobody sends, or
another than the one that is waited for, hangs NCCL; here it is an error.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cuda_on_cpu.fake_cupy import FakeCupy

SECONDS = 60.0
UNIQUE_ID = bytes(range(128))


class NcclError(RuntimeError):
    """What NCCL refuses, or would wait for without end."""


class World:
    """What is under way between the ranks: messages by sender and receiver. `counts`: messages and bytes sent."""

    def __init__(self) -> None:
        self.messages: defaultdict[tuple[int, int], queue.SimpleQueue[bytes]] = defaultdict(queue.SimpleQueue)
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()


class FakeNccl:
    """The names of the module that are used, for the rank that has this stand-in for CuPy."""

    NCCL_FLOAT32, NCCL_FLOAT64 = 7, 8
    available = True

    def __init__(self, cupy: FakeCupy, world: World) -> None:
        self.cupy = cupy
        self.world = world
        self.rank = -1
        self.group: list[tuple[str, Any, int, int]] | None = None

    def get_version(self) -> int:
        return 22707

    def get_unique_id(self) -> bytes:
        return UNIQUE_ID

    def NcclCommunicator(self, size: int, number: bytes, rank: int) -> Communicator:
        assert type(number) is bytes
        assert number == UNIQUE_ID
        assert 0 <= rank < size
        return Communicator(self, rank, size)

    def groupStart(self) -> None:
        assert self.group is None
        self.group = []

    def groupEnd(self) -> None:
        """Gives the stream the messages of the group, which are under way at the same time."""
        group, self.group = self.group, None
        assert group
        (stream,) = {stream for _, _, _, stream in group}
        given = [(memory, peer) for kind, memory, peer, _ in group if kind == "send"]
        got = [(memory, peer) for kind, memory, peer, _ in group if kind == "recv"]
        if any(np.may_share_memory(one, other) for one, _ in given for other, _ in got):
            raise NcclError("what is sent is received into at the same time")
        rank, world = self.rank, self.world

        def run() -> None:
            for memory, peer in given:
                with world.lock:
                    world.counts.update(messages=1, bytes=memory.nbytes)
                    sent = world.messages[rank, peer]
                sent.put(memory.tobytes())
            for memory, peer in got:
                with world.lock:
                    coming = world.messages[peer, rank]
                try:
                    message = coming.get(timeout=SECONDS)
                except queue.Empty:
                    raise NcclError(f"rank {rank} waits for {peer}, which sends nothing") from None
                if len(message) != memory.nbytes:
                    raise NcclError(f"rank {rank} waits for {memory.nbytes} bytes, and {peer} sent {len(message)}")
                memory[...] = np.frombuffer(message, np.uint8)

        self.cupy.device.launch(run, self.cupy.stream_at(stream).queue)


class Communicator:
    def __init__(self, nccl: FakeNccl, rank: int, size: int) -> None:
        self._nccl = nccl
        self._size = size
        nccl.rank = rank
        nccl.cupy.device.uncapturable("allocations", "synchronisations")

    def send(self, address: int, count: int, kind: int, peer: int, stream: int) -> None:
        self._message("send", address, count, kind, peer, stream)

    def recv(self, address: int, count: int, kind: int, peer: int, stream: int) -> None:
        self._message("recv", address, count, kind, peer, stream)

    def _message(self, what: str, address: int, count: int, kind: int, peer: int, stream: int) -> None:
        nccl = self._nccl
        if nccl.group is None:
            raise NcclError("two that each send first, one message at a time, wait for each other")
        if not 0 <= peer < self._size or peer == nccl.rank:
            raise NcclError(f"no such peer: {peer}")
        memory = nccl.cupy.device.memory_at(address, count * (4 if kind == nccl.NCCL_FLOAT32 else 8))
        if memory is None:
            raise NcclError("a message of memory that is no array's")
        nccl.group.append((what, memory, peer, stream))
