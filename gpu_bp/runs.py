"""`train` and `evaluate`: a training with its run folder, and the same run looked at again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpu_bp import evaluation
from gpu_bp.backends import Backend, select
from gpu_bp.checkpoint import CheckpointFolder
from gpu_bp.config import Config
from gpu_bp.config_file import load_config, parse_config
from gpu_bp.data import Dataset, load_data, own_data
from gpu_bp.data.identity import identity
from gpu_bp.data.source import Source
from gpu_bp.data.sources import settle
from gpu_bp.environment import environment
from gpu_bp.errors import Diverged, UserError
from gpu_bp.following import follow, may_go_back, refuse_other_data, refuse_unlike, tell_state, told
from gpu_bp.lock import Lock
from gpu_bp.memory import out_of_memory
from gpu_bp.model import Model
from gpu_bp.own import Piece
from gpu_bp.ranks import Alone, Ranks
from gpu_bp.resuming import Resuming, checkpoints_of, is_run, plain
from gpu_bp.run_folder import RunFolder
from gpu_bp.saving import Saving
from gpu_bp.trainer import Trainer
from gpu_bp.training_state import restore

log = logging.getLogger("gpu_bp")

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
    resume: bool = False,
    allow_change: str | Sequence[str] = (),
    pictures: bool = True,
    watch: Callable[[Trainer, Lines], Lines] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    ranks: Ranks | None = None,
) -> Result:
    """Trains the network of a config and leaves a run folder.

    Args:
        config: a `Config`, nested tables as in a config file, or the path of one.
        sources: of data of kind "own", by the name of the split: "train", and perhaps "validation" and "test";
            unless data.sources names them.
        backend: "auto", "numpy", "cupy", or a backend.
        run: the run folder; by default `runs/NAME-TIME`.
        resume: whether to go on from the newest whole checkpoint in that folder; where there is none, from the
            beginning.
        allow_change: keys of the config, or tables, that may be other ones than when the run was started; or a single
            one of them.
        pictures: whether to draw them.
        watch: is given the trainer and its steps to pass on, such as through a progress bar.
        interrupted: asked after every step; yes ends the training there, with everything written, to be resumed.
        ranks: the processes that train together, of which rank 0 has the run folder; by default this one is alone.

    Raises:
        UserError: anything that the user can mend.
    """
    begun = time.monotonic()
    config, ranks = _config(config), ranks or Alone()
    backend = _backend(backend, ranks.local_rank)
    refuse_unlike(config, environment(backend), ranks)
    limit, enough = config.train.max_minutes, False

    def stop() -> str:
        if interrupted() or enough:
            return "interrupted"
        return "max_minutes" if limit and time.monotonic() - begun >= 60 * limit else ""

    if ranks.rank:
        trainer = Trainer(config, backend, _dataset(config, sources, backend), ranks)
        refuse_other_data(identity(config, trainer.dataset), ranks)
        try:
            follow(trainer, stop, ranks)
        except MemoryError:
            raise out_of_memory(config, trainer.dataset, backend, trainer.steps + 1, ranks) from None
        summary, folder_of_0 = told(ranks)
        return Result(summary, trainer.model, folder_of_0, [])
    path = Path(run) if run is not None else None
    if resume and path is None:
        raise UserError("to resume, the run folder is needed: give run, on the command line --run")
    if path and not resume:
        RunFolder.refuse_used(path)  # before the data are read; the folder is made once all else is well
    with ExitStack() as held:
        resuming = None
        if resume and path and is_run(path):
            held.enter_context(Lock(path))
            resuming = Resuming(RunFolder(path), config, allow_change)
        trainer = Trainer(config, backend, _dataset(config, sources, backend), ranks)
        log.info(trainer.where_data)
        if trainer.exchange:
            log.info(f"gradients are summed {trainer.exchange.by}")
        described = {
            "config": plain(config),
            "environment": environment(backend),
            "data": identity(config, trainer.dataset),
        }
        refuse_other_data(described["data"], ranks)
        if resuming:
            folder, checkpoints = resuming.folder, resuming.checkpoints
            resuming.restore(trainer, described)
        else:
            folder = RunFolder.make(config.name, path)
            held.enter_context(Lock(folder.path))
            RunFolder.refuse_used(folder.path)
            folder.begin(config)
            checkpoints = checkpoints_of(folder, config)
            if resume:
                log.info(f"{path} has no checkpoint: starting from the beginning")
        saving = held.enter_context(closing(Saving(trainer, folder, checkpoints, described)))
        if resuming and resuming.changed:
            saving.save()  # a change was allowed once, and need not be again
        tell_state(trainer, ranks)
        steps = held.enter_context(closing(_steps(trainer, folder, checkpoints, saving, stop, ranks)))

        def watched() -> Lines:
            nonlocal enough
            yield from watch(trainer, steps) if watch else steps
            if trainer.steps < trainer.total_steps and not trainer.stopped:  # who watches wants no more of it
                if ranks.size > 1:
                    enough = True
                    yield from steps  # until all of them know
                    return
                trainer.stopped, trainer.paused = "interrupted", True
                saving.finish()

        result = _run(trainer, folder, watched(), pictures, ranks)
        ranks.broadcast((result.summary, result.folder))
        return result


def resume(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    own: Sequence[Piece] = (),
    trust_code: bool = False,
    **keywords: Any,
) -> Result:
    """Goes on with a run from its newest whole checkpoint, with the config in its folder.

    Args:
        run: the run folder. overrides: `KEY.PATH=VALUE`; what changes has to be in `allow_change` too.
        own: pieces of one's own that the run names, passed again.
        trust_code: whether code that the run names as `module:object` may be run.
        keywords: as for `train`.

    Raises:
        UserError: it is no run folder, or as `train`.
    """
    folder = RunFolder(Path(run))
    if not folder.config_file.is_file():
        raise UserError(f"{run} is not a run folder: it has no {folder.config_file.name}")
    config = load_config(folder.config_file, overrides, own=own, trust_code=trust_code)
    return train(config, run=run, resume=True, **keywords)


def _run(trainer: Trainer, folder: RunFolder, steps: Lines, pictures: bool, ranks: Ranks) -> Result:
    """Takes the steps, and leaves in the folder what came of them."""
    config, backend, saved = trainer.config, trainer.model.network.backend, 0
    try:
        for _ in steps:
            pass
        saved = _save(trainer, folder)  # before the evaluation, which may meet a broken row
        evaluated = trainer.evaluate()
        if trainer.average:
            evaluated["average"] = trainer.evaluate_average()
    except UserError as error:
        saved = saved or _save(trainer, folder)
        kept = f", its network after {saved} steps in {folder.model_file}" if saved else ""
        raise UserError(f"{error} (its metrics are in {folder.metrics_file}{kept})") from None
    except MemoryError:  # CuPy's is one too; the checkpoints are as they were
        raise out_of_memory(config, trainer.dataset, backend, trainer.steps + 1, ranks) from None
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
        "rows_per_second": trainer.rows / trainer.seconds if trainer.seconds else 0.0,
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


def _steps(
    trainer: Trainer,
    folder: RunFolder,
    checkpoints: CheckpointFolder,
    saving: Saving,
    stop: Callable[[], str],
    ranks: Ranks,
) -> Generator[dict[str, Any] | None, None, None]:
    """The trainer's steps, with metrics and checkpoints written; where it diverges, it may go back to the last one."""
    if trainer.config.train.on_divergence == "rewind" and not trainer.steps:
        saving.save()
    while True:
        steps = trainer.run(stop, together=True)
        try:
            for line in steps:
                if line:
                    folder.add_metrics(line)
                with _known_here_alone(ranks):
                    saving.after_step()
                yield line
            with _known_here_alone(ranks):
                saving.finish()
            return
        except Diverged as error:
            _go_back(trainer, folder, checkpoints, saving, error)
            tell_state(trainer, ranks)
        finally:
            steps.close()


@contextmanager
def _known_here_alone(ranks: Ranks) -> Iterator[None]:
    """Parameters to be saved may show a divergence before the loss does; then other ranks know nothing of it."""
    try:
        yield
    except Diverged as error:
        if ranks.size == 1:
            raise
        raise UserError(str(error)) from None


def _go_back(
    trainer: Trainer, folder: RunFolder, checkpoints: CheckpointFolder, saving: Saving, error: Diverged
) -> None:
    """Brings a training that diverged to its last checkpoint; raises the error where it may not go back."""
    train = trainer.config.train
    try:
        saving.wait()
    except Diverged as earlier:  # parameters that were to be saved, some steps before the loss showed it
        error = earlier
    good = checkpoints.newest() if may_go_back(trainer) else None
    if good is None:
        raise error
    went_back = trainer.rewinds + 1
    restore(trainer, good.facts.training, good.tensors)
    folder.begin(trainer.config, good.facts.metrics.bytes, good.facts.metrics.crc32)
    saving.begin()
    trainer.rewinds, trainer.step.optimizer.rate_factor = went_back, 0.5**went_back
    log.warning(
        f"{error}; going back to step {trainer.steps} at half the learning rate, {went_back} of "
        f"{train.max_rewinds} times at most"
    )


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
    return evaluation.evaluate(evaluation.evaluators(network, loss, sources, config))


def _dataset(config: Config, sources: Mapping[str, Source] | None, backend: Backend) -> Dataset | None:
    """The data of sources that were given; None where they are to be loaded."""
    if sources is None:
        return None
    if config.data.kind != "own":
        raise UserError(f"sources are given, so data.kind must be own, not {config.data.kind}")
    if config.data.sources is not None:
        raise UserError("sources are given twice: leave out data.sources, or those given from Python")
    return own_data(sources, config.loss.record(), backend)


def _config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    if isinstance(config, str | Path):
        return load_config(config)
    if isinstance(config, Mapping):
        return parse_config(config)
    if isinstance(config, Config):
        return config
    raise TypeError(f"config must be a Config, nested tables or a path, not {type(config).__name__}")


def _backend(backend: str | Backend, local_rank: int = 0) -> Backend:
    """A backend by name; which one `auto` took, and why, is logged."""
    if not isinstance(backend, str):
        return backend
    chosen, why = select(backend, local_rank)
    log.info(why)
    return chosen
