"""A dense network, and the derivation as code: `Network.forward` and `Network.backward`.

For layer l, rows are samples (see docs/derivation.md):

    v = W y_prev + b                 net input           rows: V = Y_prev @ W.T + b
    y = phi(v)                       output
    delta = dE/dv                    output layer: from the loss
    delta = phi'(v) (W_next.T delta_next)     hidden     rows: (Delta_next @ W_next) * phi'(V)
    dE/dW = delta y_prev.T, dE/db = delta     summed over the rows: Delta.T @ Y_prev, column sums of Delta
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_bp import registry
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.errors import UserError
from gpu_bp.noise import Draw, Noise
from gpu_bp.precision import PRECISIONS, stored
from gpu_bp.spec import Activation, Array, Loss, RowActivation

# Every named array begins at a multiple of this many elements: of 128 bytes or more, one memory transaction.
ALIGNMENT = 32

# What all layers may have of rows that are predicted together: in float32 256 MB.
PREDICTED_NUMBERS = 2**26


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

    def refuse_other(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError where tensors of these shapes, by name, are not those of this layout."""
        for name, shape in self.shapes.items():
            if name not in shapes:
                raise UserError(f"tensor {name} is missing; this network needs: {', '.join(self.shapes)}")
            if shapes[name] != shape:
                raise UserError(f"tensor {name} has shape {shapes[name]}, this network needs {shape}")
        if extra := sorted(set(shapes) - set(self.shapes)):
            raise UserError(f"tensor {extra[0]} is not one of this network's: {', '.join(self.shapes)}")


def layout_of(widths: Sequence[int], *, biases: bool = True, normalise: bool = False) -> Layout:
    """The layout of the parameters of a `Network`; nothing is allocated."""
    n_layers = len(widths) - 1
    return Layout(
        {f"layers.{k}.weights": (widths[k + 1], widths[k]) for k in range(n_layers)},
        {f"layers.{k}.biases": (widths[k + 1],) for k in range(n_layers) if biases}
        | {f"layers.{k}.gains": (widths[k + 1],) for k in range(n_layers - 1) if normalise},
    )


@dataclass(frozen=True)
class Layer:
    """One layer: weights (n_out, n_in), biases (n_out,) or None, and its activation.

    With `gains` (n_out,) its net inputs are normalised; with a `shortcut` its inputs are added to its outputs.
    """

    weights: Array
    biases: Array | None
    activation: Activation | RowActivation
    gains: Array | None = None
    shortcut: bool = False


@dataclass
class Signals:
    """The arrays of one layer for a batch, each (rows, n_out).

    net_input v; value phi(v); output, what the next layer gets; delta, the local gradient dE/dv.

    Where the derivative is taken from the value, v is not kept: v and the value are one array. (The output layer of
    a fused loss needs v.) The value is the output, but for layers with dropout or a shortcut. A layer with a shortcut
    has `error`, dE/dy, too, which its inputs get as well; a normalised one its `normalised` product of weights and
    inputs, and the `scale` (rows, 1) that normalised it.

    Where the factors of products are stored in less than the network's dtype (`Network.factors`), so are the signals of
    hidden layers; not net inputs and deltas of normalised ones, nor what the loss sees. Of a delta that is not there is
    a `rounded_delta` for the products, and of the network's inputs the first layer has the `rounded_inputs`.
    """

    net_input: Array
    value: Array
    output: Array
    delta: Array | None
    error: Array | None = None
    normalised: Array | None = None
    scale: Array | None = None
    rounded_delta: Array | None = None
    rounded_inputs: Array | None = None

    def rows(self, n: int) -> Signals:
        """The first n rows, as views; arrays that are one stay one."""
        views = {id(array): array[:n] for array in vars(self).values() if array is not None}
        return Signals(**{name: None if x is None else views[id(x)] for name, x in vars(self).items()})


class Network:
    """A dense network over one flat parameter buffer on a backend.

    Args:
        widths: units a layer, the inputs first, at least two numbers: [2, 20, 1].
        activations: one a layer after the inputs; names or records.
        biases: whether layers have biases. They start at 0, and so do the weights: see `load`.
        normalise: whether the net inputs of hidden layers are normalised (see `kernels/normalise.py`).
        residual: whether a hidden layer that is as wide as its inputs adds them to its outputs (He et al., 2016).
        backend: where it lives; NumPy by default.
        dtype: "float32" or "float64".
        products: what the factors of its matrix products are rounded to, "tf32", "bfloat16" or "float16"; by default
            not at all.

    Raises:
        UserError: no network can be so, or the backend has no such products.

    Attributes:
        parameters: the flat buffer. layout: where each named array stands in it.
        layers: the layers, as views of it.
        factors: the dtype in which the factors of products are stored.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activations: Sequence[str | Activation | RowActivation],
        *,
        biases: bool = True,
        normalise: bool = False,
        residual: bool = False,
        backend: Backend | None = None,
        dtype: str = "float32",
        products: str = "",
    ) -> None:
        if len(widths) < 2 or any(width < 1 for width in widths):
            raise UserError(f"a network needs two widths or more, each at least 1, not {list(widths)}")
        if len(activations) != len(widths) - 1:
            raise UserError(f"{len(widths) - 1} layers need as many activations, not {len(activations)}")
        records = [registry.activation(a) if isinstance(a, str) else a for a in activations]
        for record in records[:-1]:
            if isinstance(record, RowActivation):
                raise UserError(f"{record.name} can only be the activation of the output layer")
        if normalise and 1 in widths[1:-1]:
            raise UserError("a hidden layer of a single unit cannot be normalised: its net input would always be 0")
        self.widths = list(widths)
        self.biases = biases
        self.normalise = normalise
        self.residual = residual
        self.backend: Backend = backend or NumpyBackend()
        if products and (reason := self.backend.refuses(products)):
            raise UserError(f"train.precision = {products}: {reason}")
        self.dtype = np.dtype(dtype)
        self.products = products
        self.factors = stored(products, self.dtype)
        self._arithmetic = PRECISIONS[products].arithmetic if products else ""
        self.layout = layout_of(widths, biases=biases, normalise=normalise)
        if self.layout.size > 2**48:
            raise MemoryError(f"a network of {self.layout.size:.1e} parameters")
        self.parameters = self.backend.zeros((self.layout.size,), self.dtype)
        self._activations = records
        self.layers = self.views(self.parameters)
        # the parameters as products take them: made anew by each `forward`, so that they never are of other parameters
        self._rounded = self.backend.zeros((self.layout.size,), self.factors) if self._rounds else None
        self._rounded_layers = self.views(self._rounded) if self._rounds else []

    @property
    def _rounds(self) -> bool:
        return self.factors != self.dtype

    def load(self, tensors: Mapping[str, np.ndarray], buffer: Array | None = None) -> None:
        """Sets the parameters from named host arrays, `layers.K.weights` (n_out, n_in), `layers.K.biases` and `gains`.

        Or another flat `buffer` of the layout, such as an optimizer's state.

        Raises:
            UserError: a tensor is missing, unknown, of another shape, or not finite.
        """
        self.layout.refuse_other({name: tensor.shape for name, tensor in tensors.items()})
        flat = np.zeros(self.layout.size, self.dtype)
        for name, view in self.layout.views(flat).items():
            tensor = tensors[name]
            if tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
                raise UserError(f"tensor {name} must hold finite floating-point numbers")
            with np.errstate(over="ignore"):
                view[...] = tensor
            if not np.isfinite(view).all():
                raise UserError(f"tensor {name} has numbers that are too large for {self.dtype}")
        (self.parameters if buffer is None else buffer)[...] = self.backend.to_device(flat)

    def tensors(self, buffer: Array | None = None) -> dict[str, np.ndarray]:
        """The parameters, or another flat buffer of the layout, as named host arrays: a copy."""
        return self.layout.views(self.backend.to_host(self.parameters if buffer is None else buffer))

    def signals(
        self,
        rows: int,
        loss: Loss | None = None,
        *,
        backward: bool = True,
        keep_net_inputs: bool = False,
        noise: Noise | None = None,
    ) -> list[Signals]:
        """New arrays for a batch of up to so many rows.

        Without `backward`, deltas are made for the output layer alone, and only where there is a loss.
        """
        made = []
        for k, layer in enumerate(self.layers):
            last = layer is self.layers[-1]
            shape = (rows, len(layer.weights))
            phi = layer.activation
            normalised = layer.gains is not None
            whole = self._rounds and (last or normalised)  # net input and delta are not rounded
            before, after = (self.dtype if whole else self.factors), (self.dtype if last else self.factors)
            in_place = isinstance(phi, Activation) and phi.derivative_from == "output" and before == after
            if keep_net_inputs or (loss and loss.starts_from_net_input and last):
                in_place = False
            net_input = self._zeros(shape, before)
            value = net_input if in_place else self._zeros(shape, after)
            drops = noise is not None and noise.rate(k) > 0
            made.append(
                Signals(
                    net_input,
                    value,
                    output=self._zeros(shape, after) if drops or layer.shortcut else value,
                    delta=self._zeros(shape, before) if backward or (loss is not None and last) else None,
                    error=self._zeros(shape, after) if backward and layer.shortcut else None,
                    normalised=self._zeros(shape) if normalised else None,
                    scale=self._zeros((rows, 1)) if normalised else None,
                    rounded_delta=self._zeros(shape, self.factors) if backward and whole else None,
                    rounded_inputs=self._zeros((rows, self.widths[0]), self.factors)
                    if self._rounds and not k
                    else None,
                )
            )
        return made

    def _zeros(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        return self.backend.zeros(shape, dtype or self.dtype)

    def _product(self, a: Array, b: Array, out: Array, *, transpose_b: bool = False) -> None:
        """out = a @ b, or a @ b.T, in the network's arithmetic."""
        self.backend.matmul(a, b, out, transpose_b=transpose_b, arithmetic=self._arithmetic)

    def _weights(self, k: int) -> Array:
        """A layer's weights as products take them."""
        return (self._rounded_layers or self.layers)[k].weights

    def forward(
        self, inputs: Array, signals: Sequence[Signals], loss: Loss | None = None, draw: Draw | None = None
    ) -> Array:
        """The function signal, from the inputs (rows, n_in) to the outputs (rows, n_out).

        With a fused loss the last layer stops at its net input, from which the loss computes y. With a draw some
        outputs are left out, as it says.
        """
        backend = self.backend
        y = inputs
        if self._rounds:
            y = signals[0].rounded_inputs
            backend.copy(inputs, y)
            backend.copy(self.parameters, self._rounded)
        for k, (layer, signal) in enumerate(zip(self.layers, signals, strict=True)):
            v, w, biases = signal.net_input, self._weights(k), layer.biases
            phi = None if loss and loss.starts_from_net_input and layer is self.layers[-1] else layer.activation
            if layer.gains is None:  # V = Y_prev W.T + b, Y = phi(V)
                backend.dense(phi, y, w, biases, v, signal.value, arithmetic=self._arithmetic)
            else:
                self._product(y, w, signal.normalised, transpose_b=True)
                backend.normalise(signal.normalised, layer.gains, biases, signal.scale, v)  # V = gains * X + b
                backend.activate(layer.activation, v, None, signal.value)
            passed = signal.value
            if draw is not None and draw.noise.rate(k):
                draw.outputs(backend, k, passed, signal.output)
                passed = signal.output
            if layer.shortcut:
                backend.add(passed, y, signal.output)  # Y += Y_prev
            y = signal.output
        return y

    def backward(
        self,
        inputs: Array,
        signals: Sequence[Signals],
        gradients: Sequence[Layer],
        draw: Draw | None = None,
        done: Callable[[int], None] = lambda layer: None,
    ) -> None:
        """The error signal, from the output layer's delta back, and with it the gradient of the sum over the rows.

        `gradients` are layers whose weights, biases and gains receive dE/dW, dE/db and dE/dgains; those of a layer are
        `done` before the error goes on to the layer below.
        """
        backend = self.backend
        for k in reversed(range(len(self.layers))):
            layer, signal, gradient = self.layers[k], signals[k], gradients[k]
            delta, biases = signal.delta, gradient.biases
            if biases is not None and (layer.gains is not None or signal.rounded_delta is not None):
                backend.column_sums(delta, biases)  # dE/db: not of the delta that the product takes
                biases = None
            if layer.gains is not None:
                backend.column_dots(delta, signal.normalised, gradient.gains)  # dE/dgains
                backend.normalise_delta(delta, signal.normalised, signal.scale, layer.gains)
            if signal.rounded_delta is not None:
                backend.copy(delta, signal.rounded_delta)
                delta = signal.rounded_delta
            y_prev = signals[k - 1].output if k else signal.rounded_inputs if self._rounds else inputs
            # dE/dW = Delta.T Y_prev, dE/db = column sums of Delta
            backend.dense_gradients(delta, y_prev, gradient.weights, biases, arithmetic=self._arithmetic)
            done(k)
            if k:
                below, phi = signals[k - 1], self.layers[k - 1].activation
                assert isinstance(phi, Activation)
                error = below.delta if below.error is None else below.error
                self._product(delta, self._weights(k), error)  # E = Delta W, dE/dY of the layer below
                if layer.shortcut:
                    backend.add(error, signal.error, error)  # whose outputs went past this layer too
                if draw is not None and draw.noise.rate(k - 1):
                    draw.outputs(backend, k - 1, error, below.delta)
                    error = below.delta
                backend.hidden_delta(phi, error, below.net_input, below.value, below.delta)  # Delta = E * phi'(V)

    def views(self, buffer: Array) -> list[Layer]:
        """A flat buffer, such as the parameters or their gradients, seen as layers."""
        named = self.layout.views(buffer)
        last = len(self._activations) - 1
        return [
            Layer(
                named[f"layers.{k}.weights"],
                named.get(f"layers.{k}.biases"),
                activation,
                named.get(f"layers.{k}.gains"),
                shortcut=self.residual and k < last and self.widths[k] == self.widths[k + 1],
            )
            for k, activation in enumerate(self._activations)
        ]

    def over(self, parameters: Array) -> Network:
        """This network with another flat buffer of parameters, such as their average; the buffer is not copied."""
        other = copy.copy(self)
        other.parameters = parameters
        other.layers = self.views(parameters)
        return other

    def predict(self, inputs: np.ndarray, *, batch_rows: int = 4096) -> np.ndarray:
        """Outputs (rows, n_out) for host inputs (rows, n_in), so many rows at a time, of wide layers fewer."""
        outputs = np.empty((len(inputs), self.widths[-1]), self.dtype)
        batch_rows = max(1, min(batch_rows, PREDICTED_NUMBERS // sum(self.widths)))
        signals = self.signals(min(batch_rows, max(1, len(inputs))), backward=False)
        for start in range(0, len(inputs), batch_rows):
            block = self.backend.to_device(inputs[start : start + batch_rows].astype(self.dtype))
            part = [signal.rows(len(block)) for signal in signals]
            outputs[start : start + batch_rows] = self.backend.to_host(self.forward(block, part))
        return outputs
