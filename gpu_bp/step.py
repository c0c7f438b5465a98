"""One training step on arrays that are made once: forward, output delta, backward, update.

`Objective` is the loss of a network over a batch and its gradient; `Step` adds the update.
"""

from __future__ import annotations

import numpy as np

from gpu_bp.data.source import Batch
from gpu_bp.network import Network, Signals
from gpu_bp.optimizer import Optimizer
from gpu_bp.spec import Array, Loss


class Objective:
    """A loss of a network, over batches of up to `batch_size` rows, and its gradient.

    With `backward=False` it is evaluated only, and has no gradients. With `keep_net_inputs` every layer's net
    input stands in an array of its own, for whoever wants to look at it.

    Attributes:
        gradients: the flat buffer of the gradient of the last batch's summed loss.
        total: (1,) float64 on the device, the loss summed over the batches since `mean_loss` was read.
        rows: how many rows those batches had.
        signals: the arrays of each layer, as the last batch left them.
    """

    def __init__(
        self, network: Network, loss: Loss, batch_size: int, *, backward: bool = True, keep_net_inputs: bool = False
    ) -> None:
        self.network = network
        self.loss = loss
        self.gradients = network.backend.zeros((network.layout.size if backward else 0,), network.dtype)
        self._gradient_layers = network.views(self.gradients) if backward else []
        self.signals = network.signals(batch_size, loss, backward=backward, keep_net_inputs=keep_net_inputs)
        self._losses = network.backend.zeros((batch_size, loss.losses_width(network.widths[-1])), network.dtype)
        self._parts: dict[int, tuple[list[Signals], Array]] = {batch_size: (self.signals, self._losses)}
        self._checked: set[tuple[object, ...]] = set()
        self.total = network.backend.zeros((1,), np.float64)
        self.rows = 0

    def forward(self, batch: Batch) -> Array:
        """The outputs for a batch; adds its loss to `total` and leaves the output layer's delta."""
        signature = (batch.inputs.shape, batch.targets.shape, batch.inputs.dtype, batch.targets.dtype)
        if signature not in self._checked:
            self._check(batch)
            self._checked.add(signature)
        signals, losses = self._part(batch.n)
        last, phi = signals[-1], self.network.layers[-1].activation
        backend = self.network.backend
        self.network.forward(batch.inputs, signals, self.loss)
        backend.output_delta(self.loss, phi, last.net_input, batch.targets, last.output, losses, last.delta)
        backend.accumulate(losses, self.total)
        self.rows += batch.n
        return last.output

    def backward(self, batch: Batch) -> None:
        """The gradient of the batch's summed loss, into `gradients`; after `forward` of the same batch."""
        self.network.backward(batch.inputs, self._part(batch.n)[0], self._gradient_layers)

    def mean_loss(self, *, reset: bool = True) -> float:
        """The mean loss a row since this was last read, or only looked at (`reset=False`). Waits for the device."""
        mean = float(self.network.backend.to_host(self.total)[0]) / self.rows if self.rows else float("nan")
        if reset:
            self.total.fill(0)
            self.rows = 0
        return mean

    def _check(self, batch: Batch) -> None:
        """Raises ValueError where a batch does not fit: a kernel would broadcast it, or read beyond its end."""
        widths, dtype = self.network.widths, self.network.dtype
        inputs, targets = batch.inputs, batch.targets
        if inputs.shape != (batch.n, widths[0]) or inputs.dtype != dtype:
            raise ValueError(f"inputs must be (rows, {widths[0]}) {dtype}, not {inputs.shape} {inputs.dtype}")
        if batch.n > len(self._losses):
            raise ValueError(f"a batch of {batch.n} rows; the arrays were made for {len(self._losses)}")
        classes = self.loss.targets == "classes" and targets.shape == (batch.n,) and targets.dtype == np.int64
        if not classes and (targets.shape != (batch.n, widths[-1]) or targets.dtype != dtype):
            wanted = f"(rows, {widths[-1]}) {dtype}" + (", or (rows,) int64" if self.loss.targets == "classes" else "")
            raise ValueError(f"targets must be {wanted}, not {targets.shape} {targets.dtype}")

    def _part(self, n: int) -> tuple[list[Signals], Array]:
        """The arrays for n rows: views of the full ones, kept, for the shorter last batch of an epoch."""
        if n not in self._parts:
            self._parts[n] = ([signal.rows(n) for signal in self.signals], self._losses[:n])
        return self._parts[n]


class Step:
    """A training step: the objective's gradient, then the optimizer's update by its mean over the rows."""

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self.objective = objective
        self.optimizer = optimizer

    def __call__(self, batch: Batch) -> None:
        self.objective.forward(batch)
        self.objective.backward(batch)
        self.optimizer.step(self.objective.gradients, 1 / batch.n)  # 1 / total weight: each row weighs 1
