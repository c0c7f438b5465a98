"""A dense network, and the derivation as code: `Network.forward` and `Network.backward`.

For layer l, rows are samples (see docs/derivation.md):

    v = W y_prev + b                 net input           rows: V = Y_prev @ W.T + b
    y = phi(v)                       output
    delta = dE/dv                    output layer: from the loss
    delta = phi'(v) (W_next.T delta_next)     hidden     rows: (Delta_next @ W_next) * phi'(V)
    dE/dW = delta y_prev.T, dE/db = delta     summed over the rows: Delta.T @ Y_prev, column sums of Delta
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_bp import registry
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.errors import UserError
from gpu_bp.spec import Activation, Array, Loss, RowActivation

# Every named array begins at a multiple of this many elements: of 128 bytes or more, one memory transaction.
ALIGNMENT = 32

IDENTITY = registry.activation("identity")


class Layout:
    """Where each named array stands in one flat buffer: weights first, then biases; the padding is zero.

    So one kernel updates all parameters, and what is exempt from weight decay is the range from `n_weights`.
    """

    def __init__(self, weights: Mapping[str, tuple[int, ...]], exempt: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = {**weights, **exempt}
        self.offsets: dict[str, int] = {}
        self.size = self.n_weights = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = self.size
            self.size += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
            if name in weights:
                self.n_weights = self.size

    def views(self, buffer: Array) -> dict[str, Array]:
        """Named views of a flat buffer of this layout's size."""
        return {
            name: buffer[self.offsets[name] : self.offsets[name] + math.prod(shape)].reshape(shape)
            for name, shape in self.shapes.items()
        }


@dataclass(frozen=True)
class Layer:
    """One layer: weights (n_out, n_in), biases (n_out,) or None, and its activation."""

    weights: Array
    biases: Array | None
    activation: Activation | RowActivation


class Signals:
    """The arrays of one layer for a batch: net input v, output y and local gradient delta, each (rows, n_out).

    Where the derivative is taken from the output, v is not kept: v and y are one array. (The output layer of
    a fused loss needs v.)
    """

    def __init__(self, net_input: Array, output: Array, delta: Array | None) -> None:
        self.net_input = net_input
        self.output = output
        self.delta = delta

    def rows(self, n: int) -> Signals:
        """The first n rows, as views."""
        net_input = self.net_input[:n]
        output = net_input if self.output is self.net_input else self.output[:n]
        return Signals(net_input, output, None if self.delta is None else self.delta[:n])


class Network:
    """A dense network over one flat parameter buffer on a backend.

    Args:
        widths: units a layer, the inputs first, at least two numbers: [2, 20, 1].
        activations: one a layer after the inputs; names or records.
        biases: whether layers have biases. They start at 0, and so do the weights: see `load`.
        backend: where it lives; NumPy by default.
        dtype: "float32" or "float64".

    Attributes:
        parameters: the flat buffer. layout: where each named array stands in it.
        layers: the layers, as views of it.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activations: Sequence[str | Activation | RowActivation],
        *,
        biases: bool = True,
        backend: Backend | None = None,
        dtype: str = "float32",
    ) -> None:
        if len(widths) < 2 or any(width < 1 for width in widths):
            raise UserError(f"a network needs two widths or more, each at least 1, not {list(widths)}")
        if len(activations) != len(widths) - 1:
            raise UserError(f"{len(widths) - 1} layers need as many activations, not {len(activations)}")
        records = [registry.activation(a) if isinstance(a, str) else a for a in activations]
        for record in records[:-1]:
            if isinstance(record, RowActivation):
                raise UserError(f"{record.name} can only be the activation of the output layer")
        self.widths = list(widths)
        self.biases = biases
        self.backend: Backend = backend or NumpyBackend()
        self.dtype = np.dtype(dtype)
        n_layers = len(widths) - 1
        self.layout = Layout(
            {f"layers.{k}.weights": (widths[k + 1], widths[k]) for k in range(n_layers)},
            {f"layers.{k}.biases": (widths[k + 1],) for k in range(n_layers) if biases},
        )
        if self.layout.size > 2**48:
            raise MemoryError(f"a network of {self.layout.size:.1e} parameters")
        self.parameters = self.backend.zeros((self.layout.size,), self.dtype)
        named = self.layout.views(self.parameters)
        self.layers = [
            Layer(named[f"layers.{k}.weights"], named.get(f"layers.{k}.biases"), record)
            for k, record in enumerate(records)
        ]

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Sets the parameters from named host arrays, `layers.K.weights` (n_out, n_in) and `layers.K.biases`.

        Raises:
            UserError: a tensor is missing, unknown, of another shape, or not finite.
        """
        flat = np.zeros(self.layout.size, self.dtype)
        views = self.layout.views(flat)
        for name, view in views.items():
            if name not in tensors:
                raise UserError(f"tensor {name} is missing; this network needs: {', '.join(views)}")
            tensor = tensors[name]
            if tensor.shape != view.shape:
                raise UserError(f"tensor {name} has shape {tensor.shape}, this network needs {view.shape}")
            if tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
                raise UserError(f"tensor {name} must hold finite floating-point numbers")
            view[...] = tensor
        if extra := sorted(set(tensors) - set(views)):
            raise UserError(f"tensor {extra[0]} is not one of this network's: {', '.join(views)}")
        self.parameters[...] = self.backend.to_device(flat)

    def tensors(self) -> dict[str, np.ndarray]:
        """The parameters as named host arrays."""
        flat = self.backend.to_host(self.parameters)
        return {name: view.copy() for name, view in self.layout.views(flat).items()}

    def signals(
        self, rows: int, loss: Loss | None = None, *, backward: bool = True, keep_net_inputs: bool = False
    ) -> list[Signals]:
        """New arrays for a batch of up to so many rows.

        Without `backward`, deltas are made for the output layer alone, and only where there is a loss.
        """
        made = []
        for layer in self.layers:
            shape = (rows, len(layer.weights))
            phi = layer.activation
            in_place = isinstance(phi, Activation) and phi.derivative_from == "output"
            if keep_net_inputs or (loss and loss.starts_from_net_input and layer is self.layers[-1]):
                in_place = False
            net_input = self._zeros(shape)
            output = net_input if in_place else self._zeros(shape)
            has_delta = backward or (loss is not None and layer is self.layers[-1])
            made.append(Signals(net_input, output, self._zeros(shape) if has_delta else None))
        return made

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        return self.backend.zeros(shape, self.dtype)

    def forward(self, inputs: Array, signals: Sequence[Signals], loss: Loss | None = None) -> Array:
        """The function signal, from the inputs (rows, n_in) to the outputs (rows, n_out).

        With a fused loss the last layer stops at its net input, from which the loss computes y.
        """
        y = inputs
        for layer, signal in zip(self.layers, signals, strict=True):
            self.backend.matmul(y, layer.weights, signal.net_input, transpose_b=True)  # V = Y_prev W.T, b to come
            if loss and loss.starts_from_net_input and layer is self.layers[-1]:
                if layer.biases is not None:
                    self.backend.activate(IDENTITY, signal.net_input, layer.biases, signal.net_input)  # V += b
            else:
                self.backend.activate(
                    layer.activation, signal.net_input, layer.biases, signal.output
                )  # V += b, Y = phi(V)
            y = signal.output
        return y

    def backward(self, inputs: Array, signals: Sequence[Signals], gradients: Sequence[Layer]) -> None:
        """The error signal, from the output layer's delta back, and with it the gradient of the sum over the rows.

        `gradients` are layers whose weights and biases receive dE/dW and dE/db.
        """
        for k in reversed(range(len(self.layers))):
            delta = signals[k].delta
            y_prev = signals[k - 1].output if k else inputs
            self.backend.matmul(delta, y_prev, gradients[k].weights, transpose_a=True)  # dE/dW = Delta.T Y_prev
            if gradients[k].biases is not None:
                self.backend.column_sums(delta, gradients[k].biases)  # dE/db
            if k:
                below = signals[k - 1]
                self.backend.matmul(delta, self.layers[k].weights, below.delta)  # E = Delta W, dE/dY of the layer below
                phi = self.layers[k - 1].activation
                assert isinstance(phi, Activation)
                self.backend.hidden_delta(phi, below.delta, below.net_input, below.output)  # Delta = E * phi'(V)

    def views(self, buffer: Array) -> list[Layer]:
        """A flat buffer, such as the gradients, seen as layers."""
        named = self.layout.views(buffer)
        return [
            Layer(named[f"layers.{k}.weights"], named.get(f"layers.{k}.biases"), layer.activation)
            for k, layer in enumerate(self.layers)
        ]

    def predict(self, inputs: np.ndarray, *, batch_rows: int = 4096) -> np.ndarray:
        """Outputs (rows, n_out) for host inputs (rows, n_in), computed so many rows at a time."""
        outputs = np.empty((len(inputs), self.widths[-1]), self.dtype)
        signals = self.signals(min(batch_rows, max(1, len(inputs))), backward=False)
        for start in range(0, len(inputs), batch_rows):
            block = self.backend.to_device(inputs[start : start + batch_rows].astype(self.dtype))
            part = [signal.rows(len(block)) for signal in signals]
            outputs[start : start + batch_rows] = self.backend.to_host(self.forward(block, part))
        return outputs
