"""`train` and `evaluate`: a training with its run folder, and the same run looked at again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpu_bp import evaluation
from gpu_bp.backends import Backend, select
from gpu_bp.config import Config
from gpu_bp.config_file import load_config, parse_config
from gpu_bp.data import Dataset, load_data, own_data
from gpu_bp.data.source import Source
from gpu_bp.data.sources import settle
from gpu_bp.errors import UserError
from gpu_bp.model import Model
from gpu_bp.own import Piece
from gpu_bp.run_folder import RunFolder
from gpu_bp.trainer import Trainer

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
        sources: of data of kind "own", by the name of the split: "train", and perhaps "validation" and "test";
            unless data.sources names them.
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
    steps, saved = trainer.run(interrupted), 0
    try:
        for line in watch(trainer, steps) if watch else steps:
            if line is not None:
                folder.add_metrics(line)
        saved = _save(trainer, folder)  # before the evaluation, which may meet a broken row
        evaluated = trainer.evaluate()
        if trainer.average:
            evaluated["average"] = trainer.evaluate_average()
    except UserError as error:
        saved = saved or _save(trainer, folder)
        kept = f", its network after {saved} steps in {folder.model_file}" if saved else ""
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
        **({"best": trainer.selection.best} if trainer.selection else {}),
        **evaluated,
    }
    folder.write_summary(summary)
    drawn: list[Path] = []
    if pictures:
        from gpu_bp.report import draw  # late: it takes matplotlib along

        drawn = draw(folder, trainer.model, trainer.dataset)
    return Result(summary, trainer.model, folder.path, drawn)


def _save(trainer: Trainer, folder: RunFolder) -> int:
    """Saves the network, unless there is none worth it: no step was taken, or the training diverged.

    Where the best is selected, the last is saved beside it, and the network is the best from then on.

    Returns:
        how many steps the network saved as the run's has taken, 0 where there is none.
    """
    network, steps = trainer.model.network, trainer.steps
    if not np.isfinite(network.backend.to_host(network.parameters)).all():
        steps = 0
    if trainer.selection:
        if steps:
            trainer.model.save(folder.last_file)
        steps = trainer.selection.restore() or steps
    if steps:
        trainer.model.save(folder.model_file)
        if trainer.average:
            replace(trainer.model, network=trainer.average.network).save(folder.average_file)
    return steps


def evaluate(
    run: str | Path,
    *,
    model: str = "model",
    sources: Mapping[str, Source] | None = None,
    own: Sequence[Piece] = (),
    trust_code: bool = False,
    backend: str | Backend = "auto",
) -> dict[str, dict[str, Any]]:
    """The loss and the metrics of a run's model on each of its splits, computed again from its data.

    Args:
        run: the run folder.
        model: "model"; or "last" (of a run with [stopping]) or "average" (with train.average_decay).
        sources: of data of kind "own", as for `train`.
        own: pieces of one's own that the run names, passed again.
        trust_code: whether code that the run names as `module:object` may be run.
        backend: "auto", "numpy", "cupy", or a backend.

    Raises:
        UserError: not a run folder, its data are gone, or it names code that is not trusted.
    """
    backend = _backend(backend)
    folder = RunFolder.open(Path(run))
    config = folder.config(own=own, trust_code=trust_code)
    file, loss = folder.model(model), config.loss.record()
    loaded = Model.load(file, backend, own=own, trust_code=trust_code)
    dataset = _dataset(config, sources, backend) or load_data(config, loaded.preparation, backend=backend)
    network, n_outputs = loaded.network, loss.groups * dataset.n_targets
    if [dataset.n_inputs, n_outputs] != [network.widths[0], network.widths[-1]]:
        raise UserError(
            f"{file} takes {network.widths[0]} inputs and gives {network.widths[-1]} outputs; "
            f"the data and the loss of {folder.config_file} need {dataset.n_inputs} inputs and {n_outputs} outputs"
        )
    sources, _ = settle(backend, dataset.sources, config.data.residency, network.dtype)
    return evaluation.evaluate(evaluation.evaluators(network, loss, sources, config.train.metric_records()))


def _dataset(config: Config, sources: Mapping[str, Source] | None, backend: Backend) -> Dataset | None:
    """The data of sources that were given; None where they are to be loaded."""
    if sources is None:
        return None
    if config.data.kind != "own":
        raise UserError(f"sources are given, so data.kind must be own, not {config.data.kind}")
    if config.data.sources is not None:
        raise UserError("sources are given twice: leave out data.sources, or those given from Python")
    return own_data(sources, config.loss.record(), backend)


def _backend(backend: str | Backend) -> Backend:
    """A backend by name; which one `auto` took, and why, is logged."""
    if not isinstance(backend, str):
        return backend
    chosen, why = select(backend)
    logging.getLogger("gpu_bp").info(why)
    return chosen
