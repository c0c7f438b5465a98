"""Who is measured: this project, and its peers.

A `Side` is one library's training of one cell. It is made in a process of its own (see `process.py`), and the modules
that make them are imported there alone.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.peers.cells import Cell, batches


class Side(ABC):
    """A library's training of a cell, on the device "cpu" or "cuda".

    Attributes:
        steps_a_call: how many steps `step` takes.
        threads: how many the library may use.
        compile_seconds: what was compiled, or captured, before the first step.
    """

    steps_a_call = 1
    compile_seconds = 0.0

    def __init__(self, cell: Cell, device: str) -> None:
        self.cell = cell
        self.device = device
        self.threads = cores()

    def ready(self, put: Callable[[np.ndarray, np.ndarray], Any]) -> Any:
        """The batches of the cell, as `put` makes them of inputs and targets; for ever, in turn."""
        return itertools.cycle([put(*batch) for batch in batches(self.cell)])

    @abstractmethod
    def begin(self) -> None:
        """With the initial parameters again, and an optimizer that has taken no step."""

    @abstractmethod
    def step(self) -> None:
        """A step with the next batch; its loss is added to a sum, and the host does not wait for it."""

    @abstractmethod
    def read_loss(self) -> float:
        """The mean loss a row since this was last read; a row's squared error is halved and summed over outputs."""

    @abstractmethod
    def products(self) -> Callable[[], None]:
        """What makes the matrix products of a step, of operands and into arrays that lie ready."""

    @abstractmethod
    def wait(self) -> None:
        """Until all that was asked for is done."""

    def losses(self, steps: int) -> list[float]:
        """Of the next steps, each read."""
        found = []
        for _ in range(steps):
            self.step()
            found.append(self.read_loss())
        return found

    def device_bytes(self) -> int | None:
        """The most memory of a GPU that the library's arrays took; None where the device is the host."""
        return None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Peer:
    """How to make a side: the class `make` of a module, with these options, where the `package` is installed.

    `column` of the table; `products`: whether it is asked for the products of its library, of which it is the first;
    `on_request`: devices on which it is measured only where it is asked for.
    """

    name: str
    column: str
    package: str
    module: str
    make: str
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    products: bool = False
    on_request: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


def _torch(name: str, column: str, make: str, devices: tuple[str, ...] = ("cuda",), **options: Any) -> Peer:
    return Peer(
        f"torch {name}", column, "torch", "benchmarks.peers.with_torch", make, options, devices, name == "eager"
    )


OURS = Peer("ours", "ours", "gpu_bp", "benchmarks.peers.ours", "Ours", products=True)
EAGER, COMPILED, FUNCTION = "PyTorch eager", "PyTorch compiled", "PyTorch as one function"
GRAPH = "PyTorch CUDA graph"
SKLEARN, JAX = "scikit-learn", "JAX"
BOTH = ("cpu", "cuda")
PEERS = (
    _torch("eager", EAGER, "Eager", BOTH),
    _torch("compile", COMPILED, "Eager", BOTH, mode="default"),
    _torch("compile reduce-overhead", COMPILED, "Eager", mode="reduce-overhead"),
    _torch("compile max-autotune", COMPILED, "Eager", mode="max-autotune"),
    _torch("CUDA graph", GRAPH, "Captured", of="Eager"),
    _torch("CUDA graph of the compiled step", GRAPH, "Captured", of="Whole"),
    # No modules, autograd or optimizer of PyTorch's: a training written as one function, which is then compiled. On a
    # GPU it is one more of the ways in which a step is made fast.
    Peer("one function by torch", FUNCTION, "torch", "benchmarks.peers.with_torch", "Whole", on_request=("cpu",)),
    Peer("scikit-learn", SKLEARN, "sklearn", "benchmarks.peers.with_sklearn", "Perceptron", {}, ("cpu",)),
    Peer("jax jit", JAX, "jax", "benchmarks.peers.with_jax", "Jit", products=True),
    Peer("jax scan", JAX, "jax", "benchmarks.peers.with_jax", "Scan", devices=("cuda",)),
)
COLUMN = {peer.name: peer.column for peer in PEERS}
