"""The manifest of a shard folder.

A shard folder holds rows in shards of `shard_rows` rows, and `manifest.json`, which says what the rows are and lists
every shard that is finished with the size and the checksum of each of its files. What is listed is whole, at any time.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpu_bp.errors import UserError
from gpu_bp.tables import differing
from gpu_bp.whole_file import PartFile, write_whole

MANIFEST = "manifest.json"
AGAIN = "run `gpu-bp generate` again"


class _Record(BaseModel):
    """A JSON object: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShardFile(_Record):
    """A finished file: its name in the folder, its size, and the CRC-32 of its bytes."""

    name: str
    bytes: int
    crc32: int

    @classmethod
    def finish(cls, file: PartFile, name: str) -> ShardFile:
        """Puts a file in its place."""
        file.finish()
        return cls(name=name, bytes=file.bytes, crc32=file.crc32)


class Shard(_Record):
    """A finished shard: `rows` rows from number `first` on, and the files they are in."""

    first: int = Field(ge=0)
    rows: int = Field(ge=1)
    files: tuple[ShardFile, ...]


class Manifest(_Record):
    """What is in a shard folder.

    `config` is plain data that identifies what was generated. `rows` are planned in all; the folder is complete
    once the shards have as many. Inputs and targets are numbers of `dtype`. With `classes`, a row's target is a
    label, int64, and n_targets is 1; `binary` targets are 0 and 1. `block_rows` are written together, and best read
    together.
    """

    format: Literal[1] = 1
    config: dict[str, Any]
    rows: int = Field(ge=1)
    dtype: Literal["float64", "float32"]
    n_inputs: int = Field(ge=1)
    n_targets: int = Field(ge=1)
    classes: tuple[str, ...]
    binary: bool
    file_format: Literal["npy", "parquet"]
    shard_rows: int = Field(ge=1)
    block_rows: int = Field(ge=1)
    shards: tuple[Shard, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            UserError: there is none, or it is not a manifest of this format (which key is wrong).
        """
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
            raw = json.loads(text)
        except FileNotFoundError:
            what = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
            raise UserError(f"{folder} is not a shard folder: {what}") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise UserError(f"{path} is not JSON") from None
        if not isinstance(raw, dict) or "format" not in raw:
            raise UserError(f"{path} is not the manifest of a shard folder: it has no key format")
        if raw["format"] != 1:
            raise UserError(f"{path}: its format is {raw['format']!r}, this version of gpu_bp reads format 1")
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise UserError(f"{path}, {'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}") from None
        for shard in manifest.shards:
            index = shard.first // manifest.shard_rows
            first, rows = manifest.plan(index)
            if (shard.first, shard.rows) != (first, rows):
                raise UserError(
                    f"{path}: no shard has {shard.rows} rows from row {shard.first} on; with shard_rows = "
                    f"{manifest.shard_rows} one has {rows} from row {first} on"
                )
        if any(a.first >= b.first for a, b in itertools.pairwise(manifest.shards)):
            raise UserError(f"{path}: its shards are not in the order of their rows")
        return manifest

    def write(self, folder: Path) -> None:
        """Replaces the folder's manifest, whole or not at all."""
        write_whole(folder / MANIFEST, self.model_dump_json(indent=1) + "\n")

    @property
    def n_shards(self) -> int:
        """Shards of the complete folder."""
        return -(-self.rows // self.shard_rows)

    @property
    def finished_rows(self) -> int:
        """Rows of the shards that are finished."""
        return sum(shard.rows for shard in self.shards)

    def plan(self, index: int) -> tuple[int, int]:
        """The first row of a shard, and how many rows it has."""
        first = index * self.shard_rows
        return first, min(self.shard_rows, self.rows - first)

    def refuse_other(self, other: Manifest, folder: Path) -> None:
        """Raises UserError where the folder's manifest `other` is of other rows or of another layout."""
        here, there = (manifest.model_dump(exclude={"shards"}, mode="json") for manifest in (self, other))
        for key, (before, now) in differing(there, here).items():
            raise UserError(
                f"{folder} holds other rows: {key} is {before} there and {now} here; "
                "choose another folder, or remove it"
            )
