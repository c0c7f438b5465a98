"""Training: from a config to a trained network and its metrics.

source -> batches -> step: forward -> output delta -> backward -> update -> metrics
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import numpy as np

from gpu_bp.average import Average
from gpu_bp.backends import Backend
from gpu_bp.build import build_batches, build_network, build_objective, build_sharding
from gpu_bp.config import Config
from gpu_bp.config_schedule import PlateauSchedule
from gpu_bp.data import Dataset, load_data
from gpu_bp.data.classes import class_weights
from gpu_bp.data.sources import settle
from gpu_bp.divergence import diagnose, joined
from gpu_bp.errors import Diverged, UserError, unknown
from gpu_bp.evaluation import Evaluator, evaluate, evaluators, try_metrics
from gpu_bp.memory import refuse_too_large
from gpu_bp.model import Model
from gpu_bp.optimizer import Optimizer
from gpu_bp.ranks import Alone, Ranks
from gpu_bp.schedule import Schedule
from gpu_bp.selection import Selection
from gpu_bp.step import Step


class Trainer:
    """One training.

    Attributes:
        dataset: its data. where_data: a line that says how many rows, and where they lie.
        model: the network as it is now, and the preparation of its data.
        batches: the training rows, as they come. step: what a step does.
        total_steps: how many the whole training has. steps, rows: how many were taken, and their rows. epoch,
            epoch_step: of the next step, both from 0.
        stopped: why it ended before its length ("" where it did not); paused: it is not at its end, and can go on.
        rewinds: how often it went back after a divergence.
        exchange: what sums over the ranks; None where this is the only one.
        average: the moving average of the parameters, and selection: the best of them; None where not asked for.
    """

    def __init__(
        self, config: Config, backend: Backend, dataset: Dataset | None = None, ranks: Ranks | None = None
    ) -> None:
        self._ranks = ranks = ranks or Alone()
        if ranks.size > 1:  # where the rows lie says in which order they come
            backend.resident_bytes = min(ranks.all_gather(backend.resident_bytes))
        dataset = dataset or load_data(config, backend=backend)
        self.exchange = backend.exchange(ranks) if ranks.size > 1 else None  # before it is asked what is free
        refuse_too_large(config, dataset, backend, ranks)
        train, loss = config.train, config.loss.record()
        network = build_network(config, dataset, backend)
        self.config = config
        self.dataset = dataset
        self.model = Model(network, dataset.preparation, loss)
        sources, self.where_data = settle(backend, dataset.sources, config.data.residency, network.dtype, ranks)
        self._sharding = build_sharding(config, network, sources["train"], ranks)
        self._evaluators = evaluators(network, loss, sources, config, ranks)
        self.batches = build_batches(config, sources["train"], backend, network.dtype, self._sharding)
        per_epoch = self.batches.per_epoch
        self.total_steps = train.total_steps(per_epoch)
        # a line an epoch, and where the rows are seen once, a hundred
        self._log_every = train.log_every or (
            per_epoch if self.total_steps > per_epoch else -(-self.total_steps // 100)
        )
        if train.stop_at_errors is not None and dataset.task.kind == "regression":
            raise UserError("train.stop_at_errors needs a classification, and this is a regression; leave it out")
        record, n_rows = config.optimizer.record(), sources["train"].n_rows
        if record.full_batch and (self.batches.size < n_rows or train.sampling == "replacement"):
            raise UserError(
                f"{record.name} needs the gradient of all rows at each step: set train.batch_size = {n_rows} or more, "
                "and train.sampling to shuffled or ordered"
            )
        if record.full_batch and (config.schedule.kind != "constant" or config.schedule.warmup_steps):
            raise UserError(f"{record.name} changes its step sizes itself; leave schedule out")
        self.average = Average(network, train.average_decay) if train.average_decay else None
        self._averaged = evaluators(self.average.network, loss, sources, config, ranks) if self.average else {}
        self.step = self._build_step()
        self.selection = self._build_selection()
        try_metrics(self._evaluators)
        self.steps = self.rows = self.epoch = self.epoch_step = self.rewinds = 0
        self.seconds = 0.0
        self.stopped, self.paused = "", False
        # of what the ranks ask each other: after which step they last did, and when; and after which they do next
        self._asked, self._ask_at = (0, 0.0), 0

    def _build_step(self) -> Step:
        """The training step, with all that the config asks of it."""
        config, network = self.config, self.model.network
        asked = config.regularisation
        weights = config.loss.class_weight
        table = class_weights(weights, self.dataset) if weights else None
        objective = build_objective(config, network, self.batches.part_size, table)
        optimizer = Optimizer(
            config.optimizer.record(),
            network,
            self._build_schedule(),
            penalties=asked.penalties,
            biases=asked.biases,
        )
        return Step(
            objective,
            optimizer,
            clip_norm=asked.clip_norm,
            max_norm=asked.max_norm,
            average=self.average,
            sharding=self._sharding,
            exchange=self.exchange,
        )

    def _agreed(self, reason: str) -> str:
        """The reason to pause that any of the ranks has, the same on all of them.

        Where they need not wait for each other after each step, they ask again in a second or so.
        """
        if self._ranks.size == 1:
            return reason
        (before, then), now = self._asked, time.perf_counter()
        pace = (self.steps - before) / max(now - then, 1e-9)  # steps a second
        most = self.model.network.backend.read_every
        said = self._ranks.all_gather((reason, max(1, min(most, int(pace)))))
        self._asked, self._ask_at = (self.steps, now), self.steps + min(steps for _, steps in said)
        return next(filter(None, (each for each, _ in said)), "")

    def _build_schedule(self) -> Schedule:
        section = self.config.schedule
        if isinstance(section, PlateauSchedule):
            self._refuse_without_validation("schedule", section.metric)
        return section.over(self.config.optimizer.learning_rate, self.total_steps)

    def _build_selection(self) -> Selection | None:
        section = self.config.stopping
        if section is None:
            return None
        self._refuse_without_validation("stopping", section.metric)
        if section.metric.startswith("average_") and not self.average:
            raise UserError(f"stopping.metric is {section.metric}, and no average is kept; set train.average_decay")
        metrics, groups = self._evaluators["train"].metrics, self._groups()
        known = ["train_loss", *(f"{group}_{key}" for group in groups for key in ("loss", *metrics.keys))]
        if section.metric not in known:
            raise UserError(f"stopping.metric: {unknown('metric', section.metric, known)}")
        average = [self.average.network] if self.average else []
        rises = metrics.rises(section.metric.removeprefix("average_"))
        return Selection(section, rises, [self.model.network, *average])

    def _groups(self) -> dict[str, Evaluator]:
        """What a line of metrics has of the validation rows, by the first part of its keys."""
        made = {"validation": self._evaluators, "average_validation": self._averaged}
        return {name: splits["validation"] for name, splits in made.items() if "validation" in splits}

    def _refuse_without_validation(self, table: str, metric: str) -> None:
        if metric.removeprefix("average_").startswith("validation_") and "validation" not in self._evaluators:
            key = "a source of them" if self.config.data.kind == "own" else "data.validation_rows"
            raise UserError(
                f"{table}.metric is {metric}, and there are no validation rows; give {key}, "
                f'or set {table}.metric = "train_loss"'
            )

    def run(
        self, stop: Callable[[], str] = lambda: "", *, together: bool = False
    ) -> Generator[dict[str, Any] | None, None, None]:
        """Trains from where it is; yields None after a step, or a line of metrics where one is due.

        `stop` is asked after every step; where it gives a reason, the training pauses there: run again, here or from
        its state in another process, it goes on as if it had never stopped. With `together` a backend may take several
        steps at once where nothing is due between them (`Backend.steps_at_once`), and both come after these.

        Raises:
            Diverged: a loss or a gradient was not finite (at which step, where, and for which rows); the network is
                the one before that step.
        """
        optimizer, read_every = self.step.optimizer, self.model.network.backend.read_every
        free = self._free if together else lambda: 1
        begin, asked = time.perf_counter() - self.seconds, ""
        self._asked = self.steps, time.perf_counter()
        self._ask_at = self.steps + 1
        if self.paused:
            self.stopped, self.paused = "", False
        # where a training diverges it is told why; NumPy's warnings would only come before it
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            while self.steps < self.total_steps and not self.stopped:
                epoch, bad = self.epoch, None
                follows = self.total_steps - self.steps > self.batches.per_epoch - self.epoch_step
                for batch in self.batches.epoch(epoch, self.epoch_step, follows=follows, free=free):
                    before = self.steps
                    self.step(batch)
                    if not batch.last:
                        continue
                    self.rows += batch.step_rows * batch.steps
                    self.steps += batch.steps
                    self.go_to(epoch, self.epoch_step + batch.steps)
                    last, due = self.steps == self.total_steps, self.steps % self._log_every == 0
                    asked = asked or stop()
                    ask = last or due or self.steps >= self._ask_at or self._ranks.size == 1
                    reason = self._agreed(asked) if ask else ""
                    if last or due or reason or self.steps // read_every > before // read_every:
                        bad = self.step.diverged()  # waits for the device
                        if bad is not None:
                            break
                    self.seconds = time.perf_counter() - begin
                    line = self._line(epoch, optimizer.rate) if last or due else None
                    if line and due:  # not one that only ends the training
                        optimizer.schedule.observe(line)
                    if reason and not (last or self.stopped):
                        self.stopped, self.paused = reason, True
                    yield line
                    if line:
                        begin = time.perf_counter() - self.seconds  # what evaluation took is not training
                    if last or self.stopped:
                        break
                if bad is not None:
                    raise self._diverged_at(bad)

    def _free(self) -> int:
        """How many steps can be taken before something is to be done."""
        due = [every - self.steps % every for every in (self._log_every, self.config.checkpoint.every_steps) if every]
        return min(self.total_steps - self.steps, *due)

    def _diverged_at(self, step: int) -> Diverged:
        """Looks at a step that went wrong, the network being as it was before."""
        epoch, epoch_step = self._place_of(step)
        self.steps = step - 1
        batches = self.batches.epoch(epoch, epoch_step, follows=False)
        with closing(batches):
            found = diagnose(self.step.objective_of_parts, self.step.cut(batches), step)
        return Diverged(str(joined(self._ranks.all_gather(found))))

    def _place_of(self, step: int) -> tuple[int, int]:
        """The epoch and the step of the epoch, both from 0, of one of the steps taken, the first step being 1."""
        return divmod(
            self.epoch * self.batches.per_epoch + self.epoch_step - (self.steps - step) - 1, self.batches.per_epoch
        )

    def go_to(self, epoch: int, epoch_step: int) -> None:
        """The next step is this one of an epoch, both counted from 0, and the training's end follows from it."""
        if epoch_step >= self.batches.per_epoch:
            epoch, epoch_step = epoch + 1, 0
        self.epoch, self.epoch_step = epoch, epoch_step
        train = self.config.train
        if train.epochs:
            self.total_steps = self.steps + (train.epochs - epoch) * self.batches.per_epoch - epoch_step

    @property
    def step_rows(self) -> int:
        """Rows of a step; the last of an epoch may have fewer."""
        return self.batches.size

    def running_loss(self) -> float:
        """The mean training loss since the last line, NaN where there was no step. Waits for the device."""
        return self.step.objective.mean_loss(reset=False)

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """The loss and the metrics on each split that has rows.

        Raises:
            UserError: the last step has made the loss on the training rows infinite.
        """
        result = evaluate(self._evaluators)
        if self._evaluators["train"].weighed:
            self._refuse_divergence(result["train"]["loss"])
        return result

    def evaluate_average(self) -> dict[str, dict[str, Any]]:
        """Likewise of the averaged parameters; empty where there is no average."""
        return evaluate(self._averaged)

    def _refuse_divergence(self, loss: float) -> None:
        if not np.isfinite(loss):
            raise Diverged(
                f"the training diverged: the loss is {loss} at step {self.steps}; "
                "try a smaller optimizer.learning_rate or smaller network.weights"
            )

    def _line(self, epoch: int, rate: float) -> dict[str, Any]:
        """The line of metrics after a step of that epoch, taken at that rate; what it says may stop the training."""
        line: dict[str, Any] = {"epoch": epoch + 1, "step": self.steps, "rows": self.rows, "seconds": self.seconds}
        line |= {"learning_rate": rate, "train_loss": self.step.objective.mean_loss()}
        for group, evaluator in self._groups().items():
            line |= {f"{group}_{name}": value for name, value in evaluator().items()}
        limit = self.config.train.stop_at_errors
        if limit is not None:
            line["train_errors"] = self._evaluators["train"]()["errors"]
            if line["train_errors"] <= limit:
                self.stopped = "stop_at_errors"
        if self.selection and self.selection.observe(line):
            self.stopped = self.stopped or "patience"
        return line
