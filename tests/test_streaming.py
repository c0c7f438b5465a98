"""Rows that do not all lie in memory: the same bits as those that do, and what breaks there."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w

from gpu_bp import Model, NumpyBackend, Trainer, UserError, load_data, parse_config
from gpu_bp.backends import Backend
from gpu_bp.cli import main
from gpu_bp.data.arrays import ArrayReader
from gpu_bp.data.shards import write_shards
from gpu_bp.data.sources import SetReader
from gpu_bp.data.synthetic import make_set
from gpu_bp.generate import all_rows

SAMPLINGS = ["ordered", "shuffled", "replacement"]
SMALL = {"residency": "host", "block_rows": 7, "window_blocks": 3}
SETS: dict[str, dict[str, Any]] = {
    "teacher": {"data": {"n_inputs": 3, "hidden": [4]}, "loss": {"kind": "squared_error"}},
    "double-moon": {"data": {"scaling": "none"}, "loss": {"kind": "cross_entropy"}},
}
Write = Callable[..., dict[str, Any]]


@pytest.fixture
def config() -> Write:
    """A config of generated data: 200 rows for training, with any section changed."""

    def make(kind: str = "teacher", **sections: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            "data": {"kind": kind, "rows": 200, "validation_rows": 40, "test_rows": 30, **SETS[kind]["data"]},
            "network": {"hidden": [5]},
            "loss": SETS[kind]["loss"],
            "optimizer": {"kind": "sgd", "learning_rate": 0.1},
            "train": {"epochs": 3, "batch_size": 16, "sampling": "shuffled"},
        }
        for name, section in sections.items():
            made[name] = {**made.get(name, {}), **section}
        return made

    return make


def as_shards(config: dict[str, Any], folder: Path, **how: Any) -> dict[str, Any]:
    """The same config on shards of the same rows."""
    parsed = parse_config(config)
    if not folder.exists():
        rows = all_rows(parsed)
        reader = SetReader(NumpyBackend(), make_set(parsed.data, parsed.seed), parsed.seed, "generated", rows)
        write_shards(reader, folder, rows=rows, config={}, shard_rows=90, **how)
    kept = ("validation_rows", "test_rows", "residency", "block_rows", "window_blocks", "scaling")
    section = {key: value for key, value in config["data"].items() if key in kept}
    return {**config, "data": {**section, "kind": "shards", "path": str(folder)}}


def trained(config: dict[str, Any], backend: Backend | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The parameters that a training gives, and the metrics on the splits."""
    trainer = Trainer(parse_config(config), backend or NumpyBackend())
    for _ in trainer.run():
        pass
    return trainer.model.network.tensors(), trainer.evaluate()


def assert_same(one: tuple[dict[str, np.ndarray], Any], other: tuple[dict[str, np.ndarray], Any]) -> None:
    assert one[1] == other[1]
    for name, tensor in one[0].items():
        np.testing.assert_array_equal(tensor, other[0][name], err_msg=name)


# the same bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize(("file_format", "dtype"), [("npy", "float64"), ("npy", "float32"), ("parquet", "float32")])
def test_shards_train_as_the_generator_does(
    config: Write, tmp_path: Path, kind: str, file_format: str, dtype: str
) -> None:
    """Bit for bit, metrics too, whatever the sampling and wherever the rows lie."""
    for sampling in SAMPLINGS:
        for data in (SMALL, {"residency": "host"}, {"residency": "device"}):
            generated = config(kind, data=data, train={"sampling": sampling})
            shards = as_shards(generated, tmp_path / "shards", file_format=file_format, dtype=dtype)
            assert_same(trained(generated), trained(shards))


@pytest.mark.parametrize("kind", SETS)
def test_scaled_shards_train_as_the_generator_does(config: Write, tmp_path: Path, kind: str) -> None:
    generated = config(kind, data={**SMALL, "scaling": "standardise"}, train={"precision": "float64"})
    assert_same(trained(generated), trained(as_shards(generated, tmp_path / "shards")))


def test_shards_on_each_backend(backend: Backend, config: Write, tmp_path: Path) -> None:
    """In windows that are copied to the device, shards give what they give where the device has them all."""
    for data in (SMALL, {**SMALL, "block_rows": 100, "window_blocks": 1}):
        streamed = as_shards(config(data=data, train={"sampling": "ordered"}), tmp_path / "shards")
        resident = {**streamed, "data": {**streamed["data"], "residency": "device"}}
        assert_same(trained(streamed, backend), trained(resident, backend))


@pytest.mark.parametrize("kind", ["arrays", "table"])
def test_files_larger_than_the_limit_train_in_order_as_resident_ones(config: Write, in_tmp: Path, kind: str) -> None:
    rows = np.random.default_rng(0).standard_normal((270, 4))
    np.save("x.npy", rows[:, :3])
    np.save("d.npy", rows[:, 3])
    Path("t.csv").write_text("a,b,c,y\n" + "".join(",".join(map(str, row)) + "\n" for row in rows.tolist()))
    sections = {
        "arrays": {"inputs": "x.npy", "targets": "d.npy", "scaling": "standardise"},
        "table": {"path": "t.csv", "target_columns": ["y"]},
    }
    made = config(train={"sampling": "ordered"})
    section = {"kind": kind, **sections[kind], "validation_rows": 40, "test_rows": 30, "block_rows": 9}
    made["data"] = {**section, "window_blocks": 2}
    small = NumpyBackend()
    small.resident_bytes = 1000
    assert "read as they are needed (more than 0 MiB)" in Trainer(parse_config(made), small).where_data
    assert_same(trained(made), trained(made, small))


def test_files_are_read_in_small_parts(config: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However many rows are asked for at once, so that what is made of them on the way stays small."""
    parts: list[int] = []
    read = ArrayReader.read
    monkeypatch.setattr("gpu_bp.data.sources.READ_NUMBERS", 2000)
    monkeypatch.setattr(
        ArrayReader, "read", lambda self, first, n, out=None: [parts.append(n), read(self, first, n)][1]
    )
    np.save(tmp_path / "x.npy", np.arange(6000.0).reshape(3000, 2))
    np.save(tmp_path / "d.npy", np.arange(3000.0))
    data = {"kind": "arrays", "inputs": str(tmp_path / "x.npy"), "targets": str(tmp_path / "d.npy"), "test_rows": 500}
    dataset = load_data(parse_config({**config(), "data": data}))
    rows = dataset.rows("test")
    np.testing.assert_array_equal(rows.inputs, np.arange(5000.0, 6000).reshape(500, 2))
    dataset.rows("train")
    assert parts == [500, 1001, 1001, 498]


# where the rows lie ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [False, True])
def test_residency(config: Write, tmp_path: Path, shards: bool) -> None:
    """`auto` puts on the device what fits, and a line says what was done; in order the bits are the same."""
    made = config(train={"sampling": "ordered"})
    n_bytes, outcomes = 270 * (3 + 1) * 4, []
    for residency, limit, said in (
        ("auto", n_bytes, "on the device (they fit)"),
        ("auto", n_bytes - 1, "as they are needed (more than 0 MiB)"),
        ("device", 0, "on the device (as asked)"),
        ("host", n_bytes, "as they are needed (as asked)"),
    ):
        made["data"]["residency"] = residency
        backend, chosen = NumpyBackend(), as_shards(made, tmp_path / "shards") if shards else made
        backend.resident_bytes = limit
        line = Trainer(parse_config(chosen), backend).where_data
        assert line.startswith("data: 270 rows, 0.004 MiB, ")
        assert line.endswith(said)
        assert ("read as" if shards else "generated as") in line or "needed" not in line
        outcomes.append(trained(chosen, backend))
    for outcome in outcomes[1:]:
        assert_same(outcome, outcomes[0])


# what breaks ------------------------------------------------------------------------------------------------


def test_the_reader_goes_with_its_training(config: Write, tmp_path: Path) -> None:
    """Nothing keeps a trainer alive, nor its thread, however it ended."""
    for how in ("whole", "left"):
        trainer = Trainer(parse_config(as_shards(config(data=SMALL), tmp_path / "shards")), NumpyBackend())
        list(islice(trainer.run(), None if how == "whole" else 3))
        trainer.evaluate()
        gone = weakref.ref(trainer)
        readers = {thread for thread in threading.enumerate() if thread.name.startswith("gpu_bp-reader")}
        assert readers
        del trainer
        gc.collect()
        assert gone() is None
        for thread in readers:
            thread.join(30)
            assert not thread.is_alive()


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def broken_shards(config: dict[str, Any]) -> dict[str, Any]:
    made = as_shards(config, Path("shards"))
    flip_a_byte(Path("shards/inputs-00001.npy"))  # rows 90 to 179
    return made


def broken_arrays(config: dict[str, Any]) -> dict[str, Any]:
    rows = np.random.default_rng(0).standard_normal((270, 3))
    rows[100, 1] = np.nan
    np.save("x.npy", rows)
    np.save("d.npy", np.ones(270))
    return {**config, "data": {**KEPT, "kind": "arrays", "inputs": "x.npy", "targets": "d.npy"}}


def broken_csv(config: dict[str, Any]) -> dict[str, Any]:
    lines = [f"{k % 7},{k % 5}\n" for k in range(9000)]
    lines[8500] = "6\n"
    Path("t.csv").write_text("a,y\n" + "".join(lines))
    data = {**KEPT, "kind": "table", "path": "t.csv", "target_columns": ["y"], "test_rows": 4500}
    return {**config, "data": data, "train": {"steps": 40, "log_every": 2}}


def broken_parquet(config: dict[str, Any]) -> dict[str, Any]:
    numbers: list[float | None] = [float(k % 7) for k in range(270)]
    numbers[261] = None
    pq.write_table(pa.table({"a": numbers, "y": np.arange(270.0) % 5}), "t.parquet", row_group_size=30)
    return {**config, "data": {**KEPT, "kind": "table", "path": "t.parquet", "target_columns": ["y"]}}


KEPT = {**SMALL, "validation_rows": 40, "test_rows": 30}
STEPS = {"epochs": 2, "batch_size": 10, "sampling": "ordered", "log_every": 2}


@pytest.mark.parametrize(
    ("broken", "lines", "message"),
    [
        # rows 84 to 104 are the fifth window; eight batches come without it
        (broken_shards, 4, "inputs-00001.npy was changed: its checksum is not the one in manifest.json; delete it and"),
        (broken_arrays, 4, "x.npy has a NaN or infinity in row 100 (counting from 0)"),
        # test rows are first read when the training is done
        (broken_csv, 20, "t.csv, line 8502: 1 fields, the header has 2"),
        (broken_parquet, 20, "t.parquet, row 261 (counting from 0), column a: the value is null"),
    ],
)
def test_what_breaks_while_it_is_read(
    config: Write, in_tmp: Path, capsys: pytest.CaptureFixture[str], broken: Any, lines: int, message: str
) -> None:
    """One line, exit status 2, and the metrics so far, at the same step each time."""
    made = broken(config(data=KEPT, train=STEPS))
    Path("config.toml").write_text(tomli_w.dumps(made))
    for run in ("a", "b"):
        with pytest.raises(SystemExit) as exited:
            main(["train", "config.toml", "--run", run, "--backend", "numpy", "--quiet"])
        out, err = capsys.readouterr()
        assert (exited.value.code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
        assert f"(its metrics are in {run}/metrics.jsonl, its network after " in err
        assert Model.load(Path(run, "model.safetensors"), NumpyBackend()).network.widths
        metrics = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in metrics] == list(range(2, 2 * lines + 1, 2))
        assert not Path(run, "summary.json").exists()


def test_a_shard_that_breaks_in_the_middle_of_a_training(config: Write, tmp_path: Path) -> None:
    """A shard that is gone, or shorter, after it was verified."""
    for harm in (Path.unlink, lambda path: os.truncate(path, 500)):
        folder = tmp_path / harm.__name__
        made = parse_config(as_shards(config(data=KEPT, train={"epochs": 50}), folder))
        steps = Trainer(made, NumpyBackend()).run()
        next(line for line in steps if line)
        harm(folder / "inputs-00000.npy")
        with pytest.raises(UserError, match=r"inputs-00000\.npy(: No such file|.* became shorter while it was read)"):
            list(steps)


def test_ctrl_c_in_a_streamed_training(config: Write, in_tmp: Path) -> None:
    made = as_shards(config(data=KEPT, train={"epochs": 10**7, "log_every": 1000}), Path("shards"))
    Path("config.toml").write_text(tomli_w.dumps(made))
    arguments = ["train", "config.toml", "--run", "run", "--backend", "numpy"]
    with subprocess.Popen(
        [sys.executable, "-m", "gpu_bp", *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "step" in line)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "what was trained is saved" in out
    assert json.loads(Path("run/summary.json").read_text())["stopped"] == "interrupted"
    assert Path("run/model.safetensors").exists()
