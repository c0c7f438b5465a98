"""One training step on arrays that are made once: forward, output delta, backward, update.

`Objective` is the loss of a network over a batch and its gradient; `Step` adds the update. A step's rows may come as
several batches, whose gradients are summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_bp.data.source import Batch
from gpu_bp.errors import UserError
from gpu_bp.network import Layer, Network, Signals
from gpu_bp.noise import Draw, Noise
from gpu_bp.optimizer import Optimizer
from gpu_bp.spec import Array, Loss


class Objective:
    """A loss of a network, over batches of up to `batch_size` rows, and its gradient.

    Args:
        backward: False evaluates only; there are no gradients then.
        keep_net_inputs: every layer's net input stands in an array of its own, for whoever wants to look at it.
        noise: dropout and input noise.
        class_weights: (n_classes,) what a row of each class weighs, beside its own weight.

    Raises:
        UserError: another number of dropout rates than there are hidden layers.

    Attributes:
        gradients: the flat buffer of the gradient of the last step's summed loss.
        total: (1,) float64 on the device, the weighted loss summed over the batches since `mean_loss` was read.
        rows: how many rows without weights those batches had. weight: (1,) float64, what the others weighed.
        weighed: whether these rows weighed anything when `mean_loss` was last read: else the mean is NaN.
        signals: the arrays of each layer, as the last batch left them.
        losses: (batch_size, n) likewise its loss values, weighed; n is 1, or as many as there are targets.
        last_weights: (rows,) what the rows of the last batch weighed, None where each weighed 1.
    """

    def __init__(
        self,
        network: Network,
        loss: Loss,
        batch_size: int,
        *,
        backward: bool = True,
        keep_net_inputs: bool = False,
        noise: Noise | None = None,
        class_weights: np.ndarray | None = None,
    ) -> None:
        backend, hidden = network.backend, len(network.layers) - 1
        if noise is not None and len(noise.dropout) not in (0, hidden):
            raise UserError(f"{len(noise.dropout)} dropout rates for {hidden} hidden layers; give one a hidden layer")
        self.network = network
        self.loss = loss
        self.noise = noise
        self.gradients = backend.zeros((network.layout.size if backward else 0,), network.dtype)
        self._gradient_layers = network.views(self.gradients) if backward else []
        self._added: tuple[Array, list[Layer]] | None = None  # of a later batch of a step, made when there is one
        self.signals = network.signals(
            batch_size, loss, backward=backward, keep_net_inputs=keep_net_inputs, noise=noise
        )
        self.losses = backend.zeros((batch_size, loss.losses_width(network.widths[-1])), network.dtype)
        noisy = noise is not None and noise.on_inputs
        self._inputs = backend.zeros((batch_size if noisy else 0, network.widths[0]), network.dtype)
        self._class_weights = None if class_weights is None else backend.to_device(class_weights.astype(network.dtype))
        self._weights = backend.zeros((0 if class_weights is None else batch_size,), network.dtype)
        self._parts: dict[int, tuple[list[Signals], Array]] = {batch_size: (self.signals, self.losses)}
        self._checked: set[tuple[object, ...]] = set()
        self.total = backend.zeros((1,), np.float64)
        self.weight = backend.zeros((1,), np.float64)
        self._weighted = False
        self.weighed = True
        self.rows = 0
        self.last_weights: Array | None = None

    def forward(self, batch: Batch, step: int = 0) -> Array:
        """The outputs for a batch; adds its loss to `total` and leaves the output layer's delta.

        `step` is the number for which noise is drawn.
        """
        weights = batch.weights
        signature = (
            batch.inputs.shape,
            batch.targets.shape,
            batch.inputs.dtype,
            batch.targets.dtype,
            None if weights is None else (weights.shape, weights.dtype),
        )
        if signature not in self._checked:
            self._check(batch)
            self._checked.add(signature)
        signals, losses = self._part(batch.n)
        last, phi = signals[-1], self.network.layers[-1].activation
        backend = self.network.backend
        draw = self._draw(batch, step)
        inputs = batch.inputs
        if draw is not None and draw.noise.on_inputs:
            inputs = self._inputs[: batch.n]
            draw.inputs(backend, batch.inputs, inputs)
        self.network.forward(inputs, signals, self.loss, draw)
        backend.output_delta(self.loss, phi, last.net_input, batch.targets, last.output, losses, last.delta)
        self.last_weights = weights = self._weights_of(batch)
        if weights is None:
            self.rows += batch.n
        else:
            backend.weigh(weights, losses, last.delta)
            backend.accumulate(weights, self.weight)
            self._weighted = True
        backend.accumulate(losses, self.total)
        return last.output

    def backward(self, batch: Batch, step: int = 0) -> None:
        """The gradient of the batch's summed loss, into `gradients`; after `forward` of the same batch and step.

        That of a batch which is not the first of its step is added to what is there.
        """
        draw = self._draw(batch, step)
        inputs = self._inputs[: batch.n] if draw is not None and draw.noise.on_inputs else batch.inputs
        signals = self._part(batch.n)[0]
        if batch.place == 0:
            self.network.backward(inputs, signals, self._gradient_layers, draw)
            return
        if self._added is None:
            flat = self.network.backend.zeros(self.gradients.shape, self.network.dtype)
            self._added = flat, self.network.views(flat)
        added, layers = self._added
        self.network.backward(inputs, signals, layers, draw)
        self.network.backend.add(self.gradients, added, self.gradients)

    def _weights_of(self, batch: Batch) -> Array | None:
        """What each row weighs: (rows,), or None where each weighs 1."""
        if self._class_weights is None:
            return batch.weights
        weights = self._weights[: batch.n]
        self.network.backend.class_weights(batch.targets, self._class_weights, batch.weights, weights)
        return weights

    def mean_loss(self, *, reset: bool = True) -> float:
        """The mean loss a row since this was last read, or only looked at (`reset=False`). Waits for the device."""
        to_host = self.network.backend.to_host
        weight = self.rows + (float(to_host(self.weight)[0]) if self._weighted else 0.0)
        mean = float(to_host(self.total)[0]) / weight if weight else float("nan")
        self.weighed = weight > 0
        if reset:
            self.forget_loss()
        return mean

    def state(self) -> dict[str, Any]:
        """What `mean_loss` is computed from, fit for JSON. Waits for the device."""
        to_host = self.network.backend.to_host
        total, weight = (float(to_host(array)[0]) for array in (self.total, self.weight))
        return {"total": total, "weight": weight, "rows": self.rows, "weighted": self._weighted}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on as the objective did that gave this state."""
        self.total.fill(state["total"])
        self.weight.fill(state["weight"])
        self.rows, self._weighted = state["rows"], state["weighted"]

    def forget_loss(self) -> None:
        """The sums of `mean_loss` begin anew."""
        self.total.fill(0)
        self.rows = 0
        if self._weighted:
            self.weight.fill(0)
            self._weighted = False

    def _draw(self, batch: Batch, step: int) -> Draw | None:
        return None if self.noise is None else Draw(self.noise, step, batch.place)

    def _check(self, batch: Batch) -> None:
        """Raises ValueError where a batch does not fit: a kernel would broadcast it, or read beyond its end."""
        widths, dtype, groups = self.network.widths, self.network.dtype, self.loss.groups
        inputs, targets, n_targets = batch.inputs, batch.targets, widths[-1] // groups
        if widths[-1] != groups * n_targets:
            raise ValueError(f"{self.loss.name} has {groups} outputs a target, the network has {widths[-1]} in all")
        if inputs.shape != (batch.n, widths[0]) or inputs.dtype != dtype:
            raise ValueError(f"inputs must be (rows, {widths[0]}) {dtype}, not {inputs.shape} {inputs.dtype}")
        if batch.weights is not None and (batch.weights.shape != (batch.n,) or batch.weights.dtype != dtype):
            raise ValueError(f"weights must be (rows,) {dtype}, not {batch.weights.shape} {batch.weights.dtype}")
        if batch.n > len(self.losses):
            raise ValueError(f"a batch of {batch.n} rows; the arrays were made for {len(self.losses)}")
        classes = self.loss.targets == "classes" and targets.shape == (batch.n,) and targets.dtype == np.int64
        if not classes and (targets.shape != (batch.n, n_targets) or targets.dtype != dtype):
            wanted = f"(rows, {n_targets}) {dtype}" + (", or (rows,) int64" if self.loss.targets == "classes" else "")
            raise ValueError(f"targets must be {wanted}, not {targets.shape} {targets.dtype}")

    def _part(self, n: int) -> tuple[list[Signals], Array]:
        """The arrays for n rows: views of the full ones, kept, for the shorter last batch of an epoch."""
        if n not in self._parts:
            self._parts[n] = ([signal.rows(n) for signal in self.signals], self.losses[:n])
        return self._parts[n]


class Step:
    """A training step: the objective's gradient, then the optimizer's update by its mean over the rows.

    A step whose gradient is not finite, or after which the objective's total loss is not, changes neither parameters
    nor the optimizer's state nor the average, and no later step does: what was before it is there to be looked at.
    The host does not wait for the device to know; it asks now and then whether the training has `diverged`.

    Args:
        clip_norm: the mean gradient is shrunk to this length where it is longer (Pascanu et al., 2013); 0: never.
        max_norm: likewise the weights of each hidden unit after the update; 0: never.
        average: a moving average of the parameters that each step brings up to date.
        watch: False leaves out the look at what is finite.

    Attributes:
        flag: (1,) int64 on the device, -1 until a step goes wrong, then its number, the first step being 1; None
            without `watch`.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        *,
        clip_norm: float = 0.0,
        max_norm: float = 0.0,
        average: Average | None = None,
        watch: bool = True,
    ) -> None:
        backend = objective.network.backend
        self.objective = objective
        self.optimizer = optimizer
        self.average = average
        self._clip_norm = clip_norm
        self._max_norm = max_norm
        self._rows = 0  # of the step so far
        self._weight = backend.zeros((1,), np.float64)
        self._squares = backend.zeros((1,), np.float64)
        self._factor = backend.zeros((1,), objective.network.dtype)
        self.flag: Array | None = backend.to_device(np.full(1, -1)) if watch else None

    def __call__(self, batch: Batch) -> None:
        objective, backend, step = self.objective, self.objective.network.backend, self.optimizer.steps
        objective.forward(batch, step)
        objective.backward(batch, step)
        if batch.place == 0:
            self._rows = 0
        self._rows += batch.n
        weights = objective.last_weights
        if weights is not None:
            if batch.place == 0:
                self._weight.fill(0)
            backend.accumulate(weights, self._weight)
        if batch.last:
            self._update(weighted=weights is not None)

    def _update(self, weighted: bool) -> None:
        network, backend, gradients = self.objective.network, self.objective.network.backend, self.objective.gradients
        scale, factor = (1.0 if weighted else 1 / self._rows), None  # 1 / total weight
        if weighted or self._clip_norm:
            squares, factor = None, self._factor
            if self._clip_norm:
                squares = self._squares
                squares.fill(0)
                backend.accumulate(gradients, squares, squares=True)
            backend.step_factor(scale, self._weight if weighted else None, squares, self._clip_norm, factor)
        flag = self.flag
        if flag is not None:
            backend.watch(gradients, self.objective.total, self.optimizer.steps + 1, flag)
        self.optimizer.step(gradients, scale, factor, flag)
        if self._max_norm:
            for layer in network.layers[:-1]:
                backend.limit_norms(layer.weights, self._max_norm, flag)
        if self.average is not None:
            self.average.add(network.parameters, flag)

    def diverged(self) -> int | None:
        """The number of the first step that went wrong, as metrics count them: the first step is 1; None: all is well.

        Waits for the device. To know why, see `gpu_bp.divergence.diagnose`.
        """
        if self.flag is None:
            return None
        step = int(self.objective.network.backend.to_host(self.flag)[0])
        return step if step >= 0 else None

    def reset_flag(self) -> None:
        """Steps change parameters again, for whoever has set all back; the loss so far is forgotten."""
        self.objective.forget_loss()
        if self.flag is not None:
            self.flag.fill(-1)


class Average:
    """An exponential moving average of a network's parameters: average += (1 - decay) (parameters - average).

    It begins with the parameters after the first step (Polyak and Juditsky, 1992, with weights that decay).

    Attributes:
        network: the network with the averaged parameters.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.network = network.over(network.backend.zeros(network.parameters.shape, network.dtype))
        self._rest = 1 - decay
        self.begun = False  # whether there is a mean yet

    def add(self, parameters: Array, flag: Array | None = None) -> None:
        """Brings the average up to date after a step; not where the `flag` of `Backend.watch` is set."""
        self.network.backend.average(parameters, self.network.parameters, self._rest if self.begun else 1.0, flag)
        self.begun = True
