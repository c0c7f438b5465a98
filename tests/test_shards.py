"""Shard folders: what is written is read with the same bits, what is broken is refused, what was stopped goes on."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from gpu_bp import UserError
from gpu_bp.data.shard_manifest import Manifest
from gpu_bp.data.shards import FILE_FORMATS, ShardReader, write_shards
from gpu_bp.data.source import Reader, Rows
from gpu_bp.whole_file import PartFile

ROWS, SHARD_ROWS = 2500, 1100  # three shards, the last one shorter; the first two end in a shorter block
CONFIG = {"seed": 3, "data": {"kind": "made-up", "noise": 0.1}}


class Made:
    """Rows from a formula, so that any are there without the others: 3 inputs, and 2 targets or a label."""

    n_rows = 10**6
    block_rows = 7
    where = "made-up rows"

    def __init__(self, labels: bool = False, n_inputs: int = 3) -> None:
        self.n_inputs = n_inputs
        self.n_targets = 1 if labels else 2
        self.classes: tuple[str, ...] = ("no", "yes", "perhaps") if labels else ()
        self.binary = False
        self.weighted = False

    def read(self, first: int, n: int) -> Rows:
        row = np.arange(first, first + n, dtype=np.float64)[:, None]
        inputs = np.sin(row * (1 + np.arange(self.n_inputs)))
        if self.classes:
            return Rows(inputs, labels=(row[:, 0] * 7 % 3).astype(np.int64))
        return Rows(inputs, targets=np.cos(row * [1, 2]))


def write(folder: Path, file_format: str = "npy", reader: Reader | None = None, **changed: Any) -> int:
    arguments: dict[str, Any] = {"rows": ROWS, "config": CONFIG, "shard_rows": SHARD_ROWS, "file_format": file_format}
    return write_shards(reader or Made(), folder, **{**arguments, **changed})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(rows: Rows, others: Rows) -> None:
    for name in ("inputs", "targets", "labels"):
        one, other = getattr(rows, name), getattr(others, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], ShardReader]:
    """A reader for each format, of targets and of labels."""
    readers = {}
    for file_format in FILE_FORMATS:
        for labels in (False, True):
            folder = tmp_path_factory.mktemp("shards") / "new" / "folder"
            assert write(folder, file_format, Made(labels)) == ROWS
            readers[file_format, labels] = ShardReader(folder)
    return readers


@pytest.mark.parametrize("labels", [False, True], ids=["targets", "labels"])
@pytest.mark.parametrize("file_format", FILE_FORMATS)
@given(cuts=st.lists(st.integers(0, ROWS), max_size=6))
def test_any_pieces_are_the_whole(
    folders: dict[tuple[str, bool], ShardReader], file_format: str, labels: bool, cuts: list[int]
) -> None:
    reader, made = folders[file_format, labels], Made(labels)
    assert (reader.n_rows, reader.n_inputs, reader.n_targets) == (ROWS, made.n_inputs, made.n_targets)
    assert reader.classes == made.classes
    ends = sorted({0, *cuts, ROWS})
    for first, end in itertools.pairwise(ends):
        same(reader.read(first, end - first), made.read(first, end - first))


def test_what_files_are_there(folders: dict[tuple[str, bool], ShardReader]) -> None:
    npy, parquet = folders["npy", True].folder, folders["parquet", False].folder
    assert sorted(contents(npy)) == [
        *(f"inputs-0000{k}.npy" for k in range(3)),
        "manifest.json",
        *(f"targets-0000{k}.npy" for k in range(3)),
    ]
    same(Rows(np.load(npy / "inputs-00002.npy"), labels=np.load(npy / "targets-00002.npy")), Made(True).read(2200, 300))
    assert sorted(contents(parquet)) == ["manifest.json", *(f"rows-0000{k}.parquet" for k in range(3))]
    table = pq.read_table(parquet / "rows-00001.parquet")
    assert table.column_names == ["x1", "x2", "x3", "y1", "y2"]
    np.testing.assert_array_equal(table["y2"].to_numpy(), np.cos(2.0 * np.arange(1100, 2200)))
    assert pq.read_schema(folders["parquet", True].folder / "rows-00000.parquet").names == ["x1", "x2", "x3", "label"]
    for reader in folders.values():
        with pytest.raises(IndexError, match="rows 2490 to 2510 of 2500"):
            reader.read(2490, 20)


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_float32(tmp_path: Path, file_format: str) -> None:
    write(tmp_path, file_format, dtype="float32")
    rows, made = ShardReader(tmp_path).read(1000, 200), Made().read(1000, 200)
    assert made.targets is not None
    same(rows, Rows(made.inputs.astype(np.float32), made.targets.astype(np.float32)))


def test_default_shards_are_of_whole_blocks(tmp_path: Path) -> None:
    write(tmp_path, shard_rows=None)
    manifest = Manifest.read(tmp_path)
    assert manifest.block_rows == 1024
    assert manifest.shard_rows % manifest.block_rows == 0
    assert 63 * 2**20 < manifest.shard_rows * 5 * 8 <= 64 * 2**20


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_threads_read_at_the_same_time(tmp_path: Path, file_format: str) -> None:
    write(tmp_path, file_format)
    reader, wrong = ShardReader(tmp_path), []

    def read(seed: int) -> None:
        for first in np.random.default_rng(seed).integers(0, ROWS - 99, 50):
            if not np.array_equal(reader.read(first, 99).inputs, Made().read(first, 99).inputs):
                wrong.append(first)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_bounded_by_blocks(tmp_path: Path) -> None:
    """A shard of 16 MiB is written and read within a small part of that."""
    rows, made = 2**15, Made(n_inputs=62)
    for action in (
        lambda: write(tmp_path, reader=made, rows=rows, shard_rows=rows),
        lambda: [ShardReader(tmp_path).read(first, 100) for first in (0, 20000)],
    ):
        tracemalloc.start()
        try:
            action()
            assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
        finally:
            tracemalloc.stop()


# broken folders --------------------------------------------------------------------------------------------


def edit(folder: Path, **changed: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def vouch(folder: Path, index: int, *arrays: np.ndarray) -> None:
    """Replaces the files of a shard, and has the manifest vouch for them."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for file, array in zip(manifest["shards"][index]["files"], arrays, strict=False):
        np.save(folder / file["name"], array)
        data = (folder / file["name"]).read_bytes()
        file.update(bytes=len(data), crc32=zlib.crc32(data))
    edit(folder, **manifest)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path, n: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-n])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


BROKEN_AT_OPEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: cut(f / "inputs-00001.npy"), "inputs-00001.npy is truncated: 26527 bytes, manifest.json says 26528"),
    (lambda f: grow(f / "targets-00001.npy"), "targets-00001.npy is too long"),
    (lambda f: (f / "inputs-00002.npy").unlink(), "inputs-00002.npy is missing; run `gpu-bp generate` again"),
    (lambda f: (f / "manifest.json").unlink(), "is not a shard folder: it has no manifest.json"),
    (lambda f: shutil.rmtree(f), "is not a shard folder: there is no such folder"),
    (lambda f: cut(f / "manifest.json", 2), "manifest.json is not JSON"),
    (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest.json is not JSON"),
    (lambda f: (f / "manifest.json").write_text("[1]"), "not the manifest of a shard folder: it has no key format"),
    (lambda f: (f / "manifest.json").write_text('{"format": 1}'), "manifest.json, config: field required"),
    (lambda f: edit(f, format=2), "its format is 2, this version of gpu_bp reads format 1"),
    (lambda f: edit(f, dtype="float16"), "manifest.json, dtype: input should be 'float64' or 'float32'"),
    (lambda f: edit(f, row=1), "manifest.json, row: extra inputs are not permitted"),
    (
        lambda f: edit(f, shard_rows=1000),
        "no shard has 1100 rows from row 0 on; with shard_rows = 1000 one has 1000 from",
    ),
    (lambda f: edit(f, shards=Manifest.read(f).model_dump()["shards"][::-1]), "not in the order of their rows"),
    (lambda f: edit(f, shards=Manifest.read(f).model_dump()["shards"][:2]), "is incomplete: it has 2200 of 2500 rows"),
    (lambda f: edit(f, file_format="parquet"), "shard 0 must be in ('rows-00000.parquet',)"),
]
BROKEN_AT_READ: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: flip(f / "inputs-00000.npy"), "inputs-00000.npy was changed: its checksum is not the one in manifest"),
    (lambda f: flip(f / "targets-00000.npy"), "targets-00000.npy was changed"),
    (lambda f: vouch(f, 0, np.ones((1100, 3), np.float32)), "holds <f4 of shape (1100, 3); manifest.json says <f8"),
    (lambda f: vouch(f, 0, np.ones((1100, 3), ">f8")), "holds >f8 of shape (1100, 3); manifest.json says <f8"),
    (lambda f: vouch(f, 0, np.ones((1100, 4))), "holds <f8 of shape (1100, 4); manifest.json says <f8 of (1100, 3)"),
    (lambda f: vouch(f, 0, np.ones((1099, 3))), "holds <f8 of shape (1099, 3); manifest.json says <f8 of (1100, 3)"),
    (lambda f: vouch(f, 0, np.ones((3, 1100)).T), "in Fortran's order"),
    (lambda f: vouch(f, 0, np.ones((1100, 3)), np.ones(1100, int)), "targets-00000.npy holds <i8 of shape (1100,)"),
    (lambda f: edit(f, dtype="float32"), "inputs-00000.npy holds <f8 of shape (1100, 3); manifest.json says <f4"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN_AT_OPEN)
def test_broken_at_open(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write(tmp_path / "shards")
    damage(tmp_path / "shards")
    with pytest.raises(UserError) as raised:
        ShardReader(tmp_path / "shards")
    assert message in str(raised.value)


@pytest.mark.parametrize(("damage", "message"), BROKEN_AT_READ)
def test_broken_at_the_first_touch(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write(tmp_path)
    damage(tmp_path)
    reader = ShardReader(tmp_path)
    if reader.manifest.dtype == "float64":
        reader.read(SHARD_ROWS, 100)  # another shard is none the worse
    with pytest.raises(UserError) as raised:
        reader.read(SHARD_ROWS - 1, 1)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float32"}, "has the columns x1 double, x2 double, x3 double, y1 double, y2 double; manifest"),
        ({"n_inputs": 2}, "; manifest.json says x1 double, x2 double, y1 double, y2 double"),
        ({"block_rows": 1000}, "has 1100 rows; manifest.json says 1100 in row groups of 1000"),
    ],
)
def test_broken_parquet(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    write(tmp_path, "parquet")
    edit(tmp_path, **changed)
    with pytest.raises(UserError) as raised:
        ShardReader(tmp_path).read(0, 10)
    assert message in str(raised.value)
    flip(tmp_path / "rows-00001.parquet")
    with pytest.raises(UserError, match="rows-00001.parquet was changed"):
        ShardReader(tmp_path).read(SHARD_ROWS, 1)


def test_a_file_that_goes_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    reader = ShardReader(tmp_path)
    reader.read(0, 1)
    cut(tmp_path / "inputs-00000.npy")
    with pytest.raises(UserError, match="inputs-00000.npy became shorter while it was read"):
        reader.read(SHARD_ROWS - 1, 1)
    (tmp_path / "inputs-00000.npy").unlink()
    with pytest.raises(UserError, match="inputs-00000.npy: No such file or directory"):
        reader.read(0, 1)


# writing: stopped, gone on with, refused -----------------------------------------------------------------------


def test_a_complete_folder_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write(tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_deleted_and_truncated_files_are_restored(tmp_path: Path, file_format: str) -> None:
    write(tmp_path, file_format)
    before = contents(tmp_path)
    files = sorted(tmp_path.glob("*-0000[02].*"))
    files[0].unlink()
    cut(files[-1])
    assert write(tmp_path, file_format) == 1100 + 300
    assert contents(tmp_path) == before


@pytest.mark.parametrize("file_format", FILE_FORMATS)
@pytest.mark.parametrize("full", [True, False], ids=["disk full", "Ctrl-C"])
def test_stopped_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str, full: bool) -> None:
    """No half-written file is left, what is listed is whole, and the same call goes on."""
    real, calls, stop_at = PartFile.write, 0, -1

    def limited(file: PartFile, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise OSError(errno.ENOSPC, "No space left on device", str(file._path)) if full else KeyboardInterrupt
        return real(file, data)

    monkeypatch.setattr(PartFile, "write", limited)
    write(tmp_path / "whole", file_format)
    expected = contents(tmp_path / "whole")
    safe = set()
    for stop_at in range(1, calls + 1, 2):
        calls, folder = 0, tmp_path / str(stop_at)
        with pytest.raises(UserError if full else KeyboardInterrupt) as raised:
            write(folder, file_format)
        shards = Manifest.read(folder).shards if (folder / "manifest.json").exists() else ()
        rows = sum(shard.rows for shard in shards)
        safe.add(rows)
        if full:
            assert str(raised.value).startswith(str(folder) + os.sep)
            assert f": no space left on device; {rows} of 2500 rows are safe, run the same" in str(raised.value)
        assert not list(folder.glob("*.part"))
        assert all((folder / f.name).read_bytes() == expected[f.name] for shard in shards for f in shard.files)
        assert write(folder, file_format) == ROWS - rows
        assert contents(folder) == expected
    assert safe == {0, 1100, 2200}


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_killed_and_run_again(tmp_path: Path, file_format: str) -> None:
    """Killed in the middle of the second shard: run again, the folder is as if nothing had happened."""
    write(tmp_path / "whole", file_format)
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_shards import write
write(Path("killed"), {file_format!r}, progress=lambda rows: rows > 1100 and os.kill(os.getpid(), signal.SIGKILL))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed").glob("*.part"))
    with pytest.raises(UserError, match="killed is incomplete: it has 1100 of 2500 rows; run `gpu-bp generate` again"):
        ShardReader(tmp_path / "killed")
    assert write(tmp_path / "killed", file_format) == 1400
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"config": {**CONFIG, "seed": 4}},
            "holds other rows: config.seed is 3 there and 4 here; choose another folder",
        ),
        ({"config": {"seed": 3, "data": {"kind": "made-up"}}}, "config.data.noise is 0.1 there and None here"),
        ({"rows": 2501}, "rows is 2500 there and 2501 here"),
        ({"dtype": "float32"}, "dtype is float64 there and float32 here"),
        ({"file_format": "parquet"}, "file_format is npy there and parquet here"),
        ({"shard_rows": 100}, "shard_rows is 1100 there and 100 here"),
        ({"reader": Made(labels=True)}, "n_targets is 2 there and 1 here"),
        ({"dtype": "float16"}, "unknown dtype 'float16'; did you mean float"),
        ({"file_format": "parket"}, "unknown file format 'parket'; did you mean parquet?"),
        ({"rows": 10**6 + 1}, "made-up rows has 1000000 rows; 1000001 of them cannot be written"),
    ],
)
def test_another_folder_is_needed(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError) as raised:
        write(tmp_path, **changed)
    assert message in str(raised.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float64"), (np.inf, "float64"), (1e300, "float32")])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float, dtype: str) -> None:
    class Broken(Made):
        def read(self, first: int, n: int) -> Rows:
            rows = super().read(first, n)
            rows.inputs[np.arange(first, first + n) == 1234, 1] = value
            return rows

    with pytest.raises(UserError, match=rf"made-up rows, row 1234 \(counting from 0\): a NaN or infinity as {dtype}"):
        write(tmp_path, reader=Broken(), dtype=dtype)
    assert Manifest.read(tmp_path).finished_rows == 1100
