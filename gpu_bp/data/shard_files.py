"""The files of a shard, in either format: how a shard is written block by block, and how rows are read from it.

npy      inputs-00000.npy (rows, n_inputs), targets-00000.npy (rows, n_targets), or (rows,) int64 of labels
parquet  rows-00000.parquet, columns x1, x2, ..., and label (int64), y, or y1, y2, ...; a row group a block

`wanted` is what is wanted of rows: labels (n,) int64, or targets (n, n_targets).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from gpu_bp.data.arrays import read_into
from gpu_bp.data.parquet_table import readable
from gpu_bp.data.shard_manifest import MANIFEST, Manifest, ShardFile
from gpu_bp.errors import UserError
from gpu_bp.plain_file import read_npy_header
from gpu_bp.whole_file import PartFile

Blocks = Iterable[tuple[np.ndarray, np.ndarray]]  # inputs and wanted, C-contiguous


class ShardFiles(Protocol):
    """The files of the shards of a folder, in one format."""

    def names(self, index: int) -> tuple[str, ...]:
        """The files of a shard."""

    def write(self, index: int, blocks: Blocks) -> tuple[ShardFile, ...]:
        """Writes a shard; where something is raised, none of its files is left half written."""

    def read(self, index: int, start: int, inputs: np.ndarray, wanted: np.ndarray) -> None:
        """Fills the arrays with the rows of a shard from its row `start` on.

        Raises:
            UserError: a file is of another dtype, width or length than the manifest says.
        """


def shard_files(manifest: Manifest, folder: Path) -> ShardFiles:
    """The files in the format of the manifest.

    Raises:
        UserError: that is Parquet, and pyarrow is not installed.
    """
    return NpyFiles(manifest, folder) if manifest.file_format == "npy" else ParquetFiles(manifest, folder)


class NpyFiles:
    """Two .npy files a shard."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest = manifest
        self.folder = folder
        self._starts: dict[str, int] = {}  # where the numbers start in files whose header is right

    def names(self, index: int) -> tuple[str, ...]:
        return f"inputs-{index:05d}.npy", f"targets-{index:05d}.npy"

    def write(self, index: int, blocks: Blocks) -> tuple[ShardFile, ...]:
        one, other = (self.folder / name for name in self.names(index))
        with PartFile(one) as inputs_file, PartFile(other) as wanted_file:
            for file, (dtype, shape) in zip((inputs_file, wanted_file), self._arrays(index), strict=True):
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            for inputs, wanted in blocks:
                inputs_file.write(inputs.data)
                wanted_file.write(wanted.data)
            files = zip((inputs_file, wanted_file), self.names(index), strict=True)
            return tuple(ShardFile.finish(file, name) for file, name in files)

    def read(self, index: int, start: int, inputs: np.ndarray, wanted: np.ndarray) -> None:
        for name, expected, out in zip(self.names(index), self._arrays(index), (inputs, wanted), strict=True):
            path = self.folder / name
            if name not in self._starts:
                with path.open("rb") as file:
                    self._starts[name] = _check_header(path, file, *expected)
            read_into(out, path, self._starts[name] + start * (out.nbytes // len(out)))

    def _arrays(self, index: int) -> tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]:
        """The dtype and the shape of a shard's inputs and of what is wanted, little-endian on disk."""
        m = self.manifest
        rows = m.plan(index)[1]
        dtype = np.dtype(m.dtype).newbyteorder("<")
        wanted = (np.dtype("<i8"), (rows,)) if m.classes else (dtype, (rows, m.n_targets))
        return (dtype, (rows, m.n_inputs)), wanted


def _check_header(path: Path, file: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Where the numbers start in a .npy file that holds this array."""
    try:
        held = read_npy_header(file)
    except ValueError as error:
        raise UserError(f"{path} is not a .npy file: {error}") from None
    if (held.dtype.str, held.shape) != (dtype.str, shape) or held.fortran:
        order = " in Fortran's order" if held.fortran else ""
        what = f"{held.dtype.str} of shape {held.shape}{order}"
        raise UserError(f"{path} holds {what}; {MANIFEST} says {dtype.str} of {shape}")
    return held.start


class ParquetFiles:
    """One Parquet file a shard, a row group a block."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest = manifest
        self.folder = folder
        self._pyarrow, self._parquet = _pyarrow()
        m = manifest
        numbers = self._pyarrow.from_numpy_dtype(np.dtype(m.dtype))
        types = {f"x{k}": numbers for k in range(1, m.n_inputs + 1)}
        if m.classes:
            types["label"] = self._pyarrow.int64()
        else:
            types |= {f"y{k}" if m.n_targets > 1 else "y": numbers for k in range(1, m.n_targets + 1)}
        field = self._pyarrow.field
        self._schema = self._pyarrow.schema([field(name, kind, nullable=False) for name, kind in types.items()])
        self._footer = lru_cache(4)(self._read_footer)
        self._group = lru_cache(2)(self._read_group)

    def names(self, index: int) -> tuple[str, ...]:
        return (f"rows-{index:05d}.parquet",)

    def write(self, index: int, blocks: Blocks) -> tuple[ShardFile, ...]:
        # Dictionaries would be of no use: hardly a number occurs twice.
        with (
            PartFile(self.folder / self.names(index)[0]) as file,
            self._parquet.ParquetWriter(file, self._schema, use_dictionary=False) as writer,
        ):
            for inputs, wanted in blocks:
                columns = [*inputs.T, *(wanted.T if wanted.ndim == 2 else [wanted])]
                arrays = [self._pyarrow.array(np.ascontiguousarray(column)) for column in columns]
                writer.write_table(self._pyarrow.Table.from_arrays(arrays, schema=self._schema))
            writer.close()
            return (ShardFile.finish(file, self.names(index)[0]),)

    def read(self, index: int, start: int, inputs: np.ndarray, wanted: np.ndarray) -> None:
        done = 0
        while done < len(inputs):
            group, skipped = divmod(start + done, self.manifest.block_rows)
            group_inputs, group_wanted = self._group(index, group)
            n = min(len(group_inputs) - skipped, len(inputs) - done)
            inputs[done : done + n] = group_inputs[skipped : skipped + n]
            wanted[done : done + n] = group_wanted[skipped : skipped + n]
            done += n

    def _read_group(self, index: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """The inputs and what is wanted of a row group."""
        m = self.manifest
        footer = self._footer(index)
        path = self.folder / self.names(index)[0]
        rows = footer.row_group(group).num_rows
        with readable(path), self._parquet.ParquetFile(path, metadata=footer) as file:
            columns = [column.to_numpy() for column in file.read_row_group(group, use_threads=False).columns]
        if any(len(column) != rows for column in columns):
            raise UserError(f"{path} has columns that are shorter than it says")
        inputs, wanted = columns[: m.n_inputs], columns[m.n_inputs :]
        return np.stack(inputs, axis=1), wanted[0] if m.classes else np.stack(wanted, axis=1)

    def _read_footer(self, index: int) -> Any:
        """The metadata of a shard's file, which are as the manifest says."""
        path = self.folder / self.names(index)[0]
        with readable(path):
            footer = self._parquet.read_metadata(path)
            schema = footer.schema.to_arrow_schema()
        if not schema.equals(self._schema):
            held, said = (", ".join(f"{f.name} {f.type}" for f in s) for s in (schema, self._schema))
            raise UserError(f"{path} has the columns {_shorten(held)}; {MANIFEST} says {_shorten(said)}")
        rows, block = self.manifest.plan(index)[1], self.manifest.block_rows
        groups = [footer.row_group(k).num_rows for k in range(footer.num_row_groups)]
        if len(groups) != -(-rows // block) or groups != [min(block, rows - k * block) for k in range(len(groups))]:
            raise UserError(f"{path} has {footer.num_rows} rows; {MANIFEST} says {rows} in row groups of {block}")
        return footer


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install 'gpu_bp[table]'") from None
    return pyarrow, pyarrow.parquet


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
