"""Training: from a config to a trained network and its metrics.

source -> batches -> step: forward -> output delta -> backward -> update -> metrics
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from gpu_bp.backends import Backend
from gpu_bp.config import Config
from gpu_bp.config_schedule import FactorSchedule, LinearSchedule
from gpu_bp.data import Dataset, load_data
from gpu_bp.data.batches import Batches
from gpu_bp.data.source import Source
from gpu_bp.data.sources import settle
from gpu_bp.data.task import Metrics
from gpu_bp.errors import UserError
from gpu_bp.initial import initialise
from gpu_bp.model import Model
from gpu_bp.network import Network
from gpu_bp.optimizer import Optimizer
from gpu_bp.schedule import Schedule, by_step, constant, exponential, linear
from gpu_bp.spec import Loss
from gpu_bp.step import Objective, Step

# Rows that are evaluated at a time; fixed, so that the same network always gives the same figures.
EVALUATION_ROWS = 4096
# Training rows that are evaluated, at most: a pass over all may take as long as the training.
TRAINING_ROWS = 2**17


def build_network(config: Config, dataset: Dataset, backend: Backend, dtype: str | None = None) -> Network:
    """The network of a config for its data, with its initial parameters.

    Raises:
        UserError: the loss does not go with so many targets, or a file of weights does not fit.
    """
    try:
        n_outputs = config.loss.record().n_outputs(dataset.n_targets)
    except ValueError as error:
        raise UserError(f"loss.kind: {error}") from None
    network = Network(
        [dataset.n_inputs, *config.network.hidden, n_outputs],
        [*config.network.hidden_activations(), config.output_activation()],
        biases=config.network.biases,
        backend=backend,
        dtype=dtype or config.train.precision,
    )
    initialise(network, config.network.weights, config.seed)
    return network


class Evaluator:
    """The loss and the metrics of a network on the first rows of a source: on `rows` of them.

    Args:
        most: rows, at most, rounded up to whole blocks of `EVALUATION_ROWS`.
    """

    def __init__(self, network: Network, loss: Loss, source: Source, most: int | None = None) -> None:
        self._backend = network.backend
        self._task = source.task
        self._loss = loss
        self._batches = Batches(network.backend, source, EVALUATION_ROWS, "ordered", seed=0, dtype=network.dtype)
        self._objective = Objective(network, loss, self._batches.size, backward=False)
        self._steps = min(self._batches.per_epoch, -(-(most or source.n_rows) // self._batches.size))
        self.rows = min(source.n_rows, self._steps * self._batches.size)

    def __call__(self) -> dict[str, Any]:
        """`loss`, the mean over the rows, and the task's metrics. Waits for the device."""
        metrics = Metrics(self._task, self._loss)
        with np.errstate(over="ignore", invalid="ignore"):  # where a loss is not finite, the caller sees it
            for batch in islice(self._batches.epoch(0, follows=False), self._steps):
                outputs = self._objective.forward(batch)
                metrics.add(self._backend.to_host(outputs), self._backend.to_host(batch.targets))
            return {"loss": self._objective.mean_loss(), **metrics.result()}


def evaluators(network: Network, loss: Loss, sources: Mapping[str, Source]) -> dict[str, Evaluator]:
    """An evaluator for each split; of the training rows the first `TRAINING_ROWS` at most."""
    return {
        name: Evaluator(network, loss, source, TRAINING_ROWS if name == "train" else None)
        for name, source in sources.items()
    }


class Trainer:
    """One training.

    Attributes:
        dataset: its data. where_data: a line that says how many rows, and where they lie.
        model: the network as it is now, and the preparation of its data.
        total_steps: how many steps the whole training has. steps, rows: how many were taken, and their rows.
        stopped: why it ended before its length ("" where it did not).
    """

    def __init__(self, config: Config, backend: Backend, dataset: Dataset | None = None) -> None:
        dataset = dataset or load_data(config, backend=backend)
        train, loss = config.train, config.loss.record()
        network = build_network(config, dataset, backend)
        self.config = config
        self.dataset = dataset
        self.model = Model(network, dataset.preparation, loss)
        data = config.data
        sources, self.where_data = settle(backend, dataset.sources, data.residency, network.dtype)
        self._evaluators = evaluators(network, loss, sources)
        self._batches = Batches(
            backend,
            sources["train"],
            train.batch_size,
            train.sampling,
            config.seed,
            dtype=network.dtype,
            block_rows=data.block_rows,
            window_blocks=data.window_blocks,
        )
        per_epoch = self._batches.per_epoch
        self.total_steps = train.steps or (train.epochs or 0) * per_epoch
        # a line an epoch, and where the rows are seen once, a hundred
        self._log_every = train.log_every or (
            per_epoch if self.total_steps > per_epoch else -(-self.total_steps // 100)
        )
        if train.stop_at_errors is not None and dataset.task.kind == "regression":
            raise UserError("train.stop_at_errors needs a classification, and this is a regression; leave it out")
        record, n_rows = config.optimizer.record(), sources["train"].n_rows
        if record.full_batch and (self._batches.size < n_rows or train.sampling == "replacement"):
            raise UserError(
                f"{record.name} needs the gradient of all rows at each step: set train.batch_size = {n_rows} or more, "
                "and train.sampling to shuffled or ordered"
            )
        if record.full_batch and config.schedule.kind != "constant":
            raise UserError(f"{record.name} changes its step sizes itself; leave schedule out")
        optimizer = Optimizer(record, network, _schedule(config, self.total_steps))
        self._step = Step(Objective(network, loss, self._batches.size), optimizer)
        self.steps = self.rows = 0
        self.seconds = 0.0
        self.stopped = ""

    def run(self, interrupted: Callable[[], bool] = lambda: False) -> Generator[dict[str, Any] | None, None, None]:
        """Trains; yields None after a step, and a line of metrics where one is due.

        `interrupted` is asked after every step; where it says yes, the training ends as at its last step.

        Raises:
            UserError: the training loss is no longer finite.
        """
        objective, optimizer = self._step.objective, self._step.optimizer
        begin = time.perf_counter() - self.seconds
        epoch = 0
        # where a training diverges, its loss says so; NumPy's warnings would only come before it
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            while self.steps < self.total_steps and not self.stopped:
                follows = (epoch + 1) * self._batches.per_epoch < self.total_steps
                for batch in self._batches.epoch(epoch, follows=follows):
                    rate = optimizer.learning_rate
                    self._step(batch)
                    self.steps += 1
                    self.rows += batch.n
                    if interrupted():
                        self.stopped = "interrupted"
                    last = self.steps == self.total_steps or bool(self.stopped)
                    if self.steps % self._log_every and not last:
                        yield None
                        continue
                    line: dict[str, Any] = {"epoch": epoch + 1, "step": self.steps, "rows": self.rows}
                    train_loss = objective.mean_loss()
                    self.seconds = time.perf_counter() - begin
                    line |= {"seconds": self.seconds, "learning_rate": rate, "train_loss": train_loss}
                    yield line | self._evaluate_line()
                    self._refuse_divergence(train_loss)
                    begin = time.perf_counter() - self.seconds  # what evaluation took is not training
                    if last or self.stopped:
                        break
                epoch += 1

    def running_loss(self) -> float:
        """The mean training loss since the last line, NaN where there was no step. Waits for the device."""
        return self._step.objective.mean_loss(reset=False)

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """The loss and the task's metrics on each split that has rows.

        Raises:
            UserError: the last step has made the loss on the training rows infinite.
        """
        result = {name: {"rows": evaluator.rows, **evaluator()} for name, evaluator in self._evaluators.items()}
        self._refuse_divergence(result["train"]["loss"])
        return result

    def _refuse_divergence(self, loss: float) -> None:
        if not np.isfinite(loss):
            raise UserError(
                f"the training diverged: the loss is {loss} at step {self.steps}; "
                "try a smaller optimizer.learning_rate or smaller network.weights"
            )

    def _evaluate_line(self) -> dict[str, Any]:
        """What a line of metrics says beside the training loss."""
        line: dict[str, Any] = {}
        if "validation" in self._evaluators:
            line = {f"validation_{name}": value for name, value in self._evaluators["validation"]().items()}
        limit = self.config.train.stop_at_errors
        if limit is not None:
            line["train_errors"] = self._evaluators["train"]()["errors"]
            if line["train_errors"] <= limit:
                self.stopped = self.stopped or "stop_at_errors"
        return line


def _schedule(config: Config, total_steps: int) -> Schedule:
    rate, section = config.optimizer.learning_rate, config.schedule
    if isinstance(section, LinearSchedule):
        return linear(rate, section.final, section.steps or total_steps)
    if isinstance(section, FactorSchedule):
        return (exponential if section.kind == "exponential" else by_step)(rate, section.factor, section.every)
    return constant(rate)
