"""Peers for tests/test_peers.py: this project's own step, changed. They are made in processes of their own."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np

from benchmarks.peers.cells import Cell
from benchmarks.peers.ours import Ours


class Same(Ours):
    """As ours."""


class Frozen(Ours):
    """It never learns."""

    def step(self) -> None:
        self.objective.forward(next(self.batches))


class Infinite(Ours):
    """Its losses are no numbers."""

    def read_loss(self) -> float:
        return float("nan")


class Faulty(Ours):
    """It cannot be made."""

    def __init__(self, cell: Cell, device: str) -> None:
        raise RuntimeError("planted\nsecond line")


class Killed(Ours):
    """Its process ends while it is timed."""

    def products(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Large(Ours):
    """It takes 64 MB more than ours, and gives them back."""

    def __init__(self, cell: Cell, device: str) -> None:
        super().__init__(cell, device)
        np.ones(2**23).sum()
