"""The manifest of a shard folder.

A shard folder holds rows in shards of `shard_rows` rows, and `manifest.json`, which says what the rows are and lists
every shard that is finished with the size and the checksum of each of its files. What is listed is whole, at any time.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import from_json

from gpu_bp.config_types import Section, Width, first_fault
from gpu_bp.data.source import BLOCK_ROWS
from gpu_bp.errors import UserError, short
from gpu_bp.plain_file import read_text
from gpu_bp.tables import differing
from gpu_bp.whole_file import PartFile, write_whole

MANIFEST = "manifest.json"
AGAIN = "run `gpu-bp generate` again"


Natural = Annotated[int, Field(ge=1, le=2**62)]


class ShardFile(Section):
    """A finished file: its name in the folder, its size, and the CRC-32 of its bytes."""

    name: str = Field(pattern=r"^[\w-]+\.[a-z]+$")  # in no other folder
    bytes: Natural
    crc32: int = Field(ge=0, lt=2**32)

    @classmethod
    def finish(cls, file: PartFile, name: str) -> ShardFile:
        """Puts a file in its place."""
        file.finish()
        return cls(name=name, bytes=file.bytes, crc32=file.crc32)


class Shard(Section):
    """A finished shard: `rows` rows from number `first` on, and the files they are in."""

    first: int = Field(ge=0, le=2**62)
    rows: Natural
    files: tuple[ShardFile, ...]


class Manifest(Section):
    """What is in a shard folder.

    `config` is plain data that identifies what was generated. `rows` are planned in all; the folder is complete
    once the shards have as many. Inputs and targets are numbers of `dtype`. With `classes`, a row's target is a
    label, int64, and n_targets is 1; `binary` targets are 0 and 1. `block_rows` are written together, and best read
    together.
    """

    format: Literal[1] = 1
    config: dict[str, Any]
    rows: Natural
    dtype: Literal["float64", "float32"]
    n_inputs: Width
    n_targets: Width
    classes: tuple[str, ...]
    binary: bool
    file_format: Literal["npy", "parquet"]
    shard_rows: Natural
    block_rows: int = Field(ge=1, le=BLOCK_ROWS)
    shards: tuple[Shard, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            UserError: there is none, or it is not a manifest of this format (which key is wrong).
        """
        path = folder / MANIFEST
        try:
            text = read_text(path)
            raw = from_json(text)
        except FileNotFoundError:
            what = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
            raise UserError(f"{folder} is not a shard folder: {what}") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except ValueError:  # so is a UnicodeDecodeError
            raise UserError(f"{path} is not JSON") from None
        if not isinstance(raw, dict) or "format" not in raw:
            raise UserError(f"{path} is not the manifest of a shard folder: it has no key format")
        if raw["format"] != 1:
            raise UserError(f"{path}: its format is {short(raw['format'])}, this version of gpu_bp reads format 1")
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f"{path}, {first_fault(error)}") from None
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

    def could_hold(self, shard: Shard) -> bool:
        """Whether the sizes of a shard's files bear out its rows, so that nothing is made out of proportion to them.

        A number takes a byte or more; in Parquet, where many that are alike take no room, a row group and a column do.
        """
        size, width = sum(file.bytes for file in shard.files), self.n_inputs + self.n_targets
        if self.file_format == "parquet":
            return size >= max(shard.rows // self.block_rows, width)
        return size >= shard.rows * width

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
