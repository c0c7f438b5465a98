"""Whatever bytes a file consists of, it is read or refused in one line: no traceback, no hang, and no memory for what
it merely says it has."""

from __future__ import annotations

import ast
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
from conftest import ROOT
from hostile_changes import npy_bytes, sealed
from safetensors.numpy import load_file, save_file

import gpu_bp
from gpu_bp import NumpyBackend, UserError, load_config
from gpu_bp.cli import main
from gpu_bp.config_file import KEY_PARTS
from gpu_bp.data import csv_table, parquet_table, table
from gpu_bp.data.arrays import NpyFile
from gpu_bp.data.shards import ShardReader
from gpu_bp.model import Model
from gpu_bp.tensor_file import read_shapes, read_tensors
from gpu_bp.whole_file import part_of, write_whole

Tiny = Callable[..., dict[str, Any]]


def nested(depth: int) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for _ in range(depth):
        tables = {"a": tables}
    return tables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts["training"].update(step=10**400), "facts.training.step"),
        (lambda facts: facts["training"].update(rows=10**400), "facts.training.rows"),
        (lambda facts: facts["training"].update(epoch=2**64), "facts.training.epoch"),
        (lambda facts: facts["training"]["loss"].update(rows=10**400), "facts.training.loss.rows"),
        (lambda facts: facts["training"].update(seconds=0.0), ""),
        (lambda facts: facts["metrics"].update(bytes=10**400), "facts.metrics.bytes"),
        (lambda facts: facts.update(data={"data.rows": 3}), "facts.data.data.rows"),
        (lambda facts: facts.update(data={"data.rows": {"train": "x"}}), "data.rows does not say what data are"),
        (lambda facts: facts.update(data={"data.path": {"what": "x"}}), "data.path does not say what data are"),
        (lambda facts: facts.update(config=nested(700)), "was started with another config"),
        (lambda facts: facts.update(environment={"numpy": "\x1b[2J"}), r"was \x1b[2J"),
    ],
)
def test_checkpoints(
    change: Callable[[Any], Any], message: str, tiny_config: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is whole by its checksum, and yet was made by somebody: it is taken, passed over, or refused."""
    gpu_bp.train(tiny_config(), backend="numpy", run=tmp_path / "run", pictures=False)
    (path,) = (tmp_path / "run/checkpoints").glob("*.json")
    body = json.loads(path.read_bytes())
    del body["checksum"]
    change(body["facts"])
    path.write_bytes(sealed(body))
    with pytest.raises(SystemExit) as ended:
        main(["resume", str(tmp_path / "run"), "--backend", "numpy"])
    out, err = capsys.readouterr()
    assert ended.value.code in (0, 2)
    assert err.count("\n") <= 1
    assert message in out + err
    assert "\x1b" not in out + err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a." * 100_000 + "a = 1", f"a key has {KEY_PARTS} parts or more"),  # tomllib takes hours
        ("['a' . " + "'a'." * 50_000 + "a]", f"a key has {KEY_PARTS} parts or more"),
        ("x = " + "[" * 5000, "recursion"),
        ("x = " + ("{" + "a." * 20 + "a = ") * 200 + "1" + "}" * 200, "nested too deep"),
        ("seed = 0x" + "f" * 5000, "seed has more than 10000 bits"),
        ("seed = " + "9" * 5000, "Exceeds the limit"),
        ("seed = 1979-05-27", "seed: input should be a valid integer, not 1979-05-27"),
        ('name = "\\u001b[2J"', r"not '\x1b[2J'"),
        (f"loss.kind = '{'adamax' * 100_000}'", "unknown loss 'adamaxadamax"),
        (f"network.hidden = [{'1, ' * 100_000}]", "network.hidden: list should have at most 1000 items"),
        (f"loss = {{kind = 'quantile', levels = [{'0.5, ' * 100_000}]}}", "not [0.5, 0.5, 0.5, 0.5"),
        ('data = {kind = "shards", path = "a\\u0000b"}', r"a\x00b is not a shard folder: there is no such folder"),
    ],
)
def test_configs(text: str, message: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = "" if text.startswith("data") else "data.kind = 'xor'"
    rest = "optimizer = {kind = 'sgd', learning_rate = 1}\ntrain.epochs = 1"
    Path("c.toml").write_text(f"{text}\n{data}\n{rest}")
    refused(capsys, message, "check-gradients", "c.toml")


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: object) -> None:
    """Runs a command, which must end with one line that has the message."""
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert exited.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err[:-1].isprintable()
    assert len(captured.err) < 5000
    assert message in captured.err


@pytest.fixture
def run(in_tmp: Path, tiny_config: Tiny) -> Path:
    """A trained run on data with two inputs."""
    gpu_bp.train(tiny_config(loss={"kind": "cross_entropy"}), backend="numpy", run="run", pictures=False)
    return in_tmp / "run"


def described(run: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The run's model with its description changed."""
    path = run / "model.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    description = json.loads(header["__metadata__"]["gpu_bp"])
    changed = change(description)
    text = changed if isinstance(changed, str) else json.dumps(description)
    save_file(load_file(path), path, metadata={"gpu_bp": text})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(widths=[10**9] * 3), "has shape (5, 2), this network needs (1000000000, 1000000000)"),
        (lambda d: d.update(widths=[2, 10**30, 2]), "widths.1: input should be"),
        (lambda d: d.update(widths=[2, True, 2]), "widths.1: input should be a valid integer"),
        (lambda d: d.update(widths=[2] * 10**5), "99999 layers need as many activations, not 2"),
        (lambda d: d.update(biases="no"), "biases: input should be a valid boolean"),
        (lambda d: d.update(dtype="object"), "dtype: input should be"),
        (lambda d: d.update(code="x"), "code: extra inputs are not permitted"),
        (lambda d: d["preparation"].update(scale=[1.0, float("nan")]), "preparation.scale.1: input should be a finite"),
        (lambda d: d["preparation"].update(scale=[1, 0]), "preparation.scale.1: input should be greater than 0"),
        (lambda d: d["preparation"].update(shift=[0] * 10**5), "there must be as many shifts as scales"),
        (lambda d: d["preparation"].update(shift=[0], scale=[1]), "gives 1 inputs, its network takes 2"),
        (lambda d: d["preparation"].update(classes=["a"]), "its 1 classes do not go with 2 outputs"),
        (lambda d: d["preparation"].update(classes=[["a"]]), "preparation.classes.0: input should be a valid string"),
        (lambda d: d.update(loss={"kind": "quantile", "levels": [0.1, 0.5, 0.9]}), "do not go with 2 outputs"),
        (lambda d: d["activations"][0].update(kind="os:system"), "names code, os:system"),
        (lambda d: d["activations"][0].update(kind="tanh" * 10**5), "unknown activation 'tanhtanh"),
        (lambda d: "[" * 10**5, "recursion limit"),
        (lambda d: '{"format": ' + "9" * 10**6 + "}", "number out of range"),
        (lambda d: '{"format": "\\ud800"}', "not a model of gpu_bp"),
    ],
)
def test_models(
    change: Callable[[dict[str, Any]], Any], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("x.npy", np.ones((1, 2)))
    described(run, change)
    refused(capsys, message, "predict", "run", "x.npy")
    refused(capsys, message, "evaluate", "run", "--backend", "numpy")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8, 3])
def test_the_length_of_a_models_header(run: Path, length: int) -> None:
    path = run / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(UserError, match="is not a safetensors file"):
        Model.load(path, NumpyBackend())


PROMISES = "its header promises"
NO_HEADER = "its header is not that of an array of plain numbers"


@pytest.mark.parametrize(
    ("descr", "shape", "version", "length", "message"),
    [
        ("<f8", f"({2**58}, 2)", 1, 0, PROMISES),
        ("<f8", f"({2**32}, {2**32})", 1, 0, PROMISES),  # no bytes at all, in 64 bits
        ("<f8", f"({10**18 - 1}, {10**18 - 1})", 1, 0, PROMISES),
        ("<f8", "(2**62, 2)", 1, 0, NO_HEADER),
        ("<f8", "(-3, -2)", 1, 0, NO_HEADER),
        ("<f8", "(" * 9000, 1, 0, NO_HEADER),
        ("<f8", "-" * 9000 + "1", 1, 0, NO_HEADER),
        ("<f8", f"({'9' * 5000},)", 1, 0, NO_HEADER),
        ("<f8", "(3, 2)", 2, 2**32 - 1, "its header is said to be of 4294967295 bytes"),
        ("<f8", "(3, 2)", 1, 9999, NO_HEADER),
        ("<f8", "(3, 2)", 9, 0, "it does not begin as a .npy file"),
        ("|O", "(3, 2)", 1, 0, "must hold one array of real numbers with 1 or 2 dimensions, not object"),
        ("|V9999", "(3, 2)", 1, 0, "not |V9999"),
        ("<f8", "(3, 2, 1)", 1, 0, "of shape (3, 2, 1)"),
        ("<f8", "(0, 2)", 1, 0, "is empty"),
    ],
)
def test_npy_headers(descr: str, shape: str, version: int, length: int, message: str, tmp_path: Path) -> None:
    """In a file of its own, in a shard, and in an archive of weights."""
    data = npy_bytes(descr, shape, "False", version, length, 48, "")
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(UserError, match="x.npy") as caught:
        NpyFile(tmp_path / "x.npy", "inputs")
    assert message in str(caught.value)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", data)
    if message not in ("is empty", "of shape (3, 2, 1)"):
        with pytest.raises(UserError, match="x.npz is not an .npz file"):
            read_tensors(tmp_path / "x.npz")


def test_headers_of_other_writers(tmp_path: Path) -> None:
    """Any order, quotes and spaces; a version that is later; padding or none."""
    data = np.arange(6.0).tobytes()
    for text in (
        '{"shape":(3,2),"fortran_order":False,"descr":"<f8"}',
        "{ 'descr' : '<f8' ,'shape' : ( 3L, 2L ) ,'fortran_order' : False , }  \n",
    ):
        for version, size in ((1, 2), (2, 4), (3, 4)):
            header = b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(size, "little") + text.encode()
            (tmp_path / "x.npy").write_bytes(header + data)
            np.testing.assert_array_equal(NpyFile(tmp_path / "x.npy", "x").read(0, 3), [[0, 1], [2, 3], [4, 5]])


def test_archives(tmp_path: Path) -> None:
    """Sizes that deflate cannot reach, another compression, a name twice, and a sum that does not hold."""
    good = io.BytesIO()
    np.lib.format.write_array(good, np.zeros((1000, 100)), allow_pickle=False)
    path = tmp_path / "x.npz"
    for method, message in ((zipfile.ZIP_DEFLATED, ""), (zipfile.ZIP_LZMA, "compressed in another way")):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("a.npy", good.getvalue())
        if message:
            with pytest.raises(UserError, match=message):
                read_shapes(path)
        else:
            assert read_shapes(path) == {"a": (1000, 100)}
            data = path.read_bytes()
    entry = data.index(b"PK\x01\x02")
    bomb = npy_bytes("<f8", "(100000000, 100)", "False", 1, 0, 0, "")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bomb)
    with pytest.raises(UserError, match=r"a is said to have the shape \(100000000, 100\), which does not fit its size"):
        read_shapes(path)
    path.write_bytes(data[: entry + 16] + b"\0\0\0\0" + data[entry + 20 :])
    with pytest.raises(UserError, match="CRC"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,b\n" + b"1," * 2**22, "after line 1: a row is longer than 4 MiB"),
        (b"a" * 2**23, "line 1: a row is longer than 4 MiB"),
        (b"a,b\n" + b"\n" * 2**23, "a row is longer than 4 MiB"),
        (b'a,b\n"' + b"x" * 2**22, "field larger than field limit (131072)"),
        (b'a,b\n1,"2\n', "unexpected end of data"),
        (b"a,b\n1,\0\n", r"'\x00' is not a number"),
        (b"a,b\n1,\xff\n", "not text in UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "not text in UTF-8"),
        (b"a,b\r1,2\r\n3\n", "line 3: 1 fields, the header has 2"),
        (",".join(map(str, range(10**5))).encode() + b",a\n1\n", "there are 100001 columns; 65536 are the most"),
        (b"a," * 50_000 + b"a\n1\n", "the column 'a' is there twice"),
        (b"\x1b]0;x\x07,b\n1,2\n3\n", "line 3: 1 fields"),
    ],
)
def test_tables(data: bytes, message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.csv").write_bytes(data)
    refused(capsys, message, "predict", "run", "x.csv")


def test_as_many_columns_as_are_read(run: Path) -> None:
    """They are read at once, not column by column."""
    names, n = [f"c{k}" for k in range(table.MOST_COLUMNS)], table.MOST_COLUMNS
    Path("x.csv").write_text(",".join(names) + "\n" + "1," * (n - 1) + "1\n")
    with pytest.raises(UserError, match=f"has {n} columns, this network takes 2 inputs"):
        Model.load(run / "model.safetensors", NumpyBackend()).predict(Path("x.csv"))
    chunk = csv_table.CsvTable(Path("x.csv")).chunk(0)
    assert chunk.numbers(names[-1]) == [1]
    assert chunk._arrow_table is None  # pyarrow takes seconds, and hundreds of megabytes


def test_names_that_are_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of long ones, and of many, none is looked for that is near."""
    long = "".join(map(chr, range(0x4E00, 0x9E00))) * 3
    config = (
        f"[data]\nkind='table'\npath='x.csv'\ntarget_columns=['{long}b']\n[optimizer]\nkind='sgd'\nlearning_rate=1\n"
    )
    Path("x.csv").write_text(f"{long},b\n1,2\n")
    Path("c.toml").write_text(f"{config}[train]\nepochs=1")
    refused(capsys, "unknown column", "check-gradients", "c.toml")


def test_parquet_files(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = Path("x.parquet")
    pq.write_table(pa.table({"a": np.zeros(10**6), "b": np.zeros(10**6)}), file)
    good = file.read_bytes()
    assert len(good) < 10**5  # numbers that are all alike take no room
    with monkeypatch.context() as patched:
        patched.setattr(parquet_table, "GROUP_ROWS", 10**5)
        refused(capsys, "has a row group of 1000000 rows; 100000 are the most", "predict", "run", file)
    for data in (b"", b"PAR1", good[:-1], good[: len(good) // 2], good[:-8] + b"\xff\xff\xff\x7fPAR1", b"PAR1" * 99):
        file.write_bytes(data)
        refused(capsys, "x.parquet is not a Parquet file, or not a whole one", "predict", "run", file)
    pq.write_table(pa.table({"a": pa.array([b"\xff"]).cast(pa.string(), safe=False), "b": [1]}), file)
    refused(capsys, "x.parquet, rows 0 to 0, column a: ", "predict", "run", file)


HUGE = 10**18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(rows=HUGE), "no shard has 20 rows from row 0 on"),
        (lambda m: m.update(rows=10**400), "manifest.json, rows: "),
        (lambda m: m.update(rows=HUGE, shard_rows=HUGE, shards=[m["shards"][0] | {"rows": HUGE}]), "do not fit into"),
        (lambda m: m.update(block_rows=HUGE), "block_rows: input should be less than or equal to 1024"),
        (lambda m: m.update(n_inputs=2**31 - 1), "rows 0 to 19 do not fit into their files"),
        (lambda m: m.update(n_targets=2**31 - 1, classes=[]), "rows 0 to 19 do not fit into their files"),
        (lambda m: m.update(n_inputs=True), "n_inputs: input should be a valid integer"),
        (lambda m: m["shards"][0]["files"][0].update(name="../run/x.npy"), "files.0.name: string should match pattern"),
        (lambda m: m["shards"][0]["files"][0].update(name="/etc/passwd"), "files.0.name: string should match pattern"),
        (lambda m: m["shards"][0]["files"][0].update(name="other.npy"), "other.npy is missing"),
        (lambda m: m.update(format=[[[]]]), "its format is [[[]]], this version of gpu_bp reads format 1"),
        (lambda m: m.update(classes=["a"] * 3, config={"x": [[float("nan")]]}), ""),
        (lambda m: "[" * 10**5, "manifest.json is not JSON"),
        (lambda m: '{"format": ' + "1" * 10**6 + "}", "manifest.json is not JSON"),
        (lambda m: '{"format": "\\ud800"}', "manifest.json is not JSON"),
    ],
)
@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_manifests(change: Callable[[Any], Any], message: str, file_format: str, run: Path) -> None:
    if file_format == "parquet":
        pytest.importorskip("pyarrow")
    arguments = ["--rows", 20, "--format", file_format, "-o", "folder", "--quiet", "--backend", "numpy"]
    hostile.command("generate", run / "config.toml", *arguments)
    path = Path("folder/manifest.json")
    manifest = json.loads(path.read_text())
    changed = change(manifest)
    path.write_text(changed if isinstance(changed, str) else json.dumps(manifest))
    if not message:
        assert ShardReader("folder").read(0, 20).inputs.shape == (20, 2)
        return
    with pytest.raises(UserError) as caught:
        ShardReader("folder").read(0, 1)
    assert message in str(caught.value)


def test_labels_of_shards_are_looked_at(run: Path) -> None:
    """Their checksum is anybody's, and they become indices."""
    hostile.command("generate", run / "config.toml", "--rows", 20, "-o", "folder", "--quiet", "--backend", "numpy")
    manifest = json.loads(Path("folder/manifest.json").read_text())
    manifest["classes"] = ["a"]
    Path("folder/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="class 1 is none of 0 to 0"):
        ShardReader("folder").read(0, 20)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file(kind: str, run: Path) -> None:
    """Nothing waits for a pipe, reads a device without end, or follows a loop of links."""

    def put(path: Path) -> Path:
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if kind == "device" else path)
        return path

    hostile.command("generate", run / "config.toml", "--rows", 20, "-o", "folder", "--quiet", "--backend", "numpy")
    put(Path("folder/inputs-00000.npy"))
    readers: dict[str, Callable[[Path], Any]] = {
        "c.toml": load_config,
        "folder/inputs-00000.npy": lambda _: ShardReader("folder"),
        "folder/manifest.json": lambda _: ShardReader("folder"),
        "x.csv": csv_table.CsvTable,
        "x.parquet": parquet_table.ParquetTable,
        "x.npy": lambda path: NpyFile(path, "x"),
        "x.npz": read_tensors,
        "run/model.safetensors": lambda path: Model.load(path, NumpyBackend()),
    }
    for name, read in readers.items():
        path = Path(name) if name == "folder/inputs-00000.npy" else put(Path(name))
        with pytest.raises(UserError):
            read(path)


def test_weights_too_large_for_the_network(run: Path) -> None:
    path = run / "model.safetensors"
    data = {name: tensor.astype(np.float64) for name, tensor in load_file(path).items()}
    data["layers.0.weights"][0, 0] = 1e300
    network = Model.load(path, NumpyBackend()).network
    with pytest.raises(UserError, match="layers.0.weights has numbers that are too large for float32"):
        network.load(data)


# Nothing of what is read is run ---------------------------------------------------------------------------------


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """The calls in a module, by the last name of what is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            yield name, node


def test_nothing_is_unpickled_or_evaluated() -> None:
    """Arrays are read and written without pickle, which is said each time; nothing else that runs code is used."""
    numpys = {"save", "load", "savez", "savez_compressed", "read_array", "write_array", "open_memmap"}
    found = 0
    for path in [file for folder in ("gpu_bp", "kernels", "benchmarks") for file in (ROOT / folder).rglob("*.py")]:
        for name, call in calls(path):
            whose = ast.unparse(call.func)
            assert whose not in ("eval", "exec", "compile", "torch.load"), (path, call.lineno)
            if name in numpys and whose.startswith(("np.", "numpy.")):
                found += 1
                assert "allow_pickle=False" in ast.unparse(call), (path, call.lineno)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules = {name.partition(".")[0] for name in names}
            assert not modules & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
    assert found > 1


def test_what_is_written_follows_no_link_that_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear Simon")
    part_of(tmp_path / "summary.json").symlink_to(tmp_path / "letter.txt")
    write_whole(tmp_path / "summary.json", "{}")
    assert (tmp_path / "letter.txt").read_text() == "Dear Simon"
    assert (tmp_path / "summary.json").read_text() == "{}"
    assert not (tmp_path / "summary.json").is_symlink()
