"""`train` and `evaluate`: a training with its run folder, and the same run looked at again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpu_bp.backends import Backend, select
from gpu_bp.config import Config
from gpu_bp.config_file import load_config, parse_config
from gpu_bp.data import Dataset, load_data, own_data
from gpu_bp.data.source import Source
from gpu_bp.data.sources import settle
from gpu_bp.errors import UserError
from gpu_bp.model import Model
from gpu_bp.run_folder import RunFolder
from gpu_bp.trainer import Trainer, evaluators

Lines = Iterable[dict[str, Any] | None]


@dataclass(frozen=True)
class Result:
    """What a training gives: its summary (as in summary.json), its model, its folder, and the pictures in it."""

    summary: dict[str, Any]
    model: Model
    folder: Path
    pictures: list[Path]


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    sources: Mapping[str, Source] | None = None,
    backend: str | Backend = "auto",
    run: str | Path | None = None,
    pictures: bool = True,
    watch: Callable[[Trainer, Lines], Lines] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains the network of a config and leaves a run folder.

    Args:
        config: a `Config`, nested tables as in a config file, or the path of one.
        sources: of data of kind "own", by the name of the split: "train", and perhaps "validation" and "test".
        backend: "auto", "numpy", "cupy", or a backend.
        run: the run folder; by default `runs/NAME-TIME`.
        pictures: whether to draw them.
        watch: is given the trainer and its steps to pass on, such as through a progress bar.
        interrupted: asked after every step; yes ends the training, with everything written.

    Raises:
        UserError: anything that the user can mend.
    """
    if isinstance(config, str | Path):
        config = load_config(config)
    elif isinstance(config, Mapping):
        config = parse_config(config)
    elif not isinstance(config, Config):
        raise TypeError(f"config must be a Config, nested tables or a path, not {type(config).__name__}")
    backend = _backend(backend)
    path = Path(run) if run is not None else None
    if path:
        RunFolder.refuse_used(path)  # before the data are read; the folder is made once all else is well
    trainer = Trainer(config, backend, _dataset(config, sources, backend))
    logging.getLogger("gpu_bp").info(trainer.where_data)
    folder = RunFolder.create(config, path)
    steps = trainer.run(interrupted)
    try:
        for line in watch(trainer, steps) if watch else steps:
            if line is not None:
                folder.add_metrics(line)
        _save(trainer, folder)  # before the evaluation, which may meet a broken row
        evaluated = trainer.evaluate()
    except UserError as error:
        kept = f", its network after {trainer.steps} steps in {folder.model_file}" if _save(trainer, folder) else ""
        raise UserError(f"{error} (its metrics are in {folder.metrics_file}{kept})") from None
    finally:
        steps.close()  # nothing is read ahead any more
    summary = {
        "name": config.name,
        "seed": config.seed,
        "backend": backend.name,
        "device": backend.device,
        "precision": config.train.precision,
        "data": trainer.where_data.removeprefix("data: "),
        "steps": trainer.steps,
        "rows": trainer.rows,
        "seconds": trainer.seconds,
        "rows_per_second": trainer.rows / trainer.seconds,
        "stopped": trainer.stopped,
        **evaluated,
    }
    folder.write_summary(summary)
    drawn: list[Path] = []
    if pictures:
        from gpu_bp.report import draw  # late: it takes matplotlib along

        drawn = draw(folder, trainer.model, trainer.dataset)
    return Result(summary, trainer.model, folder.path, drawn)


def _save(trainer: Trainer, folder: RunFolder) -> bool:
    """Saves the network, unless there is none worth it: no step was taken, or the training diverged."""
    network = trainer.model.network
    worth = trainer.steps > 0 and bool(np.isfinite(network.backend.to_host(network.parameters)).all())
    if worth:
        trainer.model.save(folder.model_file)
    return worth


def evaluate(
    run: str | Path, *, sources: Mapping[str, Source] | None = None, backend: str | Backend = "auto"
) -> dict[str, dict[str, Any]]:
    """The loss and the metrics of a run's model on each of its splits, computed again from its data.

    Args:
        run: the run folder.
        sources: of data of kind "own", as for `train`.
        backend: "auto", "numpy", "cupy", or a backend.

    Raises:
        UserError: not a run folder, or its data are gone.
    """
    backend = _backend(backend)
    folder = RunFolder.open(Path(run))
    model, config = Model.load(folder.model_file, backend), folder.config()
    dataset = _dataset(config, sources, backend) or load_data(config, model.preparation, backend=backend)
    loss, widths = config.loss.record(), model.network.widths
    n_outputs = loss.groups * dataset.n_targets
    if [dataset.n_inputs, n_outputs] != [widths[0], widths[-1]]:
        raise UserError(
            f"{folder.model_file} takes {widths[0]} inputs and gives {widths[-1]} outputs; "
            f"the data and the loss of {folder.config_file} need {dataset.n_inputs} inputs and {n_outputs} outputs"
        )
    sources, _ = settle(backend, dataset.sources, config.data.residency, model.network.dtype)
    made = evaluators(model.network, loss, sources)
    return {name: {"rows": evaluator.rows, **evaluator()} for name, evaluator in made.items()}


def _dataset(config: Config, sources: Mapping[str, Source] | None, backend: Backend) -> Dataset | None:
    """The data of sources that were given; None where they are to be loaded."""
    if sources is None:
        return None
    if config.data.kind != "own":
        raise UserError(f"sources are given, so data.kind must be own, not {config.data.kind}")
    return own_data(sources, config.loss.record(), backend)


def _backend(backend: str | Backend) -> Backend:
    """A backend by name; which one `auto` took, and why, is logged."""
    if not isinstance(backend, str):
        return backend
    chosen, why = select(backend)
    logging.getLogger("gpu_bp").info(why)
    return chosen
