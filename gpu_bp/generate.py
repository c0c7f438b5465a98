"""`gpu-bp generate`: the rows of a synthetic config, written into a folder of shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gpu_bp.backends import Backend
from gpu_bp.config import Config
from gpu_bp.config_data import Synthetic
from gpu_bp.data.shard_manifest import Manifest
from gpu_bp.data.shards import write_shards
from gpu_bp.data.sources import SetReader
from gpu_bp.data.synthetic import Set, make_set
from gpu_bp.errors import UserError

# Keys of a data section that do not change what row i is.
NOT_OF_ROWS = {"rows", "validation_rows", "test_rows", "scaling", "target_scaling"}
NOT_OF_ROWS |= {"residency", "block_rows", "window_blocks"}
INTERVAL = 0.5  # seconds between two looks at the progress


def generate(
    config: Config,
    folder: Path,
    *,
    backend: Backend,
    rows: int | None = None,
    file_format: str = "npy",
    dtype: str = "float64",
    shard_rows: int | None = None,
    console: Console,
) -> None:
    """Writes the first `rows` rows of a config's data, by default all of them; the console shows how far it is.

    Raises:
        UserError: the data are not synthetic, or as `write_shards`.
    """
    made, rows = _set(config), all_rows(config) if rows is None else rows
    reader = SetReader(backend, made, config.seed, config.data.kind, rows)
    # the backends' normals differ in their last places
    identity = {"seed": config.seed, "data": config.data.model_dump(exclude=NOT_OF_ROWS), "backend": backend.name}
    try:
        with _watch(console, rows) as progress:
            written = write_shards(
                reader,
                folder,
                rows=rows,
                config=identity,
                file_format=file_format,
                dtype=dtype,
                shard_rows=shard_rows,
                progress=progress,
            )
    except (KeyboardInterrupt, SystemExit):
        console.print("interrupted; finished shards are safe, run the same command again to go on", markup=False)
        raise
    shards = Manifest.read(folder).shards
    n_bytes = sum(file.bytes for shard in shards for file in shard.files)
    n = f"{len(shards):,} shard{'s' if len(shards) > 1 else ''}"
    what = f"{rows:,} rows in {n} of {file_format} files, {n_bytes:,} bytes"
    kept = "" if written == rows else f"; {rows - written:,} of the rows were there"
    console.print(f"{what}{kept if written else '; all were there, nothing to do'}", markup=False, soft_wrap=True)
    console.print(f"shard folder: {folder}", markup=False, soft_wrap=True)


def all_rows(config: Config) -> int:
    """Training, validation and test rows of a config of synthetic data."""
    data = config.data
    return _set(config).n_rows + data.validation_rows + data.test_rows


def _set(config: Config) -> Set:
    data = config.data
    if not isinstance(data, get_args(Synthetic)):
        raise UserError(f"data.kind is {data.kind}; only synthetic data are generated")
    return make_set(data, config.seed)


@contextmanager
def _watch(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is given how many rows are written, and shows it: a bar on a terminal, lines in a pipe."""
    begin = shown = time.monotonic()
    first: int | None = None  # rows that were there

    def look(rows: int) -> Any:
        """Rows a second, in words, when it is time to show them."""
        nonlocal first, shown
        first = rows if first is None else first
        now = time.monotonic()
        if rows < total and now - shown < INTERVAL:
            return None
        shown = now
        return f"{(rows - first) / max(now - begin, 1e-9):,.0f} rows/s"

    if not console.is_terminal:

        def line(rows: int) -> None:
            if speed := look(rows):
                console.print(
                    f"[{rows / total:4.0%}] {rows:,} of {total:,} rows  {speed}", markup=False, soft_wrap=True
                )

        yield line
        return
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} rows  {task.fields[speed]} "),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, speed="", visible=False)

        def update(rows: int) -> None:
            if speed := look(rows):
                bar.update(task, completed=rows, speed=speed, visible=True)

        yield update
