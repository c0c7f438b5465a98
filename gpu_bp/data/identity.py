"""What the data of a training are, so that data that changed are noticed: sizes and digests, by config key.

A digest is SHA-256, which processors have instructions for (a file's is what `sha256sum` says). A file of more than
256 MiB is not read whole: its digest is of its size and of 1024 blocks of 64 KiB, the first and the last ones and
others evenly between, so that a change between two blocks goes unseen. Of a shard folder it is that of the manifest:
opening the folder has compared the sizes of its files with it, and reading compares their checksums. Of a source of
one's own it is that of some of its rows.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_bp import own
from gpu_bp.config import Config
from gpu_bp.config_data import ArrayData, OwnData, ShardData, TableData
from gpu_bp.data import Dataset
from gpu_bp.data.shard_manifest import MANIFEST, Manifest
from gpu_bp.data.sources import CheckedSource
from gpu_bp.whole_file import named

WHOLE = 256 * 2**20  # bytes of a file that is read whole
BLOCKS, BLOCK = 1024, 64 * 2**10  # of a larger one, and bytes of each
PLACES, PLACE_ROWS = 64, 4  # of a source of one's own, and rows read at each

ROWS = "data.rows"  # the one key whose value is numbers of rows, by split


def identity(config: Config, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """What the config's data are, as JSON has it; `changes` compares two of them.

    The key is the config key that names a file, a folder or a source, such as "data.path", or "code.MODULE" for each
    module (or file) of one's own that the config names or a source's class is from: of that file alone, not of what it
    imports. The value has "what" it is called, its "bytes" where it has any, and its "digest". "data.rows" has the
    number of rows of each split. Of generated data nothing else is said: the config says all.

    Raises:
        OSError: a file cannot be read (which).
    """
    data = config.data
    found: dict[str, dict[str, Any]] = {ROWS: {name: source.n_rows for name, source in dataset.sources.items()}}
    if isinstance(data, TableData):
        found["data.path"] = _file(Path(data.path))
    elif isinstance(data, ArrayData):
        paths = {"data.inputs": data.inputs, "data.targets": data.targets, "data.weights": data.weights}
        found |= {key: _file(Path(path)) for key, path in paths.items() if path}
    elif isinstance(data, ShardData):
        found["data.path"] = _shards(Path(data.path))
    elif isinstance(data, OwnData):
        for name, source in dataset.sources.items():
            choice = data.sources and getattr(data.sources, name)
            what = choice.kind if choice else type(_given(source)).__qualname__
            found[f"data.sources.{name}"] = {"what": what, "digest": _digest_of_rows(dataset, name)}
    return found | {f"code.{module}": _file(file) for module, file in _code(config, dataset)}


def changes(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What is not as it was, by key, in words such as `rows.csv has 1,234 bytes, had 1,200`.

    Only what both have is compared, by content: that a config names something else, it says itself.
    """
    found = {}
    for key in [key for key in now if key in before]:
        was, its = before[key], now[key]
        if key == ROWS:
            if was != its:
                found[key] = f"{_counts(its)}, were {_counts(was)}"
        elif was.get("bytes") != its.get("bytes"):
            found[key] = f"{its['what']} has {its.get('bytes', 0):,} bytes, had {was.get('bytes', 0):,}"
        elif was["digest"] != its["digest"]:
            found[key] = f"{its['what']} has other {'content' if 'bytes' in its else 'rows'} than it had"
    return found


def refuse_malformed(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same; raises ValueError where `identity` gives no such thing."""
    for key, value in found.items():
        of_content = {"what": str, "digest": str} | ({"bytes": int} if "bytes" in value else {})
        kinds = dict.fromkeys(value, int) if key == ROWS else of_content
        if not (value.keys() == kinds.keys() and all(isinstance(value[name], kind) for name, kind in kinds.items())):
            raise ValueError(f"{key} does not say what data are")
    return found


def _counts(rows: Mapping[str, int]) -> str:
    return " + ".join(f"{n:,} {name}" for name, n in rows.items())


def _file(path: Path) -> dict[str, Any]:
    with named(path), path.open("rb") as file:
        size = path.stat().st_size
        if size <= WHOLE:
            digest = hashlib.file_digest(file, "sha256")
        else:
            digest = hashlib.sha256(str(size).encode())
            for start in _spread(size, BLOCK, BLOCKS):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return {"what": str(path), "bytes": size, "digest": digest.hexdigest()}


def _shards(folder: Path) -> dict[str, Any]:
    n_bytes = sum(file.bytes for shard in Manifest.read(folder).shards for file in shard.files)
    return {"what": str(folder), "bytes": n_bytes, "digest": _file(folder / MANIFEST)["digest"]}


def _digest_of_rows(dataset: Dataset, name: str) -> str:
    """Of the first and the last rows, and of some evenly between; of all where there are few.

    A row that cannot be read counts as such: it is the training that says so, if it comes to it.
    """
    n, digest = dataset.sources[name].n_rows, hashlib.sha256()
    few = n <= PLACES * PLACE_ROWS
    for first in (0,) if few else _spread(n, PLACE_ROWS, PLACES):
        try:
            rows = dataset.rows(name, first, n if few else PLACE_ROWS)
        except Exception:
            digest.update(b"unreadable")
            continue
        for array in (rows.inputs, rows.targets, rows.weights):
            if array is not None:
                digest.update(array.tobytes())
    return digest.hexdigest()


def _spread(total: int, part: int, count: int) -> list[int]:
    """Where `count` parts begin that are evenly spread over a total, one at its beginning and one at its end."""
    return [k * (total - part) // (count - 1) for k in range(count)]


def _code(config: Config, dataset: Dataset) -> Iterator[tuple[str, Path]]:
    """The modules that hold code of one's own, by the name they are imported under, with the file of each."""
    names = [own.absolute(name).rpartition(":")[0] for name in own.names(config.model_dump())]
    names += [type(_given(source)).__module__ for source in dataset.sources.values()]
    for name in dict.fromkeys(names):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and Path(file).is_file() and name.partition(".")[0] != "gpu_bp":
            yield name, Path(file)


def _given(source: Any) -> Any:
    """The source that was given, where it is one's own."""
    return source.given if isinstance(source, CheckedSource) else source
