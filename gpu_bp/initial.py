"""Initial parameters: weights drawn from the seed or read from a file; biases start at 0."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gpu_bp.config_network import FileWeights, NormalWeights, ScaledWeights, UniformWeights
from gpu_bp.errors import UserError
from gpu_bp.network import Network
from gpu_bp.registry import Purpose, normals, uniforms


def initialise(
    network: Network, weights: UniformWeights | NormalWeights | ScaledWeights | FileWeights, seed: int
) -> None:
    """Sets a network's parameters. The layers' weights are consecutive draws of one stream.

    The scaled kinds: Glorot and Bengio (2010), He et al. (2015), LeCun et al. (1998).

    Raises:
        UserError: a file that is missing, not safetensors, or does not fit the network.
    """
    if isinstance(weights, FileWeights):
        try:
            network.load(read_tensors(Path(weights.path)))
        except UserError as error:
            raise UserError(f"network.weights, {weights.path}: {error}") from None
        return
    tensors: dict[str, np.ndarray] = {}
    start = 0
    for name, shape in network.layout.shapes.items():
        if not name.endswith(".weights"):
            tensors[name] = np.zeros(shape)
            continue
        count = math.prod(shape)
        draws = _draws(weights, seed, start, count, *shape)
        tensors[name] = draws.reshape(shape)
        start += count
    network.load(tensors)


def _draws(
    weights: UniformWeights | NormalWeights | ScaledWeights, seed: int, start: int, count: int, n_out: int, n_in: int
) -> np.ndarray:
    if isinstance(weights, UniformWeights):
        return weights.low + (weights.high - weights.low) * uniforms(seed, Purpose.WEIGHTS, start, count)
    if isinstance(weights, NormalWeights):
        return weights.sd * normals(seed, Purpose.WEIGHTS, start, count)
    sd = math.sqrt({"glorot": 2 / (n_in + n_out), "he": 2 / n_in, "lecun": 1 / n_in}[weights.kind])
    if weights.distribution == "normal":
        return sd * normals(seed, Purpose.WEIGHTS, start, count)
    return math.sqrt(3) * sd * (2 * uniforms(seed, Purpose.WEIGHTS, start, count) - 1)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The named tensors of a safetensors file. Raises UserError where it is missing or is none."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
