"""This project's step, by its public classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from benchmarks.peers.cells import Cell, operands, parameters
from benchmarks.peers.sides import Side
from benchmarks.rounds import alternate
from gpu_bp import Batch, Network, Objective, Optimizer, Step, registry, select
from gpu_bp.backends import Backend
from gpu_bp.schedule import constant

UPDATES = {"sgd": "momentum", "adam": "adam"}
OUTPUTS = {"squared_error": "identity", "cross_entropy": "softmax"}


class Ours(Side):
    """A step as a training takes it, with the watch over what diverges."""

    def __init__(self, cell: Cell, device: str | Backend) -> None:
        super().__init__(cell, device if isinstance(device, str) else device.device)
        self.threads = max((pool["num_threads"] for pool in threadpool_info()), default=1)
        self.backend = backend = backend_for(device) if isinstance(device, str) else device
        activations = [cell.activation] * (cell.layers - 1) + [OUTPUTS[cell.loss]]
        self.network = Network([cell.width] * (cell.layers + 1), activations, backend=backend)
        self.objective = Objective(self.network, registry.loss(cell.loss), cell.batch)
        self.optimizer = Optimizer(registry.update(UPDATES[cell.optimizer]), self.network, constant(cell.rate))
        self.take = Step(self.objective, self.optimizer)
        rows = self.put(np.arange(cell.batch))
        self.batches = self.ready(lambda inputs, targets: Batch(self.put(inputs), self.put(targets), rows))
        self.begin()

    def put(self, host: np.ndarray) -> np.ndarray:
        """On the device; not copied where it is there."""
        return host if self.backend.name == "numpy" else self.backend.to_device(host)

    def begin(self) -> None:
        for layer, (weights, biases) in zip(self.network.layers, parameters(self.cell), strict=True):
            assert layer.biases is not None
            layer.weights[...], layer.biases[...] = self.put(weights), self.put(biases)
        for array in self.optimizer.state.values():
            array.fill(0)
        self.optimizer.steps = 0

    def step(self) -> None:
        self.take(next(self.batches))

    def wait(self) -> None:
        self.backend.synchronize()

    def read_loss(self) -> float:
        return self.objective.mean_loss()

    def products(self) -> Callable[[], None]:
        inputs, weights, deltas = ([self.put(x) for x in group] for group in operands(self.cell))
        outputs = [self.backend.zeros(x.shape, np.float32) for x in inputs]
        gradients = [self.backend.zeros(w.shape, np.float32) for w in weights]
        layers, matmul = range(self.cell.layers), self.backend.matmul

        def make() -> None:
            for k in layers:
                matmul(inputs[k], weights[k], outputs[k], transpose_b=True)
            for k in reversed(layers):
                matmul(deltas[k], inputs[k], gradients[k], transpose_a=True)
                if k:
                    matmul(deltas[k], weights[k], outputs[k - 1])

        return make

    def device_bytes(self) -> int | None:
        if self.backend.name == "numpy":
            return None
        import cupy

        return int(cupy.get_default_memory_pool().total_bytes())


def backend_for(device: str) -> Backend:
    return select("cupy" if device == "cuda" else "numpy")[0]


def machine(device: str) -> dict[str, Any]:
    """The device in words, its free memory, and how fast it copies memory and multiplies matrices, as measured."""
    backend = backend_for(device)
    free = backend.free_bytes()
    n, width = (2**28, 8192) if device == "cuda" else (2**25, 1024)
    source, target = (backend.zeros((n // 4,), np.float32) for _ in range(2))
    a, b, c = (backend.zeros((width, width), np.float32) for _ in range(3))

    def copy() -> None:
        target[...] = source

    copying, multiplying = alternate(backend, [copy, lambda: backend.matmul(a, b, c)], rounds=5, seconds=0.05)
    return {
        "device": backend.device,
        "free_bytes": free,
        "copy_bytes_per_second": 2 * n / copying,  # each byte is read and written
        "matrix_flops_per_second": 2 * width**3 / multiplying,
    }
