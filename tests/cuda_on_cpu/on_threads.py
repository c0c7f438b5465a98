"""Ranks that are threads, each with a stand-in device of its own: `Ranks` without MPI."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, Self, TypeVar

import numpy as np

from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.fake_cupy import FakeCupy
from cuda_on_cpu.fake_nccl import FakeNccl, World

T = TypeVar("T")

SECONDS = 60.0


class ThreadRanks:
    """The ranks of a job as one of its threads sees them; `told` and `barrier` are those of all."""

    def __init__(self, rank: int, size: int, told: list[Any], barrier: threading.Barrier) -> None:
        self.rank = self.local_rank = rank
        self.size = self.local_size = size
        self._told = told
        self._barrier = barrier
        self.on_devices = False

    def all_gather(self, value: T) -> list[T]:
        self._told[self.rank] = value
        self._barrier.wait()
        values = list(self._told)
        self._barrier.wait()
        return values

    def broadcast(self, value: T) -> T:
        return self.all_gather(value)[0]

    def sum_tree(self, flat: np.ndarray) -> None:
        terms = self.all_gather(flat.copy())
        while len(terms) > 1:
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
        flat[...] = terms[0]

    def wait_on_devices(self) -> None:
        self.on_devices = True

    def abort(self, line: str, status: int) -> NoReturn:
        raise AssertionError(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Job:
    """So many ranks, each with a stand-in for CuPy, and for NCCL if that is there.

    Args:
        shared: the ranks have one GPU, as they see it. without: ranks on which NCCL is not installed.
        options: of the stand-ins.
    """

    def __init__(self, size: int, *, shared: bool = False, without: tuple[int, ...] = (), **options: Any) -> None:
        self.world = World()
        self.cupys = [FakeCupy(uuid="GPU-0" if shared else f"GPU-{rank}", **options) for rank in range(size)]
        self.modules = []
        for rank, cupy in enumerate(self.cupys):
            nccl = FakeNccl(cupy, self.world)
            nccl.available = rank not in without
            self.modules.append(cupy_backend_module(cupy, nccl=lambda nccl=nccl: nccl))  # type: ignore[misc]
        barrier = threading.Barrier(size, timeout=SECONDS)
        told: list[Any] = [None] * size
        self.ranks = [ThreadRanks(rank, size, told, barrier) for rank in range(size)]
        self._barrier = barrier

    def run(self, act: Callable[[Any, ThreadRanks], T]) -> list[T]:
        """What each rank comes to, with a backend of its own; the error of the first one that has another than that
        the others are gone."""

        def one(module: Any, ranks: ThreadRanks) -> T:
            try:
                return act(module.CupyBackend(), ranks)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.ranks)) as pool:
            futures = [pool.submit(one, *each) for each in zip(self.modules, self.ranks, strict=True)]
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]
