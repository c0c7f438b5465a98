"""Data that changed are noticed, by content; what did not change is not reported."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_bp import Batch, NumpyBackend, Source, Task, dump_config, load_config, load_data, parse_config
from gpu_bp.backends import Backend
from gpu_bp.cli import main
from gpu_bp.config import Config
from gpu_bp.data import own_data
from gpu_bp.data.identity import BLOCK, BLOCKS, WHOLE, _file, changes, identity

Tiny = Callable[..., dict[str, Any]]

# A source, what makes it, a loss and a metric, as a user would write them.
MINE = """
import numpy as np
from gpu_bp import Source, Task
from gpu_bp.spec import FreeLoss, Twin

class Ramp(Source):
    def __init__(self, n):
        super().__init__(n, 1, 1, Task("none"))

    def fill(self, rows, batch):
        batch.inputs[:, 0] = rows * STEP
        batch.targets[:, 0] = rows % 2

STEP = 0.5

def ramp(n):
    return Ramp(n)

def _error(y, d, loss, e, s):
    np.subtract(y, d, out=e)
    np.multiply(e, e, out=loss)
    np.multiply(e, 2, out=e)

square = FreeLoss(name="square", source="nobody", targets="real",
                  error_signal=Twin("const T r = y - d; loss = r * r; e = T(2) * r;", _error))

def bias(output, target):
    return float(np.mean(output - target))
"""


@pytest.fixture
def in_tmp(in_tmp: Path) -> Iterator[Path]:
    """A temporary working folder, whose modules are forgotten afterwards."""
    yield in_tmp
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(in_tmp)):
            del sys.modules[name]


def now(config: dict[str, Any] | Config) -> dict[str, dict[str, Any]]:
    """The identity of what the config names, as it comes back from JSON."""
    made = config if isinstance(config, Config) else parse_config(config)
    found = identity(made, load_data(made))
    again: dict[str, dict[str, Any]] = json.loads(json.dumps(found))
    assert again == found
    return again


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change_byte(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def arrays(tiny: Tiny, **data: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for name, shape in {"x": (60, 3), "d": (60, 1), "w": (60,)}.items():
        np.save(f"{name}.npy", rng.uniform(1, 2, shape))
    data = {"inputs": "x.npy", "targets": "d.npy", "weights": "w.npy", "validation_rows": 20, "test_rows": 0} | data
    return tiny() | {"data": {"kind": "arrays", **data}}


def test_arrays(tiny_config: Tiny, in_tmp: Path) -> None:
    config = arrays(tiny_config)
    before = now(config)
    assert before == {
        "data.rows": {"train": 40, "validation": 20},
        **{
            f"data.{key}": {
                "what": str(in_tmp / file),
                "bytes": Path(file).stat().st_size,
                "digest": sha256(Path(file)),
            }
            for key, file in {"inputs": "x.npy", "targets": "d.npy", "weights": "w.npy"}.items()
        },
    }
    assert changes(before, now(config)) == {}
    change_byte(Path("d.npy"))
    assert changes(before, now(config)) == {"data.targets": f"{in_tmp}/d.npy has other content than it had"}
    np.save("w.npy", np.ones(60, np.float32))
    size = before["data.weights"]["bytes"]
    assert changes(before, now(config)) == {
        "data.targets": f"{in_tmp}/d.npy has other content than it had",
        "data.weights": f"{in_tmp}/w.npy has {size - 240:,} bytes, had {size:,}",
    }


def test_what_the_config_says_itself_is_not_reported(tiny_config: Tiny, in_tmp: Path) -> None:
    """Another place of the same content; and what only one of two configs names."""
    config = arrays(tiny_config)
    before = now(config)
    Path("elsewhere").mkdir()
    for name in "xdw":
        Path(f"{name}.npy").rename(Path("elsewhere", f"{name}.npy"))
    config["data"] |= {"inputs": "elsewhere/x.npy", "targets": "elsewhere/d.npy", "weights": None}
    after = now(config)
    assert after["data.inputs"]["what"] == str(in_tmp / "elsewhere" / "x.npy")
    assert "data.weights" not in after
    assert changes(before, after) == changes(after, before) == {}


def test_a_table(tiny_config: Tiny, in_tmp: Path) -> None:
    table = Path("t.csv")
    table.write_text("a,b\n" + "".join(f"{k % 7},{k % 5}\n" for k in range(100)))
    config = tiny_config() | {"data": {"kind": "table", "path": "t.csv", "target_columns": ["b"], "test_rows": 10}}
    before = now(config)
    assert before == {
        "data.rows": {"train": 90, "test": 10},
        "data.path": {"what": str(in_tmp / table), "bytes": table.stat().st_size, "digest": sha256(table)},
    }
    with table.open("a") as file:
        file.write("1,2\n" * 300)
    assert changes(before, now(config)) == {
        "data.rows": "390 train + 10 test, were 90 train + 10 test",
        "data.path": f"{in_tmp}/t.csv has 1,604 bytes, had 404",
    }


def test_a_shard_folder(tiny_config: Tiny, in_tmp: Path) -> None:
    """Its manifest holds the sizes and the checksums of all its files."""
    generated = Path("moon.toml")

    def generate(seed: int, folder: str) -> None:
        generated.write_text(dump_config(parse_config(tiny_config(seed=seed))))
        with pytest.raises(SystemExit, match="0"):
            main(["generate", str(generated), "--out", folder, "--shard-rows", "40", "--backend", "numpy"])

    generate(1, "shards")
    config = tiny_config() | {"data": {"kind": "shards", "path": "shards", "test_rows": 10}}
    before = now(config)
    files = [path for path in Path("shards").iterdir() if path.name != "manifest.json"]
    assert len(files) > 2
    assert before["data.path"] == {
        "what": str(in_tmp / "shards"),
        "bytes": sum(path.stat().st_size for path in files),
        "digest": sha256(Path("shards", "manifest.json")),
    }
    assert changes(before, now(config)) == {}
    generate(2, "others")
    config["data"]["path"] = "others"
    assert changes(before, now(config)) == {"data.path": f"{in_tmp}/others has other content than it had"}


def test_generated_data_are_in_the_config(tiny_config: Tiny) -> None:
    before = now(tiny_config())
    assert before == {"data.rows": {"train": 50, "validation": 20, "test": 30}}
    fewer = tiny_config(data={"test_rows": 0})
    assert changes(before, now(fewer)) == {
        "data.rows": "50 train + 20 validation, were 50 train + 20 validation + 30 test"
    }


def test_a_large_file_is_read_in_places(tmp_path: Path) -> None:
    """A change in the first or the last bytes, or in any of the blocks, is seen; one between them is not."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(WHOLE + 1)
    size = WHOLE + 1

    def seen(place: int) -> bool:
        """Whether a byte that changes there is noticed; it is changed back."""
        before = _file(path)
        with path.open("rb+") as file:
            for content in (b"\1", b"\0"):
                file.seek(place)
                file.write(content)
                file.flush()
                if content == b"\1":
                    after = _file(path)
        assert before["bytes"] == after["bytes"] == size
        return bool(before["digest"] != after["digest"])

    step = (size - BLOCK) / (BLOCKS - 1)
    for k in (0, 1, 500, BLOCKS - 1):
        assert seen(int(k * step))
        assert seen(int(k * step) + BLOCK - 1)
    assert not seen(BLOCK)
    assert not seen(size - BLOCK - 1)
    before = _file(path)
    with path.open("rb+") as file:
        file.truncate(WHOLE)  # the same zeros, now of a file that is read whole
    assert _file(path)["digest"] == sha256(path) != before["digest"]


def own_config(tiny: Tiny, module: str, n: int = 1000) -> Config:
    sources = {"train": {"kind": f"{module}:ramp", "n": n}, "test": {"kind": f"{module}:ramp", "n": 10}}
    made = tiny(loss={"kind": f"{module}:square"}, train={"metrics": [f"{module}:bias"]})
    return parse_config(made | {"data": {"kind": "own", "sources": sources}})


@pytest.mark.parametrize("module", ["mine", "mine.py"])
def test_sources_and_code_of_one_s_own(tiny_config: Tiny, in_tmp: Path, module: str) -> None:
    Path("mine.py").write_text(MINE)
    config = own_config(tiny_config, module)
    before = now(config)
    code = f"code.{in_tmp / 'mine.py' if module == 'mine.py' else 'mine'}"
    assert list(before) == ["data.rows", "data.sources.train", "data.sources.test", code]
    assert before["data.rows"] == {"train": 1000, "test": 10}
    assert before["data.sources.train"]["what"] == config.data.sources.train.kind  # type: ignore[union-attr]
    assert before[code]["digest"] == sha256(Path("mine.py"))
    Path("run.toml").write_text(dump_config(config))
    assert changes(before, now(load_config(Path("run.toml")))) == {}
    sys.modules[str(in_tmp / "mine.py") if module == "mine.py" else "mine"].STEP = 0.25  # type: ignore[attr-defined]
    found = changes(before, now(config))
    assert set(found) == {"data.sources.train", "data.sources.test"}
    assert all(words.endswith(f"{module}:ramp has other rows than it had") for words in found.values())
    change_byte(Path("mine.py"))
    assert changes(before, now(config))[code] == f"{in_tmp / 'mine.py'} has other content than it had"


def test_code_that_is_no_source(tiny_config: Tiny, in_tmp: Path) -> None:
    for name in ("losses", "metrics"):
        Path(f"{name}.py").write_text(MINE + f"# {name}")
    config = tiny_config(loss={"kind": "losses:square"}, train={"metrics": ["rmse", "metrics.py:bias"]})
    before = now(config)
    assert now(Config.model_validate(config)) == before  # whose names of files are not made absolute
    assert list(before) == ["data.rows", "code.losses", f"code.{in_tmp}/metrics.py"]
    assert before[f"code.{in_tmp}/metrics.py"]["what"] == f"{in_tmp}/metrics.py"
    change_byte(Path("losses.py"))
    assert changes(before, now(config)) == {"code.losses": f"{in_tmp}/losses.py has other content than it had"}


class Table(Source):
    """Rows of an array. The one of number `broken` cannot be read."""

    def __init__(self, table: np.ndarray, broken: int = -1, *, weighted: bool = False) -> None:
        super().__init__(len(table), 1, 1, Task("none"), weighted=weighted)
        self.table = table
        self.broken = broken
        self.asked: list[int] = []

    def fill(self, rows: Any, batch: Batch) -> None:
        self.asked += rows.tolist()
        if self.broken in rows:
            raise OSError("the tape is torn")
        batch.inputs[:, 0], batch.targets[:, 0] = self.table[rows, 0], self.table[rows, 1]
        if batch.weights is not None:
            batch.weights[:] = self.table[rows, 2]


def of_source(tiny: Tiny, source: Table) -> dict[str, dict[str, Any]]:
    config = parse_config(tiny() | {"data": {"kind": "own"}})
    dataset = own_data({"train": source}, config.loss.record(), NumpyBackend())
    source.asked.clear()
    return identity(config, dataset)


@pytest.mark.parametrize("n", [1, 256, 257, 100_000])
def test_rows_of_a_source_that_python_gave(tiny_config: Tiny, n: int) -> None:
    table = np.random.default_rng(1).uniform(1, 2, (n, 3))
    source = Table(table, weighted=True)
    before = of_source(tiny_config, source)
    assert before["data.rows"] == {"train": n}
    assert before["data.sources.train"]["what"] == "Table"
    assert before[f"code.{__name__}"]["digest"] == sha256(Path(__file__))
    assert changes(before, of_source(tiny_config, source)) == {}
    asked = sorted(set(source.asked))
    assert len(asked) == min(n, 256)
    assert (asked[0], asked[-1]) == (0, n - 1)
    assert max(np.diff(asked), default=0) <= max(1, n // 60)  # evenly
    for row in (0, n // 2 if n < 257 else n - 2, n - 1):
        for column in range(3):
            other = table.copy()
            other[row, column] += 1
            found = changes(before, of_source(tiny_config, Table(other, weighted=True)))
            assert found == {"data.sources.train": "Table has other rows than it had"}


def test_a_row_that_cannot_be_read_is_the_training_s_affair(tiny_config: Tiny) -> None:
    table = np.ones((300, 2))
    before = of_source(tiny_config, Table(table, broken=299))
    assert changes(before, of_source(tiny_config, Table(table, broken=299))) == {}
    assert set(changes(before, of_source(tiny_config, Table(table)))) == {"data.sources.train"}


def test_rows_of_a_source_on_a_device(backend: Backend, tiny_config: Tiny) -> None:
    config = parse_config(tiny_config())
    resident = load_data(config, backend=backend)
    made = parse_config(tiny_config() | {"data": {"kind": "own"}})
    on_device = identity(made, own_data(resident.sources, made.loss.record(), backend))
    assert set(on_device) == {"data.rows", "data.sources.train", "data.sources.validation", "data.sources.test"}
    other = load_data(parse_config(tiny_config(seed=3)), backend=backend)
    found = changes(on_device, identity(made, own_data(other.sources, made.loss.record(), backend)))
    assert set(found) == set(on_device) - {"data.rows"}


def test_a_file_that_cannot_be_read_says_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        _file(tmp_path / "x.npy")
    assert caught.value.filename == str(tmp_path / "x.npy")
    unreadable = Path("/proc/self/mem")
    if unreadable.exists():
        with pytest.raises(OSError, match="Input/output error") as failed:
            _file(unreadable)
        assert failed.value.filename == str(unreadable)
