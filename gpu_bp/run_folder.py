"""The folder of a run: what a training leaves behind, and how it is read again.

config.toml        the whole config, with absolute paths: it trains the same again
metrics.jsonl      a line an epoch, or every `train.log_every` steps
summary.json       how the run ended, and the metrics on each split
model.safetensors  the network and the preparation of its data; with [stopping], as it was at its best
last.safetensors   with [stopping], the network as the last step left it
average.safetensors  with train.average_decay, the moving average of its parameters (at that best, likewise)
*.png              pictures
checkpoints/       what the run is gone on with after it was stopped (see `checkpoint.py`)
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import zlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gpu_bp.config import Config
from gpu_bp.config_file import dump_config, load_config
from gpu_bp.errors import UserError, unknown
from gpu_bp.lock import LOCK
from gpu_bp.own import Piece
from gpu_bp.whole_file import SUFFIX, flush_folder, named, write_whole

MODELS = ("model", "last", "average")


class RunFolder:
    """A run folder: `make` a new one and `begin` a run in it, or `open` one that has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.metrics_bytes = self.metrics_crc32 = 0  # of the lines of this run, since `begin`
        self.model_file, self.last_file, self.average_file = (path / f"{name}.safetensors" for name in MODELS)

    @classmethod
    def make(cls, name: str, path: Path | None = None) -> RunFolder:
        """A folder for a run of that name; by default a new one, `runs/NAME-TIME`. Raises OSError."""
        if path is None:
            return cls(_fresh(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}"))
        path.mkdir(parents=True, exist_ok=True)
        flush_folder(path.parent)
        return cls(path)

    def begin(self, config: Config, metrics_bytes: int = 0, metrics_crc32: int = 0) -> None:
        """Writes the config, and cuts the metrics to so many bytes: to what stands before the first step to come.

        Raises:
            UserError: there are not so many, or others.
        """
        if self._crc32_of_metrics(metrics_bytes) != metrics_crc32:
            raise UserError(
                f"{self.metrics_file} has not the lines that it had when the checkpoint was written; "
                "put the file back, or start again in another folder"
            )
        write_whole(self.config_file, dump_config(config))  # first: a folder with anything else in it is not a new one
        with self.metrics_file.open("ab") as file:
            file.truncate(metrics_bytes)
        flush_folder(self.path)
        self.metrics_bytes, self.metrics_crc32 = metrics_bytes, metrics_crc32

    def _crc32_of_metrics(self, n: int) -> int | None:
        """Of the first n bytes; None where there are not so many."""
        crc32 = 0
        if n and self.metrics_file.is_file():
            with self.metrics_file.open("rb") as file:
                while n and (part := file.read(min(n, 2**20))):
                    crc32, n = zlib.crc32(part, crc32), n - len(part)
        return None if n else crc32

    @staticmethod
    def refuse_used(path: Path) -> None:
        """Raises UserError where there are files in the folder: a run never overwrites another."""
        if path.exists() and not path.is_dir():
            raise UserError(f"run folder {path} is a file; choose another name with --run")
        if path.is_dir() and any(file.name != LOCK and file.suffix != SUFFIX for file in path.iterdir()):
            raise UserError(f"run folder {path} is not empty; choose another one with --run, or remove it")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of a run that has ended.

        Raises:
            UserError: it is not one (what is missing).
        """
        folder = cls(path)
        if not path.is_dir():
            what = "it is a file" if path.exists() else "there is no such folder"
            raise UserError(f"{path} is not a run folder: {what}")
        if not folder.config_file.is_file():
            raise UserError(f"{path} is not a run folder: it has no {folder.config_file.name}")
        if not folder.model_file.is_file():
            raise UserError(
                f"{path} has no {folder.model_file.name}: its run has not ended; gpu-bp resume {path} goes on with it"
            )
        return folder

    def model(self, name: str) -> Path:
        """The file of one of the `MODELS`.

        Raises:
            UserError: no such model, or this run has none.
        """
        if name not in MODELS:
            raise unknown("model", name, MODELS)
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            need = {"last": "[stopping]", "average": "train.average_decay"}[name]
            raise UserError(f"{self.path} has no {file.name}: only a run with {need} in its config has one")
        return file

    def config(self, *, own: Sequence[Piece] = (), trust_code: bool = False) -> Config:
        """The config of the run. Raises UserError as `load_config`, such as where it names code that is not trusted."""
        return load_config(self.config_file, own=own, trust_code=trust_code)

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Appends a line of metrics, whole or not at all. Raises OSError where it cannot be."""
        text = (json.dumps(finite(line), allow_nan=False) + "\n").encode()
        with named(self.metrics_file), self.metrics_file.open("ab", buffering=0) as file:
            length = file.tell()
            if file.write(text) < len(text):  # such as on a full disk
                file.truncate(length)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.metrics_bytes += len(text)
        self.metrics_crc32 = zlib.crc32(text, self.metrics_crc32)

    def flush_metrics(self) -> None:
        """Brings the metrics to the disk."""
        with self.metrics_file.open("rb+") as file:
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics."""
        return [json.loads(line) for line in self.metrics_file.read_text(encoding="utf-8").splitlines()]

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes the summary, whole or not at all."""
        write_whole(self.summary_file, json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")


def _fresh(parent: Path, name: str) -> Path:
    """Makes a folder that is not there yet, also when two runs begin in one second."""
    parent.mkdir(parents=True, exist_ok=True)
    for k in itertools.count(1):
        path = parent / (f"{name}-{k}" if k > 1 else name)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(member) for key, member in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
