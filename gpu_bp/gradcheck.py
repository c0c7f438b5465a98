"""The gradient check: backpropagation against central differences, in float64, around kinks.

For each parameter w of a sample, n = (E(w + h) - E(w - h)) / 2h is compared with backpropagation's a. Where w +- h
carries a net input (or an error) of any row over a kink, h is reduced; what still crosses is left out and counted.
Where they seem to differ, a gap |a - n| within the rounding of E's difference, ROUNDING |E| / h, counts as none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gpu_bp.data.source import Batch
from gpu_bp.network import Network
from gpu_bp.noise import Noise
from gpu_bp.objective import Objective
from gpu_bp.registry import Permutations, Purpose
from gpu_bp.spec import Activation, Loss

STEPS = (1e-5, 1e-6, 1e-7)
TOLERANCE = 1e-6
ROUNDING = 4 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Worst:
    """The worst entry of one parameter array.

    `error` is max|a - n| / max(|a|, |n|), both maxima over the entries checked; `analytic` and `numeric` are
    the entry where |a - n| is largest. `checked` of the entries were compared, `skipped` lay on a kink.
    """

    layer: int
    array: str
    error: float
    index: tuple[int, ...]
    analytic: float
    numeric: float
    checked: int
    skipped: int

    @property
    def passed(self) -> bool:
        return self.checked > 0 and self.error <= TOLERANCE

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "index": list(self.index), "passed": self.passed}


def table(results: Sequence[Worst]) -> list[str]:
    """What was compared, in lines to be read."""
    lines = [
        f"{'layer':>5}  {'array':<8}  {'error':>9}  {'backprop':>13}  {'differences':>13}  entry, of those checked"
    ]
    for w in results:
        entry = f"{list(w.index)}, {w.checked}" + (f" ({w.skipped} on a kink)" if w.skipped else "")
        lines.append(f"{w.layer:>5}  {w.array:<8}  {w.error:>9.2e}  {w.analytic:>13.6e}  {w.numeric:>13.6e}  {entry}")
    return lines


def check_gradients(
    network: Network,
    loss: Loss,
    inputs: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    noise: Noise | None = None,
    most: int = 500,
    seed: int = 0,
) -> list[Worst]:
    """The worst entry of every parameter array, by layer.

    Args:
        network: in float64; its parameters are the point where the gradient is checked, and are left as they were.
        inputs: (rows, n_inputs). targets: as the loss takes them. weights: (rows,), by default each row weighs 1.
        noise: dropout and input noise, the same draw of them for all differences.
        most: entries compared in an array; of a larger one a random sample, drawn with `seed`.
    """
    if network.dtype != np.float64:
        raise ValueError(f"gradients are checked in float64, this network is {network.dtype}")
    backend = network.backend
    target_dtype = np.int64 if targets.ndim == 1 else np.float64
    batch = Batch(
        backend.to_device(inputs.astype(np.float64)),
        backend.to_device(targets.astype(target_dtype)),
        backend.to_device(np.arange(len(inputs))),
        None if weights is None else backend.to_device(weights.astype(np.float64)),
    )
    point = _Point(network, loss, batch, noise)
    gradient = network.layout.views(point.gradient())
    results = []
    for k, (name, offset) in enumerate(network.layout.offsets.items()):
        size = gradient[name].size
        entries = np.sort(Permutations.of(seed, Purpose.CHECK, size, k)(np.arange(min(size, most)))[0])
        numeric = np.array([point.central_difference(offset + int(entry)) for entry in entries])
        results.append(_worst(name, gradient[name], entries, *numeric.T))
    return sorted(results, key=lambda worst: worst.layer)


class _Point:
    """A network's parameters as the point at which its summed loss over a batch is differentiated."""

    def __init__(self, network: Network, loss: Loss, batch: Batch, noise: Noise | None) -> None:
        self._network = network
        self._loss = loss
        self._batch = batch
        self._objective = Objective(network, loss, batch.n, keep_net_inputs=True, noise=noise)
        self._phi_kinks = [
            phi.kinks(**phi.values) if isinstance(phi, Activation) else ()
            for phi in (layer.activation for layer in network.layers)
        ]
        self._loss_kinks = loss.kinks(**loss.values)

    def gradient(self) -> np.ndarray:
        """dE/dw by backpropagation: the flat buffer."""
        self._objective.forward(self._batch)
        self._objective.backward(self._batch)
        self._objective.mean_loss()
        return self._network.backend.to_host(self._objective.gradients)

    def central_difference(self, position: int) -> tuple[float, float]:
        """dE/dw at a position of the flat buffer, and its rounding; NaN where a kink is too near."""
        parameters = self._network.parameters
        w = float(parameters[position])
        _, here = self._loss_and_sides()
        try:
            for step in STEPS:
                h = step * max(1.0, abs(w))
                parameters[position] = w + h
                above, side_above = self._loss_and_sides()
                parameters[position] = w - h
                below, side_below = self._loss_and_sides()
                if side_above == here == side_below:
                    width = (w + h) - (w - h)
                    return (above - below) / width, ROUNDING * max(abs(above), abs(below)) / h
            return math.nan, math.nan
        finally:
            parameters[position] = w

    def _loss_and_sides(self) -> tuple[float, bytes]:
        """The summed loss, and on which side of each kink every net input and error lies."""
        objective, to_host = self._objective, self._network.backend.to_host
        objective.forward(self._batch)
        loss = float(to_host(objective.total)[0])
        objective.mean_loss()  # begins anew
        sides = b""
        for signal, kinks in zip(objective.signals, self._phi_kinks, strict=True):
            if kinks:
                sides += np.digitize(to_host(signal.net_input), kinks).tobytes()
        if self._loss_kinks:
            targets = to_host(self._batch.targets)
            outputs = to_host(objective.signals[-1].output).reshape(len(targets), self._loss.groups, -1)
            sides += np.digitize(outputs - targets[:, None], self._loss_kinks).tobytes()
        return loss, sides


def _worst(name: str, gradient: np.ndarray, entries: np.ndarray, numeric: np.ndarray, rounding: np.ndarray) -> Worst:
    _, layer, array = name.split(".")
    compared = ~np.isnan(numeric)
    checked = int(compared.sum())
    skipped = len(entries) - checked
    if not checked:
        return Worst(int(layer), array, 0.0, (), math.nan, math.nan, 0, skipped)
    a, n, entries = gradient.reshape(-1)[entries][compared], numeric[compared], entries[compared]
    gap, largest = np.abs(a - n), max(np.abs(a).max(), np.abs(n).max())
    if gap.max() > TOLERANCE * largest:
        gap[gap <= rounding[compared]] = 0.0
    worst = int(gap.argmax())
    error = float(gap[worst] / largest) if gap[worst] else 0.0
    index = tuple(int(k) for k in np.unravel_index(entries[worst], gradient.shape))
    return Worst(int(layer), array, error, index, float(a[worst]), float(n[worst]), checked, skipped)
