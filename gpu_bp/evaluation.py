"""How well a network does: its loss and metrics on the splits of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from gpu_bp.config import Config
from gpu_bp.data.batches import Batches
from gpu_bp.data.source import Batch, Source
from gpu_bp.metrics import Metric, Metrics
from gpu_bp.network import Network
from gpu_bp.objective import Objective
from gpu_bp.ranks import Alone, Ranks
from gpu_bp.sharding import Sharding
from gpu_bp.spec import Loss

# Rows that are evaluated at a time; fixed, so that the same network always gives the same figures.
EVALUATION_ROWS = 4096
# Training rows that are evaluated, at most: a pass over all may take as long as the training.
TRAINING_ROWS = 2**17


class Evaluator:
    """The loss and the metrics of a network on the first rows of a source: on `rows` of them.

    `weighed`: whether these weighed anything when they were evaluated last; else there is no loss. `objective`,
    `batches`: what computes them, and how they come.

    Args:
        objective: of the network, for batches of `EVALUATION_ROWS` or as many rows as there are; others may use it too.
        most: rows, at most, rounded up to whole batches.
        metrics: those beside the usual ones.
        sharding: how batches are split, so that the figures depend on nothing else. ranks: who evaluates together.

    Raises:
        UserError: a metric that does not go with the source.
    """

    def __init__(
        self,
        objective: Objective,
        source: Source,
        most: int | None = None,
        metrics: Sequence[Metric] = (),
        *,
        sharding: Sharding | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        network, loss = objective.network, objective.loss
        self._backend = network.backend
        self._sharding = sharding
        self._ranks = ranks or Alone()
        self.objective = objective
        self.metrics = Metrics(source.task, source.n_targets, metrics, weighted=source.weighted, loss=loss)
        self.batches = Batches(
            network.backend, source, EVALUATION_ROWS, "ordered", seed=0, dtype=network.dtype, sharding=sharding
        )
        self._steps = min(self.batches.per_epoch, -(-(most or source.n_rows) // self.batches.size))
        self.rows = min(source.n_rows, self._steps * self.batches.size)
        self.weighed = False

    def try_metrics(self) -> None:
        """Where there are metrics of a user's own, computes all of the first batch, and forgets them.

        Raises:
            UserError: such a function fails, or gives something else than a number.
        """
        if self.metrics.has_own:
            self._evaluate(1)

    def __call__(self) -> dict[str, Any]:
        """`loss`, the mean over the rows, and the metrics. Waits for the device."""
        return self._evaluate(self._steps)

    def _evaluate(self, steps: int) -> dict[str, Any]:
        total = weight = 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # where a loss is not finite, the caller sees it
            for batch in islice(self.batches.epoch(0, follows=False), steps):
                own: list[_Part] = []
                # bound to this batch and list: the action is done before the next ones are there
                self._backend.together([partial(self._forward, batch, own)], alike=self._sharding is not None)
                for part in chain.from_iterable(self._ranks.all_gather(own)):
                    self.metrics.add(part.outputs, part.targets, part.weights)
                    total, weight = total + part.total, weight + part.weight
        self.weighed = weight > 0
        # what a function of a user's own gives may be another number each time: all ranks take that of the first
        result = {"loss": total / weight if weight else float("nan"), **self.metrics.result()}
        return self._ranks.broadcast(result)

    def _forward(self, batch: Batch, parts: list[_Part]) -> None:
        """Appends what comes of the rows of a batch, shard by shard."""
        to_host, objective, place = self._backend.to_host, self.objective, batch.place
        cuts = [(place, place + batch.n)] if self._sharding is None else self._sharding.leaves(batch.step_rows)
        for start, end in cuts:
            part = batch.part(start - place, end - place)
            objective.forget_loss()
            outputs = objective.forward(part)
            weights = None if part.weights is None else to_host(part.weights)
            total, weight = objective.sums()
            parts.append(_Part(to_host(outputs), to_host(part.targets), weights, total, weight))


class _Part(NamedTuple):
    """What comes of some rows, on the host; and the sums of their losses and weights."""

    outputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None
    total: float
    weight: float


def try_metrics(made: Mapping[str, Evaluator]) -> None:
    """Calls the metrics of a user's own once, on the first rows of each split, so that none fails after a training."""
    for evaluator in made.values():
        evaluator.try_metrics()


def evaluators(
    network: Network, loss: Loss, sources: Mapping[str, Source], config: Config, ranks: Ranks | None = None
) -> dict[str, Evaluator]:
    """An evaluator for each split, as a config wants them; of the training rows the first `TRAINING_ROWS` at most."""
    metrics, ranks, shards = config.train.metric_records(), ranks or Alone(), config.train.shards
    rows, sharding = min(EVALUATION_ROWS, max(source.n_rows for source in sources.values())), None
    if shards > 1:
        sharding = Sharding.of_rank(shards, EVALUATION_ROWS, ranks.rank, ranks.size)
        rows = sharding.largest_leaf(rows)
    objective = Objective(network, loss, rows, backward=False)
    objective.prepare()  # there may be no room for them later
    shared: Any = {"sharding": sharding, "ranks": ranks}
    return {
        name: Evaluator(objective, source, TRAINING_ROWS if name == "train" else None, metrics, **shared)
        for name, source in sources.items()
    }


def evaluate(made: Mapping[str, Evaluator]) -> dict[str, dict[str, Any]]:
    """What each says, and of how many rows."""
    return {name: {"rows": evaluator.rows, **evaluator()} for name, evaluator in made.items()}
