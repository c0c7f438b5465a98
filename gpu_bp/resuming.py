"""Going on with a run: its newest whole checkpoint, and what must be as it was when that was written."""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_bp.checkpoint import CheckpointFolder
from gpu_bp.config import Config
from gpu_bp.config_file import dump_config
from gpu_bp.data.identity import changes as data_changes
from gpu_bp.environment import differences
from gpu_bp.errors import UserError, short
from gpu_bp.run_folder import RunFolder
from gpu_bp.tables import differing
from gpu_bp.trainer import Trainer
from gpu_bp.training_state import TrainingState, restore

# Tables and keys that say nothing of what is trained.
FREE = ("checkpoint", "train.max_minutes")
log = logging.getLogger("gpu_bp")


def plain(config: Config) -> dict[str, Any]:
    """The config in nested tables, as JSON holds them."""
    return _as_json(tomllib.loads(dump_config(config)))


def checkpoints_of(folder: RunFolder, config: Config) -> CheckpointFolder:
    """Where the checkpoints of a run are."""
    return CheckpointFolder(folder.path, config.checkpoint.keep)


def is_run(path: Path) -> bool:
    """Whether a run was begun in that folder: it has a config, or checkpoints, which hold it too."""
    return RunFolder(path).config_file.is_file() or CheckpointFolder(path, 1).any()


class Resuming:
    """A run that is gone on with.

    Args:
        folder: of the run, which nobody else writes to. config: of the training that goes on.
        allow_change: keys of the config, or tables, that may have changed.

    Raises:
        UserError: something else of the config has changed (what), or the config in the folder cannot be read; or there
            were checkpoints and none is whole: it would start from the beginning, and what it has would be lost.

    Attributes:
        changed: whether what is trained is another than before.
    """

    def __init__(self, folder: RunFolder, config: Config, allow_change: str | Sequence[str] = ()) -> None:
        self.folder = folder
        self.checkpoints = checkpoints_of(folder, config)
        self._allowed = (*FREE, *([allow_change] if isinstance(allow_change, str) else allow_change))
        self._checkpoint = self.checkpoints.newest()
        before = self._checkpoint.facts.config if self._checkpoint else _read(folder)
        changes = {
            key: f"{key} is {_said(was)} there, and {_said(now)} here"
            for key, (was, now) in differing(before, plain(config)).items()
        }
        self._changes = changes.keys()
        self.changed = any(not _is_among(key, FREE) for key in changes)
        self._refuse(changes, "was started with another config")
        if self._checkpoint is None and (folder.summary_file.exists() or self.checkpoints.any()):
            raise UserError(
                f"{folder.path} was trained, and has no whole checkpoint in {self.checkpoints.path}; put one back, or "
                "start again in another folder"
            )

    def restore(self, trainer: Trainer, described: Mapping[str, Any]) -> None:
        """Brings the trainer to where the run is, and the folder's files with it.

        `described`: the environment and the data of the training that goes on.

        Raises:
            UserError: the data have changed, or the checkpoint is of a network that is built in another way.
        """
        config, path = trainer.config, self.folder.path
        checkpoint, self._checkpoint = self._checkpoint, None  # its tensors are not kept beside the training
        if checkpoint is None:
            self.folder.begin(config)
            log.info(f"{path} has no checkpoint: starting from the beginning")
            return
        facts = checkpoint.facts
        changed = {key: f"{key}: {words}" for key, words in data_changes(facts.data, described["data"]).items()}
        self._refuse(changed, "was trained on other data")
        self.changed = self.changed or bool(changed)
        try:
            restore(trainer, self._still_true(facts.training), checkpoint.tensors)
        except UserError as error:
            raise UserError(
                f"{path} cannot be gone on with as it is now configured: {error}; start another run, whose "
                f'network.weights = {{ kind = "file", path = "{self.folder.model_file}" }} if the network is the same'
            ) from None
        if self.changed:
            trainer.stopped = ""  # what ended it may do so no more
        self.folder.begin(config, facts.metrics.bytes, facts.metrics.crc32)
        ended = trainer.steps >= trainer.total_steps or trainer.stopped
        log.info(f"{path} {'had ended' if ended else 'goes on'} at step {trainer.steps} of {trainer.total_steps}")
        free = ("threads",) if config.train.shards > 1 else ()
        if others := differences(facts.environment, described["environment"], free):
            log.warning(f"other than when it was stopped: {'; '.join(others)}: its last bits may be others too")

    def _still_true(self, state: TrainingState) -> TrainingState:
        """The state without what a plateau made of a metric or of a learning rate that is another one now."""
        schedule = state.schedule
        if schedule and "schedule.metric" in self._changes:
            schedule = schedule.model_copy(update={"best": None, "waited": 0})
        if "optimizer.learning_rate" in self._changes:
            schedule = None
        return state.model_copy(update={"schedule": schedule})

    def _refuse(self, changed: Mapping[str, str], what: str) -> None:
        """Raises UserError where something has changed that may not."""
        refused = [key for key in changed if not _is_among(key, self._allowed)]
        if refused:
            said = "; ".join(changed[key] for key in refused[:5]) + ("; ..." if refused[5:] else "")
            raise UserError(
                f"{self.folder.path} {what}: {said}; to go on with it all the same, say --allow-change "
                f"{' --allow-change '.join(refused)}"
            )


def _is_among(key: str, keys: Sequence[str]) -> bool:
    """Whether it is one of these keys, or of the tables among them."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _said(value: Any) -> str:
    return "not set" if value is None else short(value)


def _as_json(tables: Mapping[str, Any]) -> dict[str, Any]:
    """What TOML has and JSON has not becomes text: dates, and numbers that are not finite."""
    plain: dict[str, Any] = json.loads(json.dumps(tables, default=str), parse_constant=str)
    return plain


def _read(folder: RunFolder) -> dict[str, Any]:
    try:
        return _as_json(tomllib.loads(folder.config_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder.config_file} cannot be read: {' '.join(str(error).split())}") from None
