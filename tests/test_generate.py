"""`gpu-bp generate`: a folder of shards from a config, what it prints, and its exit status."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from rich.console import Console

from gpu_bp import UserError, load_config
from gpu_bp.backends import NumpyBackend
from gpu_bp.cli import main
from gpu_bp.data.shard_manifest import Manifest
from gpu_bp.data.shards import FILE_FORMATS, ShardReader
from gpu_bp.data.sources import SetReader
from gpu_bp.data.synthetic import make_set
from gpu_bp.generate import generate
from gpu_bp.lock import LOCK, Lock
from gpu_bp.whole_file import PartFile

MOON = ROOT / "configs/double-moon.toml"


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs `gpu-bp generate` in this process: its exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main(["generate", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exited.value.code or 0), captured.out, captured.err

    return run


Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_generate(cli: Cli, file_format: str) -> None:
    arguments = (MOON, "data.rows=900", "--format", file_format, "--shard-rows", 1000, "-o", "moon")
    status, out, err = cli(*arguments)
    assert (status, err) == (0, "")
    size = sum(path.stat().st_size for path in Path("moon").glob("*-*"))
    assert f"2,900 rows in 3 shards of {file_format} files, {size:,} bytes\nshard folder: moon\n" in out
    assert out.startswith("[100%] 2,900 of 2,900 rows  ")
    assert Manifest.read(Path("moon")).config == {
        "seed": 0,
        "data": {"kind": "double-moon", "radius": 10.0, "width": 6.0, "distance": -4.0},
        "backend": "numpy",
    }
    assert "bytes; all were there, nothing to do" in cli(*arguments)[1]
    next(Path("moon").glob("*-00001*")).unlink()
    assert "bytes; 1,900 of the rows were there" in cli(*arguments)[1]
    assert cli(MOON, "--rows", 100, "-o", "quiet", "--quiet") == (0, "", "")
    rows, others = (ShardReader(folder).read(0, 100) for folder in ("quiet", "moon"))
    np.testing.assert_array_equal(rows.inputs, others.inputs)
    config = load_config(MOON)
    moon = SetReader(NumpyBackend(), make_set(config.data, 0), 0, "moon", 100).read(0, 100)
    np.testing.assert_array_equal(rows.inputs, moon.inputs)
    np.testing.assert_array_equal(rows.labels, moon.labels)


@pytest.mark.parametrize(("name", "rows", "n_inputs", "n_targets"), [("xor", 4, 2, 1), ("encoder", 8, 8, 8)])
def test_generate_each_kind(cli: Cli, name: str, rows: int, n_inputs: int, n_targets: int) -> None:
    assert cli(ROOT / f"configs/{name}.toml", "-o", "out")[0] == 0
    reader = ShardReader("out")
    assert (reader.n_rows, reader.n_inputs, reader.n_targets) == (rows, n_inputs, n_targets)


def test_what_scales_rows_does_not_change_them(cli: Cli) -> None:
    """The same folder serves, however its rows are scaled when they are read."""
    arguments = (ROOT / "configs/teacher.toml", "--rows", 50, "-o", "out")
    assert cli(*arguments)[0] == 0
    scaled = ("data.scaling=standardise", "data.target_scaling=standardise")
    assert "all were there, nothing to do" in cli(*arguments, *scaled)[1]


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    generate(load_config(MOON), tmp_path / "moon", backend=NumpyBackend(), console=console)
    assert "3,000/3,000 rows" in text.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.toml", "-o", "out"], "config none.toml: No such file"),
        ([MOON], "Missing option '-o'"),
        ([MOON, "-o", "out", "--rows", 0], "--rows"),
        ([MOON, "-o", "out", "--format", "csv"], "unknown file format 'csv'; known: npy, parquet"),
        ([MOON, "-o", "out", "--dtype", "float"], "unknown dtype 'float'; did you mean float"),
        ([MOON, "-o", "full"], "full has other files in it and no manifest.json; choose another folder"),
        ([MOON, "-o", "full/notes.txt"], "notes.txt is a file; choose another folder"),
        ([MOON, "-o", "moon", "data.width=5.0"], "moon holds other rows: config.data.width is 6.0 there and 5.0 here"),
        ([MOON, "-o", "moon", "seed=1"], "moon holds other rows: config.seed is 0 there and 1 here"),
        ([ROOT / "configs/bike-sharing.toml", "-o", "out"], "only synthetic data are generated"),
    ],
)
def test_errors_are_one_line(cli: Cli, arguments: list[object], message: str) -> None:
    cli(MOON, "-o", "moon")
    Path("full").mkdir()
    Path("full/notes.txt").touch()
    status, _, err = cli(*arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not Path("out").exists()
    assert contents("full") == {"notes.txt": b""}


def test_parquet_needs_pyarrow(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (MOON, "--format", "parquet", "-o", "moon")
    cli(*arguments)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert cli(*arguments) == (2, "", "error: Parquet files need pyarrow: pip install 'gpu_bp[table]'\n")
    with pytest.raises(UserError, match="Parquet files need pyarrow"):
        ShardReader("moon")


def test_a_file_that_may_not_grow(cli: Cli) -> None:
    """The operating system refuses a write in the middle of a file."""
    pytest.importorskip("resource")
    arguments = ["generate", str(MOON), "--rows", "20000", "--shard-rows", "6000", "-o"]
    program = f"""
import resource
from gpu_bp.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
main({[*arguments, "small"]!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    path = Path("small/inputs-00000.npy")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {path}: file too large; 0 of 20000 rows are safe, run the same command again to go on\n"
    )
    assert sorted(contents("small")) == ["manifest.json"]
    assert cli(*arguments[1:], "small")[0] == cli(*arguments[1:], "large")[0] == 0
    assert contents("small") == contents("large")


def test_sigterm(cli: Cli) -> None:
    """Ended in the middle: what is finished is whole, nothing half written is left, and the same command goes on."""
    arguments = ["generate", str(MOON), "--rows", "1000000000", "--shard-rows", "100000", "-o", "moon"]
    with subprocess.Popen(
        [sys.executable, "-m", "gpu_bp", *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, "")
    assert not list(Path("moon").glob("*.part"))
    rows = Manifest.read(Path("moon")).finished_rows
    with pytest.raises(UserError, match=f"moon is incomplete: it has {rows} of 1000000000 rows"):
        ShardReader("moon")


def test_ctrl_c(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(PartFile, "write", interrupt)
    status, out, err = cli(MOON, "-o", "moon")
    assert (status, err) == (130, "")
    assert "interrupted; finished shards are safe, run the same command again to go on" in out


def test_one_folder_one_process(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("shards").mkdir()
    with Lock(Path("shards")), pytest.raises(SystemExit) as refused:
        main(["generate", str(MOON), "-o", "shards"])
    assert refused.value.code == 2
    assert "shard folder shards is in use by process" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["generate", str(MOON), "-o", "shards"])
    assert done.value.code == 0
    assert LOCK not in contents("shards")
