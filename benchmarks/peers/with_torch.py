"""PyTorch's step, in the ways in which it is written: eager, compiled, compiled as one function, as a CUDA graph.

Products are in float32 ("highest", PyTorch's default), as they are in all other libraries here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import torch
import torch._dynamo  # a training imports these later: what an import takes is no part of a step's memory
import torch._inductor.compile_fx
from torch.nn import functional

from benchmarks.peers.cells import BETAS, EPSILON, MOMENTUM, Cell, operands, parameters
from benchmarks.peers.sides import Side

torch.set_float32_matmul_precision("highest")
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "logistic": torch.sigmoid}
MODULES = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh, "logistic": torch.nn.Sigmoid}
MOMENTS = {"sgd": 1, "adam": 2}  # how many an optimizer keeps of each parameter
WARM_UP = 3  # steps before a graph is captured, as PyTorch's own recipe has it


class Torch(Side):
    """What PyTorch's variants share. `on` is a step on inputs and targets; `parameters` begin with weights, biases."""

    parameters: list[torch.Tensor]

    def __init__(self, cell: Cell, device: str) -> None:
        super().__init__(cell, device)
        self.threads = torch.get_num_threads()
        self.batches = self.ready(lambda inputs, targets: (self.put(inputs), self.put(targets)))
        self.total = torch.zeros((), device=device)

    def put(self, host: np.ndarray) -> torch.Tensor:
        """On the device; not copied where it is there."""
        return torch.from_numpy(host).to(self.device)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.cell.loss == "cross_entropy":
            return functional.cross_entropy(outputs, targets)
        return functional.mse_loss(outputs, targets, reduction="sum") * (0.5 / self.cell.batch)

    def on(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        raise NotImplementedError

    def state(self) -> list[torch.Tensor]:
        """What the optimizer keeps beside the parameters."""
        raise NotImplementedError

    def begin(self) -> None:
        with torch.no_grad():
            for k, pair in enumerate(parameters(self.cell)):
                for p, x in zip(self.parameters[2 * k :], pair, strict=False):
                    p.copy_(torch.from_numpy(x))
            for kept in self.state():
                kept.zero_()

    def step(self) -> None:
        self.on(*next(self.batches))

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def losses(self, steps: int) -> list[float]:
        self.total.zero_()
        return super().losses(steps)

    def read_loss(self) -> float:
        """A step's: `losses` reads each."""
        loss = float(self.total)
        self.total.zero_()
        return loss

    def products(self) -> Callable[[], None]:
        inputs, weights, deltas = ([self.put(x) for x in group] for group in operands(self.cell))
        outputs, gradients = [torch.empty_like(x) for x in inputs], [torch.empty_like(w) for w in weights]
        layers = range(self.cell.layers)
        transposed = [w.t() for w in weights], [delta.t() for delta in deltas]

        def make() -> None:
            for k in layers:
                torch.mm(inputs[k], transposed[0][k], out=outputs[k])
            for k in reversed(layers):
                torch.mm(transposed[1][k], inputs[k], out=gradients[k])
                if k:
                    torch.mm(deltas[k], weights[k], out=outputs[k - 1])

        return make

    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


class Eager(Torch):
    """Modules, autograd and a fused optimizer; with a `mode`, the forward pass and its gradient are compiled."""

    def __init__(self, cell: Cell, device: str, mode: str = "", capturable: bool = False) -> None:
        super().__init__(cell, device)
        layers: list[torch.nn.Module] = []
        for _ in range(cell.layers):
            layers += [torch.nn.Linear(cell.width, cell.width, device=device), MODULES[cell.activation]()]
        model = torch.nn.Sequential(*layers[:-1])
        self.parameters = list(model.parameters())
        if cell.optimizer == "sgd":
            self.optimizer: Any = torch.optim.SGD(self.parameters, cell.rate, MOMENTUM, fused=True)
        else:
            options = {"fused": True, "capturable": capturable}
            self.optimizer = torch.optim.Adam(self.parameters, cell.rate, BETAS, EPSILON, **options)

        def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.loss(model(inputs), targets)

        self.loss_of = torch.compile(loss_of, fullgraph=True, dynamic=False, mode=mode) if mode else loss_of
        self.begin()

    def on(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(inputs, targets)
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def state(self) -> list[torch.Tensor]:
        return [x for kept in self.optimizer.state.values() for x in kept.values() if isinstance(x, torch.Tensor)]


class Whole(Torch):
    """Loss, gradient and update as one compiled function, without autograd's tape: much less for the host to do."""

    def __init__(self, cell: Cell, device: str) -> None:
        super().__init__(cell, device)
        n = cell.width
        self.parameters = [torch.empty(shape, device=device) for _ in range(cell.layers) for shape in ((n, n), n)]
        self.moments = [[torch.zeros_like(p) for p in self.parameters] for _ in range(MOMENTS[cell.optimizer])]
        self.count = torch.zeros((), device=device)
        phi, last = ACTIVATIONS[cell.activation], cell.layers - 1

        def loss_of(parameters: list[torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            y = inputs
            for k in range(cell.layers):
                y = functional.linear(y, parameters[2 * k], parameters[2 * k + 1])
                y = phi(y) if k < last else y
            return self.loss(y, targets)

        gradient_and_loss = torch.func.grad_and_value(loss_of)
        update = _sgd if cell.optimizer == "sgd" else _adam

        def step(parameters: Any, moments: Any, count: Any, total: Any, inputs: Any, targets: Any) -> None:
            gradients, loss = gradient_and_loss(parameters, inputs, targets)
            total.add_(loss)
            update(cell.rate, parameters, gradients, count, *moments)

        self.compiled = torch.compile(step, fullgraph=True, dynamic=False)
        self.begin()

    def on(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.compiled(self.parameters, self.moments, self.count, self.total, inputs, targets)

    def state(self) -> list[torch.Tensor]:
        return [self.count, *(x for kind in self.moments for x in kind)]


def _sgd(rate: float, parameters: Any, gradients: Any, count: Any, changes: Any) -> None:
    for p, g, change in zip(parameters, gradients, changes, strict=True):
        change.mul_(MOMENTUM).add_(g)
        p.sub_(change, alpha=rate)


def _adam(rate: float, parameters: Any, gradients: Any, count: Any, means: Any, squares: Any) -> None:
    count.add_(1)
    corrected, root = rate / (1 - BETAS[0] ** count), torch.sqrt(1 - BETAS[1] ** count)
    for p, g, mean, square in zip(parameters, gradients, means, squares, strict=True):
        mean.lerp_(g, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        p.sub_(corrected * mean / (square.sqrt() / root + EPSILON))


class Captured(Torch):
    """A whole step of another variant as a CUDA graph, one for each batch that lies ready: nothing is copied."""

    def __init__(self, cell: Cell, device: str, of: str) -> None:
        Side.__init__(self, cell, device)  # the batches are the other variant's
        inner: Eager | Whole = Whole(cell, device) if of == "Whole" else Eager(cell, device, capturable=True)
        ready = [next(inner.batches) for _ in range(cell.n_batches)]
        self.threads, self.total = inner.threads, inner.total
        begin = time.perf_counter()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for k in range(WARM_UP):
                inner.on(*ready[k % len(ready)])
        torch.cuda.current_stream().wait_stream(stream)
        graphs, pool = [], None
        for batch in ready:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                inner.on(*batch)
            pool = graph.pool()
            graphs.append(graph)
        torch.cuda.synchronize()
        self.compile_seconds = time.perf_counter() - begin
        self.inner, self.graphs = inner, cycle(graphs)
        self.begin()

    def begin(self) -> None:
        self.inner.begin()

    def step(self) -> None:
        next(self.graphs).replay()
