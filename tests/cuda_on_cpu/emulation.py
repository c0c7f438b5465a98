"""Forward, backward and the mean gradient of a dense network in NumPy, rounded where `gpu_bp.network` rounds.

Written down from docs/config.md, apart from the package's own code: in float64 but for what is stored in fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

Round = Callable[[np.ndarray], np.ndarray]
PHI: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # y of v; phi' of v and y
    "tanh": (np.tanh, lambda v, y: 1 - y * y),
    "silu": (
        lambda v: v / (1 + np.exp(-v)),
        lambda v, y: (1 + v * (1 - 1 / (1 + np.exp(-v)))) / (1 + np.exp(-v)),
    ),
    "identity": (lambda v: v, lambda v, y: np.ones_like(v)),
}


def tf32(x: np.ndarray) -> np.ndarray:
    """To 10 bits of fraction, to the nearest, halves to even; the range is float32's."""
    scale = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 2.0**-126))) - 10)
    return np.round(x / scale) * scale


def to(dtype: Any) -> Round:
    return lambda x: x.astype(np.float32).astype(dtype).astype(np.float64)


def exactly(x: np.ndarray) -> np.ndarray:
    return x


# What is rounded: the factors of products, and what is stored.
ROUNDED: dict[str, tuple[Round, Round]] = {
    "float64": (exactly, exactly),
    "float32": (exactly, exactly),
    "tf32": (tf32, exactly),
    "bfloat16": (exactly, to(ml_dtypes.bfloat16)),
    "float16": (exactly, to(np.float16)),
}


def gradient(
    precision: str,
    tensors: Mapping[str, np.ndarray],
    activations: list[str],
    x: np.ndarray,
    d: np.ndarray,
    *,
    scale: float = 1.0,
    residual: bool = False,
    normalise: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The outputs, and the gradient of the summed squared error by the name of each tensor.

    scale: what the output layer's delta is multiplied with; the gradient is divided by it.
    """
    factor, stored = ROUNDED[precision]
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    rounded = {name: stored(tensor) for name, tensor in w.items()}
    last = len(activations) - 1

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return factor(a) @ factor(b)

    layers: list[dict[str, Any]] = []
    y = stored(x)
    for k, name in enumerate(activations):
        kept = exactly if k == last or normalise else stored  # net inputs and deltas that are not rounded
        shortcut = residual and k < last and y.shape[1] == len(w[f"layers.{k}.weights"])
        layer: dict[str, Any] = {"x": y, "kept": kept, "shortcut": shortcut}
        v = product(y, rounded[f"layers.{k}.weights"].T)
        if normalise and k < last:
            centred = v - v.mean(axis=1, keepdims=True)
            layer["s"] = 1 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
            layer["n"] = centred * layer["s"]
            v = layer["n"] * w[f"layers.{k}.gains"]
        else:
            v = kept(v)
        v = v + w[f"layers.{k}.biases"]
        y = PHI[name][0](v)
        y = y if k == last else stored(y)
        layer |= {"v": kept(v), "value": y}
        if layer["shortcut"]:
            y = stored(y + layer["x"])
        layers.append(layer)
    gradients: dict[str, np.ndarray] = {}
    delta = (y - d) * PHI[activations[last]][1](v, y) * scale
    for k in reversed(range(len(layers))):
        layer, of = layers[k], f"layers.{k}"
        gradients[f"{of}.biases"] = delta.sum(axis=0)
        if normalise and k < last:
            gradients[f"{of}.gains"] = (delta * layer["n"]).sum(axis=0)
            g = delta * w[f"{of}.gains"]
            mean, dots = g.mean(axis=1, keepdims=True), (g * layer["n"]).mean(axis=1, keepdims=True)
            delta = layer["s"] * (g - mean - layer["n"] * dots)
        factors = stored(delta)
        gradients[f"{of}.weights"] = product(factors.T, layer["x"])
        if k:
            below = layers[k - 1]
            # an error signal is stored, but where it is to become a delta that is not
            keep = stored if below["shortcut"] else below["kept"]
            error = keep(product(factors, rounded[f"{of}.weights"]))
            if layer["shortcut"]:
                error = keep(error + layer["error"])
            below["error"] = error
            delta = below["kept"](error * PHI[activations[k - 1]][1](below["v"], below["value"]))
    return y, {name: array / scale for name, array in gradients.items()}
