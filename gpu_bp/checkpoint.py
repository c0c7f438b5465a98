"""Checkpoints: all that a run needs to go on as if it had never stopped.

checkpoints/step-0000001200.json         the numbers, and the checksums; it is written last, and makes the checkpoint
checkpoints/step-0000001200.safetensors  the tensors

Both are written beside their place, brought to the disk and renamed, so that at any moment the folder holds whole
checkpoints; what does not agree with its checksum is never taken for one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError

from gpu_bp.config_types import Rows as Number
from gpu_bp.config_types import first_fault
from gpu_bp.data.identity import refuse_malformed
from gpu_bp.errors import UserError
from gpu_bp.plain_file import refuse_special
from gpu_bp.tensor_file import read_tensors, write_tensors
from gpu_bp.training_state import Record, Tensors, TrainingState
from gpu_bp.whole_file import flush_folder, write_whole

FOLDER = "checkpoints"


class MetricsMark(Record):
    """How far a file of metrics is: its length, and the CRC-32 of its bytes."""

    bytes: Number
    crc32: Number


class TensorFile(Record):
    """The file of a checkpoint's tensors."""

    name: str
    sha256: str


class Facts(Record):
    """The numbers of a checkpoint.

    training: the state itself. metrics: how far the file of metrics was. config, environment and data: of the
    training that wrote it, to be compared with those of the one that goes on.
    """

    format: Literal[1] = 1
    training: TrainingState
    metrics: MetricsMark
    config: dict[str, Any]
    environment: dict[str, Any]
    data: Annotated[dict[str, dict[str, int | str]], AfterValidator(refuse_malformed)]


class Index(Record):
    """What a checkpoint's JSON file says."""

    facts: Facts
    tensors: TensorFile


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    facts: Facts
    tensors: Tensors


class CheckpointFolder:
    """The checkpoints of a run: the newest `keep` of them, and where a metric selects the best, that one besides."""

    def __init__(self, run: Path, keep: int) -> None:
        self.path = run / FOLDER
        self._keep = keep
        self._held: dict[int, Index] = {}  # by step

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, None where there is none; those that are broken are told of."""
        found, self._held = None, {}
        for path in sorted(self.path.glob("step-*.json"), key=lambda path: (len(path.name), path.name), reverse=True):
            try:
                index = _read_index(path)
                found = found or Checkpoint(index.facts, self._read_tensors(index))
            except (UserError, OSError) as error:
                logging.getLogger("gpu_bp").warning(f"{_said(error, path)}; passing it over")
                continue
            self._held[index.facts.training.step] = index
        return found

    def any(self) -> bool:
        """Whether there is one, whole or not."""
        return any(self.path.glob("step-*.json"))

    def write(self, facts: Facts, tensors: Tensors) -> None:
        """Adds a checkpoint, and removes those that are not kept.

        Raises:
            OSError: it cannot be written (which file); those before are whole still.
        """
        if not self.path.is_dir():
            self.path.mkdir()
            flush_folder(self.path.parent)
        stem = f"step-{facts.training.step:010d}"
        path = self.path / f"{stem}.safetensors"
        for k in itertools.count(2):  # one that is there may belong to a checkpoint
            if not path.exists():
                break
            path = self.path / f"{stem}-{k}.safetensors"
        index = Index(facts=facts, tensors=TensorFile(name=path.name, sha256=write_tensors(path, tensors)))
        write_whole(self.path / f"{stem}.json", _render(index.model_dump(mode="json")))
        self._held[facts.training.step] = index
        self._remove_others()

    def _remove_others(self) -> None:
        steps = sorted(self._held, reverse=True)
        kept = {*steps[: self._keep], *self._best(steps)}
        self._held = {step: self._held[step] for step in kept}
        names = {name for step, index in self._held.items() for name in (f"step-{step:010d}.json", index.tensors.name)}
        others = [path for path in self.path.glob("step-*") if path.name not in names and not path.is_dir()]
        for path in sorted(others, key=lambda path: path.suffix != ".json"):  # without its numbers it is none
            path.unlink(missing_ok=True)
        flush_folder(self.path)

    def _best(self, steps: list[int]) -> list[int]:
        """Of these steps, the newest first, the one with the best line of metrics, by the newest one's metric."""
        selections = {step: self._held[step].facts.training.selection for step in reversed(steps)}
        newest = selections[steps[0]]
        scores = {
            step: its.last if its.rises else -its.last
            for step, its in selections.items()
            if its and newest and its.metric == newest.metric and its.last is not None
        }
        return [max(scores, key=scores.__getitem__)] if scores else []  # of equal ones the first

    def _read_tensors(self, index: Index) -> Tensors:
        path = self.path / Path(index.tensors.name).name
        if not path.is_file() or _digest(path) != index.tensors.sha256:
            raise UserError(
                f"checkpoint {path} is broken: {'its checksum is another' if path.exists() else 'it is gone'}"
            )
        return read_tensors(path)


def _read_index(path: Path) -> Index:
    """What a checkpoint's JSON file says, which is as it was written."""
    refuse_special(path)
    text = path.read_bytes()
    try:
        body = {key: value for key, value in json.loads(text).items() if key != "checksum"}
        if _render(body) != text:
            raise UserError(f"checkpoint {path} is broken: its checksum is another")
        return Index.model_validate(body)
    except UserError:
        raise
    except ValidationError as error:
        raise UserError(f"checkpoint {path} is broken: {first_fault(error)}") from None
    except (ValueError, AttributeError, RecursionError) as error:  # Unicode's and JSON's are ValueErrors
        raise UserError(f"checkpoint {path} is broken: {_first_line(error)}") from None


def _render(body: dict[str, Any]) -> bytes:
    """The JSON file, with the checksum of all else in it."""
    checksum = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({"checksum": checksum, **body}, indent=1, allow_nan=False) + "\n").encode()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _said(error: UserError | OSError, path: Path) -> str:
    return f"checkpoint {path}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
