"""Initial parameters: weights drawn from the seed, given as numbers, or read from a file.

Biases start at 0 unless they are given, gains at 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpu_bp.backends.host_threads import Workers
from gpu_bp.config_network import (
    AnyWeights,
    ArrayWeights,
    DrawnWeights,
    FileWeights,
    NormalWeights,
    OrthogonalWeights,
    SparseWeights,
    UniformWeights,
)
from gpu_bp.data.arrays import NpyFile
from gpu_bp.errors import UserError
from gpu_bp.network import Network
from gpu_bp.registry import Purpose, normals, uniforms
from gpu_bp.state_dict import by_layer
from gpu_bp.tensor_file import read_shapes, read_tensors

PART = 2**18  # numbers


def initialise(network: Network, weights: Sequence[AnyWeights], seed: int) -> None:
    """Sets a network's parameters. `weights`: one choice for all layers, or one a layer.

    A stream is laid over the weights of all layers, one after the other: what a layer draws does not depend on the
    choices for the others.

    Raises:
        UserError: numbers or a file that do not fit the network (which layer or tensor, and the right shape), or a
            file that is missing or of another kind.
    """
    first = weights[0]
    if isinstance(first, FileWeights) and not first.of_one_layer:
        try:
            names = by_layer(network.layout, read_shapes(Path(first.path)))
            tensors = read_tensors(Path(first.path), names.values())
            network.load({ours: tensors[name] for ours, name in names.items()})
        except UserError as error:
            raise UserError(f"network.weights, {first.path}: {error}") from None
        return
    shapes = network.layout.shapes
    tensors = {
        n: np.full(shape, float(n.endswith("gains"))) for n, shape in shapes.items() if not n.endswith("weights")
    }
    start = 0
    for k, choice in enumerate(weights if len(weights) > 1 else [first] * len(network.layers)):
        name, where = f"layers.{k}.weights", f"network.weights.{k}"
        n_out, n_in = shapes[name]
        if isinstance(choice, FileWeights):
            file = NpyFile(Path(choice.path), where)
            where += f", {choice.path}"
            _check_shape(where, file.shape, name, (n_out, n_in))
            tensors[name] = file.read(0, len(file)).astype(np.float64)
        elif isinstance(choice, ArrayWeights):
            tensors[name] = np.array(choice.weights)
            if choice.biases is not None:
                tensors[f"layers.{k}.biases"] = np.array(choice.biases)
        else:
            tensors[name] = _draw(choice, seed, start, n_out, n_in)
        _check_shape(where, tensors[name].shape, name, (n_out, n_in))
        start += n_out * n_in
    try:
        network.load(tensors)
    except UserError as error:  # biases
        raise UserError(f"network.weights: {error}") from None


def _check_shape(where: str, shape: tuple[int, ...], name: str, wanted: tuple[int, int]) -> None:
    if shape != wanted:
        raise UserError(f"{where}: the shape is {shape}, {name} needs {wanted}")


def host_bytes(network: Network) -> int:
    """About what `initialise` takes of the host's memory for a while: all in float64, and copies.

    Orthogonal and sparse weights of a large layer take about twice that.
    """
    sizes = [math.prod(shape) for shape in network.layout.shapes.values()]
    return 8 * sum(sizes) + max(8 * max(sizes), 2 * network.layout.size * network.dtype.itemsize)


def _normals(seed: int, purpose: Purpose, start: int, n: int) -> np.ndarray:
    """Normals (n,), drawn in parts: those of a part take several times its memory."""
    drawn = np.empty(n)
    for first in range(0, n, PART):
        part = drawn[first : first + PART]
        part[...] = normals(seed, purpose, start + first, len(part))
    return drawn


def _draw(weights: DrawnWeights, seed: int, start: int, n_out: int, n_in: int) -> np.ndarray:
    """Weights (n_out, n_in) from the elements of the stream from `start` on.

    Glorot and Bengio (2010), He et al. (2015), LeCun et al. (1998); orthogonal: Saxe et al. (2014); sparse: Martens
    (2010).
    """
    key, shape = (seed, Purpose.WEIGHTS, start, n_out * n_in), (n_out, n_in)
    if isinstance(weights, UniformWeights):
        return weights.low + (weights.high - weights.low) * uniforms(*key).reshape(shape)
    if isinstance(weights, NormalWeights):
        return weights.sd * _normals(*key).reshape(shape)
    if isinstance(weights, OrthogonalWeights):
        with Workers().at_most(1):  # the bits depend on how many threads there are
            q, r = np.linalg.qr(_normals(*key).reshape(max(shape), min(shape)))
        q *= np.where(np.diag(r) < 0, -1.0, 1.0)  # else some orthogonal matrices would be likelier than others
        return weights.gain * (q if n_out >= n_in else q.T)
    if isinstance(weights, SparseWeights):
        lots = uniforms(seed, Purpose.CONNECTIONS, start, n_out * n_in).reshape(shape)
        unconnected = lots.argsort(axis=1, kind="stable")[:, weights.connections :]
        drawn = weights.sd * _normals(*key).reshape(shape)
        np.put_along_axis(drawn, unconnected, 0.0, axis=1)
        return drawn
    sd = math.sqrt({"glorot": 2 / (n_in + n_out), "he": 2 / n_in, "lecun": 1 / n_in}[weights.kind])
    if weights.distribution == "normal":
        return sd * _normals(*key).reshape(shape)
    return math.sqrt(3) * sd * (2 * uniforms(*key).reshape(shape) - 1)
