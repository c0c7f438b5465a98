"""From a config to the parts of a training: the network, the batches, and the objective.

They are made here for the training itself, and for what it will need of the memory (`memory.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gpu_bp.backends import Backend
from gpu_bp.config import Config
from gpu_bp.data import Dataset
from gpu_bp.data.batches import Batches
from gpu_bp.data.source import Source
from gpu_bp.errors import UserError
from gpu_bp.initial import initialise
from gpu_bp.network import Network
from gpu_bp.objective import Objective
from gpu_bp.precision import PRECISIONS
from gpu_bp.ranks import Alone, Ranks
from gpu_bp.sharding import Sharding


def build_network(config: Config, dataset: Dataset, backend: Backend, precision: str | None = None) -> Network:
    """The network of a config for its data, with its initial parameters.

    Raises:
        UserError: the loss does not go with so many targets, a file of weights does not fit, or the backend has no
            such precision.
    """
    network = network_of_zeros(config, dataset, backend, precision)
    initialise(network, config.network.weights, config.seed)
    return network


def network_of_zeros(config: Config, dataset: Dataset, backend: Backend, precision: str | None = None) -> Network:
    """The same, all its parameters 0."""
    try:
        n_outputs = config.loss.record().n_outputs(dataset.n_targets)
    except ValueError as error:
        raise UserError(f"loss.kind: {error}") from None
    chosen = PRECISIONS[precision or config.train.precision]
    network = Network(
        [dataset.n_inputs, *config.network.hidden, n_outputs],
        [*config.network.hidden_activations(), config.output_activation()],
        biases=config.network.biases,
        normalise=config.network.normalise,
        residual=config.network.residual,
        backend=backend,
        dtype=chosen.dtype,
        products=chosen.products,
    )
    if network.residual and not any(layer.shortcut for layer in network.layers):
        raise UserError(
            f"network.residual: no hidden layer is as wide as its inputs, the widths are {network.widths}; leave it out"
        )
    return network


def build_sharding(config: Config, network: Network, source: Source, ranks: Ranks | None = None) -> Sharding | None:
    """How the steps of a training are split, and which shards are this rank's; None where they are not.

    Their arrays are for the largest leaf.

    Raises:
        UserError: there are more ranks than shards.
    """
    train, ranks = config.train, ranks or Alone()
    if ranks.size > train.shards:
        raise UserError(
            f"there are {ranks.size} ranks, and train.shards is {train.shards}; set train.shards = {ranks.size} or a "
            "larger power of two, or start fewer ranks"
        )
    if train.shards == 1:
        return None
    rows = min(train.batch_size, source.n_rows)
    leaf_rows = network.backend.division(network.widths, -(-rows // train.shards), workers=1).rows
    leaf_rows = min(leaf_rows, train.part_rows or leaf_rows)
    sharding = Sharding.of_rank(train.shards, leaf_rows, ranks.rank, ranks.size)
    return replace(sharding, leaf_rows=sharding.largest_leaf(rows))


def build_batches(
    config: Config, source: Source, backend: Backend, dtype: Any, sharding: Sharding | None = None
) -> Batches:
    """The batches of the training rows."""
    data, train = config.data, config.train
    return Batches(
        backend,
        source,
        train.batch_size,
        train.sampling,
        config.seed,
        part_rows=train.part_rows,
        dtype=dtype,
        block_rows=data.block_rows,
        window_blocks=data.window_blocks,
        steps_at_once=backend.steps_at_once,
        sharding=sharding,
    )


def build_objective(config: Config, network: Network, rows: int, class_weights: np.ndarray | None) -> Objective:
    """The training's objective, for batches of up to so many rows."""
    return Objective(network, config.loss.record(), rows, noise=config.noise(), class_weights=class_weights)
