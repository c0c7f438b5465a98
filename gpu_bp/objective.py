"""The loss of a network over a batch, and its gradient: forward, output delta, backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from gpu_bp.data.source import Batch
from gpu_bp.errors import UserError
from gpu_bp.network import Layer, Network, Signals
from gpu_bp.noise import Draw, Noise
from gpu_bp.spec import Array, Loss


class Objective:
    """A loss of a network, over batches of up to `batch_size` rows, and its gradient.

    Where a `Step` cuts batches into parts, `signals`, `losses` and `last_weights` are theirs, and nothing is set here.

    Args:
        backward: False evaluates only; there are no gradients then.
        keep_net_inputs: every layer's net input stands in an array of its own, for whoever wants to look at it.
        noise: dropout and input noise. class_weights: (n_classes,) what a row of each class weighs, beside its own.

    Raises:
        UserError: another number of dropout rates than there are hidden layers.

    Attributes:
        gradients: the flat buffer of the gradient of the last step's summed loss.
        total: (1,) float64 on the device, the weighted loss summed over the batches since `mean_loss` was read.
        rows: how many rows without weights those batches had. weight: (1,) float64, what the others weighed.
        weighed: whether these rows weighed anything when `mean_loss` was last read: else the mean is NaN.
        last_weights: (rows,) what the rows of the last batch weighed, None where each weighed 1.
        loss_scale: (1,) on the device, by which the output layer's delta, and so the gradient, is multiplied; or None.
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
        self.batch_size = batch_size
        if noise is not None and len(noise.dropout) not in (0, hidden):
            raise UserError(f"{len(noise.dropout)} dropout rates for {hidden} hidden layers; give one a hidden layer")
        self.network = network
        self.loss = loss
        self.noise = noise
        self.gradients = backend.zeros((network.layout.size if backward else 0,), network.dtype)
        self._gradient_layers = network.views(self.gradients) if backward else []
        self._added: tuple[Array, list[Layer]] | None = None  # of a later batch of a step, made when there is one
        self._keep_net_inputs = keep_net_inputs
        self._table = class_weights
        self._class_weights = None if class_weights is None else backend.to_device(class_weights.astype(network.dtype))
        self._parts: dict[int, tuple[list[Signals], Array]] = {}
        self._checked: set[tuple[object, ...]] = set()
        self.total = backend.zeros((1,), np.float64)
        self.weight = backend.zeros((1,), np.float64)
        self._weighted = False
        self.weighed = True
        self.rows = 0
        self.last_weights: Array | None = None
        self.loss_scale: Array | None = None

    # Arrays of a batch are made when they are first needed: a step has smaller ones of its own where that is faster.

    def prepare(self) -> None:
        """Makes the arrays of a whole batch now."""
        self._part(self.batch_size)
        if self.noise is not None and self.noise.on_inputs:
            _ = self._noisy_inputs
        if self._class_weights is not None:
            _ = self._weights

    @cached_property
    def signals(self) -> list[Signals]:
        """The arrays of each layer, as the last batch left them."""
        return self.network.signals(
            self.batch_size,
            self.loss,
            backward=len(self.gradients) > 0,
            keep_net_inputs=self._keep_net_inputs,
            noise=self.noise,
        )

    @cached_property
    def losses(self) -> Array:
        """(batch_size, n) likewise its loss values, weighed; n is 1, or as many as there are targets."""
        network = self.network
        return network.backend.zeros((self.batch_size, self.loss.losses_width(network.widths[-1])), network.dtype)

    @cached_property
    def _noisy_inputs(self) -> Array:
        return self.network.backend.zeros((self.batch_size, self.network.widths[0]), self.network.dtype)

    @cached_property
    def _weights(self) -> Array:
        return self.network.backend.zeros((self.batch_size,), self.network.dtype)

    @cached_property
    def _steps(self) -> Array:
        """(1,) int64, the number for which `forward` draws noise."""
        return self.network.backend.zeros((1,), np.int64)

    def like(self, batch_size: int) -> Objective:
        """The same objective for smaller batches, with sums and gradients of its own."""
        other = Objective(self.network, self.loss, batch_size, noise=self.noise, class_weights=self._table)
        other.loss_scale = self.loss_scale
        return other

    def in_parts(self, batch_size: int) -> Objective:
        """The same objective for smaller batches, whose sums and gradients are this one's."""
        other = copy.copy(self)
        for name in ("signals", "losses", "_noisy_inputs", "_weights"):
            vars(other).pop(name, None)
        other.batch_size, other._parts, other._checked, other._added = batch_size, {}, set(), None
        return other

    def beside(self, gradients: Array | None = None) -> Objective:
        """The same objective in the same arrays of rows; its sums are its own, and the gradient, if none is given."""
        self.prepare()
        other, network = copy.copy(self), self.network
        zeros = network.backend.zeros
        other.gradients = zeros(self.gradients.shape, network.dtype) if gradients is None else gradients
        other._gradient_layers = network.views(other.gradients)
        other.total, other.weight, other._added = zeros((1,), np.float64), zeros((1,), np.float64), None
        return other

    def forward(self, batch: Batch, step: int = 0) -> Array:
        """The outputs for a batch; adds its loss to `total` and leaves the output layer's delta.

        `step` is the number for which noise is drawn.
        """
        self.check(batch)
        if self.noise is not None:
            self.network.backend.fill(self._steps, step)
        outputs = self.forward_at(batch, self._steps)
        self.count(batch)
        return outputs

    def backward(self, batch: Batch, step: int = 0) -> None:
        """The gradient of the batch's summed loss, into `gradients`; after `forward` of the same batch and step.

        That of a batch which is not the first of its step is added to what is there.
        """
        self.backward_at(batch, self._steps, add=batch.place > 0)

    # What a step asks of the backend, and may have it record: nothing here counts on the host.

    def forward_at(self, batch: Batch, steps: Array) -> Array:
        """As `forward`; noise is drawn for the number in `steps`, (1,) int64 on the device."""
        signals, losses = self._part(batch.n)
        last, phi = signals[-1], self.network.layers[-1].activation
        backend = self.network.backend
        draw = self._draw(batch, steps)
        inputs = batch.inputs
        if draw is not None and draw.noise.on_inputs:
            inputs = self._noisy_inputs[: batch.n]
            draw.inputs(backend, batch.inputs, inputs)
        self.network.forward(inputs, signals, self.loss, draw)
        backend.output_delta(self.loss, phi, last.net_input, batch.targets, last.output, losses, last.delta)
        self.last_weights = weights = self._weights_of(batch)
        if weights is not None:
            backend.weigh(weights, losses, last.delta)
            backend.accumulate(weights, self.weight)
        backend.accumulate(losses, self.total)
        if self.loss_scale is not None:
            backend.multiply(last.delta, self.loss_scale)
        return last.output

    def backward_at(
        self, batch: Batch, steps: Array, *, add: bool, done: Callable[[int], None] = lambda layer: None
    ) -> None:
        """As `backward`; the gradient is added to what is there, or takes its place; then each layer is `done`."""
        draw = self._draw(batch, steps)
        inputs = self._noisy_inputs[: batch.n] if draw is not None and draw.noise.on_inputs else batch.inputs
        signals = self._part(batch.n)[0]
        if not add:
            self.network.backward(inputs, signals, self._gradient_layers, draw, done)
            return
        if self._added is None:
            flat = self.network.backend.zeros(self.gradients.shape, self.network.dtype)
            self._added = flat, self.network.views(flat)
        added, layers = self._added
        self.network.backward(inputs, signals, layers, draw)
        self.network.backend.add(self.gradients, added, self.gradients)

    def count(self, batch: Batch, rows: int | None = None) -> None:
        """Takes note of the rows of a batch whose loss is in `total`, or of so many that are like them."""
        if self.weighs(batch):
            self._weighted = True
        else:
            self.rows += batch.n if rows is None else rows

    def weighs(self, batch: Batch) -> bool:
        """Whether the rows of a batch have weights, of their own or of their classes."""
        return batch.weights is not None or self._class_weights is not None

    def _weights_of(self, batch: Batch) -> Array | None:
        """What each row weighs: (rows,), or None where each weighs 1."""
        if self._class_weights is None:
            return batch.weights
        weights = self._weights[: batch.n]
        self.network.backend.class_weights(batch.targets, self._class_weights, batch.weights, weights)
        return weights

    def mean_loss(self, *, reset: bool = True) -> float:
        """The mean loss a row since this was last read, or only looked at (`reset=False`). Waits for the device."""
        total, weight = self.sums()
        mean = total / weight if weight else float("nan")
        self.weighed = weight > 0
        if reset:
            self.forget_loss()
        return mean

    def sums(self) -> tuple[float, float]:
        """The loss of the rows since `mean_loss` was read, and what they weighed. Waits for the device."""
        to_host = self.network.backend.to_host
        weight = self.rows + (float(to_host(self.weight)[0]) if self._weighted else 0.0)
        return float(to_host(self.total)[0]), weight

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

    def _draw(self, batch: Batch, steps: Array) -> Draw | None:
        return None if self.noise is None else Draw(self.noise, steps, batch.place)

    def check(self, batch: Batch) -> None:
        """Raises ValueError where a batch does not fit: a kernel would broadcast it, or read beyond its end."""
        inputs, targets, weights = batch.inputs, batch.targets, batch.weights
        signature = (
            inputs.shape,
            targets.shape,
            inputs.dtype,
            targets.dtype,
            None if weights is None else (weights.shape, weights.dtype),
        )
        if signature in self._checked:
            return
        widths, dtype, groups = self.network.widths, self.network.dtype, self.loss.groups
        n_targets = widths[-1] // groups
        if widths[-1] != groups * n_targets:
            raise ValueError(f"{self.loss.name} has {groups} outputs a target, the network has {widths[-1]} in all")
        if inputs.shape != (batch.n, widths[0]) or inputs.dtype != dtype:
            raise ValueError(f"inputs must be (rows, {widths[0]}) {dtype}, not {inputs.shape} {inputs.dtype}")
        if weights is not None and (weights.shape != (batch.n,) or weights.dtype != dtype):
            raise ValueError(f"weights must be (rows,) {dtype}, not {weights.shape} {weights.dtype}")
        if batch.n > self.batch_size:
            raise ValueError(f"a batch of {batch.n} rows; the arrays were made for {self.batch_size}")
        classes = self.loss.targets == "classes" and targets.shape == (batch.n,) and targets.dtype == np.int64
        if not classes and (targets.shape != (batch.n, n_targets) or targets.dtype != dtype):
            wanted = f"(rows, {n_targets}) {dtype}" + (", or (rows,) int64" if self.loss.targets == "classes" else "")
            raise ValueError(f"targets must be {wanted}, not {targets.shape} {targets.dtype}")
        self._checked.add(signature)

    def _part(self, n: int) -> tuple[list[Signals], Array]:
        """The arrays for n rows: views of the full ones, kept, for the shorter last batch of an epoch."""
        if n not in self._parts:
            whole = n == self.batch_size
            signals = self.signals if whole else [signal.rows(n) for signal in self.signals]
            self._parts[n] = signals, self.losses if whole else self.losses[:n]
        return self._parts[n]
