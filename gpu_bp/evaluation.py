"""How well a network does: its loss and metrics on the splits of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from gpu_bp.config import Config
from gpu_bp.data.batches import Batches
from gpu_bp.data.source import Batch, Source
from gpu_bp.metrics import Metric, Metrics
from gpu_bp.network import Network
from gpu_bp.objective import Objective
from gpu_bp.spec import Array, Loss

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
        alike: with the same bits however many threads there are.

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
        alike: bool = False,
    ) -> None:
        network, loss = objective.network, objective.loss
        self._backend = network.backend
        self.objective = objective
        self._alike = alike
        self.metrics = Metrics(source.task, source.n_targets, metrics, weighted=source.weighted, loss=loss)
        self.batches = Batches(network.backend, source, EVALUATION_ROWS, "ordered", seed=0, dtype=network.dtype)
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
        to_host = self._backend.to_host
        with np.errstate(over="ignore", invalid="ignore"):  # where a loss is not finite, the caller sees it
            for batch in islice(self.batches.epoch(0, follows=False), steps):
                outputs = self._outputs(batch)
                weights = None if batch.weights is None else to_host(batch.weights)
                self.metrics.add(to_host(outputs), to_host(batch.targets), weights)
        result = {"loss": self.objective.mean_loss(), **self.metrics.result()}
        self.weighed = self.objective.weighed
        return result

    def _outputs(self, batch: Batch) -> Array:
        outputs: list[Array] = []
        self._backend.together([lambda: outputs.append(self.objective.forward(batch))], alike=self._alike)
        return outputs[0]


def try_metrics(made: Mapping[str, Evaluator]) -> None:
    """Calls the metrics of a user's own once, on the first rows of each split, so that none fails after a training."""
    for evaluator in made.values():
        evaluator.try_metrics()


def evaluators(network: Network, loss: Loss, sources: Mapping[str, Source], config: Config) -> dict[str, Evaluator]:
    """An evaluator for each split, as a config wants them; of the training rows the first `TRAINING_ROWS` at most."""
    metrics, alike = config.train.metric_records(), config.train.shards > 1
    rows = min(EVALUATION_ROWS, max(source.n_rows for source in sources.values()))
    objective = Objective(network, loss, rows, backward=False)
    objective.prepare()  # there may be no room for them later
    return {
        name: Evaluator(objective, source, TRAINING_ROWS if name == "train" else None, metrics, alike=alike)
        for name, source in sources.items()
    }


def evaluate(made: Mapping[str, Evaluator]) -> dict[str, dict[str, Any]]:
    """What each says, and of how many rows."""
    return {name: {"rows": evaluator.rows, **evaluator()} for name, evaluator in made.items()}
