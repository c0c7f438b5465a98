"""Generated hostile files, one family a kind of file: `python tests/hostile.py FAMILY INPUTS` feeds that many to it.

Valid files are changed (bytes flipped, cut, put in; numbers replaced; trees of JSON and TOML, headers of .npy files)
or made up of whatever a reader looks for. Whatever it is, it is read, or refused by a UserError: nothing else is
raised, and no input takes 5 s. What a family took is printed as JSON. Hypothesis draws the same inputs every time.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import resource
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import tomli_w
from hostile_changes import EDIT, TREE_EDIT, TREE_EDITS, VALUES, changed_bytes, changed_tree, edited, npy_files, sealed
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import save

import gpu_bp
from gpu_bp import NumpyBackend, UserError, load_config
from gpu_bp.cli import main
from gpu_bp.config_network import FileWeights
from gpu_bp.data.identity import identity
from gpu_bp.data.shards import ShardReader
from gpu_bp.environment import environment
from gpu_bp.generate import generate
from gpu_bp.initial import initialise
from gpu_bp.model import Model
from gpu_bp.network import Network
from gpu_bp.resuming import Resuming
from gpu_bp.run_folder import RunFolder
from gpu_bp.trainer import Trainer

SECONDS = 5  # of the processor, for one input
ADDRESSES = 4 * 2**30  # bytes of them, so that what is allocated and not touched is seen too

Case = tuple[Callable[[Any], None], st.SearchStrategy[Any]]  # what reads an input, and the inputs

# The families -------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "data": {"kind": "double-moon", "rows": 20, "validation_rows": 4, "width": 6.0, "scaling": "standardise"},
    "network": {"hidden": [3, 2], "activation": [{"kind": "leaky_relu", "slope": 0.1}, "tanh"], "weights": "he"},
    "loss": {"kind": "huber", "threshold": 0.5},
    "optimizer": {"kind": "adam", "learning_rate": 0.01, "eps": 1e-7},
    "schedule": {"kind": "cosine", "warmup_steps": 3},
    "regularisation": {"dropout": 0.1, "l2": 0.001},
    "train": {"epochs": 1, "batch_size": 8, "metrics": ["accuracy"]},
    "stopping": {"metric": "validation_loss", "patience": 2},
}
TABLE = "size,kind,price\n" + "".join(f"{k / 2},{'abc'[k % 3]},{k * k}\n" for k in range(12))


def config(folder: Path) -> Case:
    """Config files and overrides; what is right and small has its gradients checked by the command line."""
    path = folder / "config.toml"
    valid = [file.read_bytes() for file in sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))]

    def as_toml(tree: Any) -> bytes:
        try:
            return tomli_w.dumps(tree).encode()
        except (TypeError, ValueError, AttributeError):  # null, or no table
            return json.dumps(tree).encode()

    trees = st.builds(lambda edits: as_toml(changed_tree(CONFIG, edits)), TREE_EDITS)
    texts = changed_bytes(*valid, tomli_w.dumps(CONFIG).encode())
    override = st.one_of(
        st.just("network.hidden=[2]"),
        st.builds(lambda key, value: f"{key}={value}", st.sampled_from(KEYS), st.sampled_from(VALUES)),
        st.text(max_size=30),
    )

    def read(given: tuple[bytes, list[str]]) -> None:
        data, overrides = given
        path.write_bytes(data)
        parsed = load_config(path, overrides, trust_code=False)
        small = sum(parsed.network.hidden) < 50 and parsed.data.kind == "double-moon"
        if small and getattr(parsed.data, "rows", 0) + parsed.data.validation_rows + parsed.data.test_rows < 1000:
            command("check-gradients", path, *(override for override in overrides if not override.startswith("-")))

    return read, st.tuples(st.one_of(trees, texts), st.lists(override, max_size=2))


KEYS = [
    "train.epochs",
    "network.hidden",
    "seed",
    "data",
    "data.rows",
    "name",
    "optimizer.kind",
    "network.weights",
    "x.y",
]


def models(folder: Path) -> dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Tensors and descriptions of some models: of arrays, of a table, and of a loss with several outputs a target."""
    (folder / "table.csv").write_text(TABLE)
    table = {"kind": "table", "path": str(folder / "table.csv"), "categorical_columns": ["kind"]}
    changes: dict[str, dict[str, Any]] = {
        "arrays": {"loss": {"kind": "cross_entropy"}},
        "price": {"data": {**table, "target_columns": ["price"]}, "loss": {"kind": "quantile"}},
        "kind": {"data": {**table, "target_columns": ["kind"]}, "loss": {"kind": "cross_entropy"}},
        "linear": {
            "data": {"kind": "linear", "rows": 9, "n_inputs": 3, "n_targets": 2, "target_scaling": "standardise"},
            "network": {"hidden": [3], "normalise": True, "residual": True},
        },
    }
    made = {}
    for name, change in changes.items():
        config = {"optimizer": {"kind": "sgd", "learning_rate": 0.01}, "train": {"epochs": 1}}
        config |= {"network": {"hidden": [3]}, "data": {"kind": "double-moon", "rows": 9}, **change}
        result = gpu_bp.train(config, backend="numpy", run=folder / name, pictures=False)
        file = (folder / name / "model.safetensors").read_bytes()
        header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
        made[name] = result.model.network.tensors(), json.loads(header["__metadata__"]["gpu_bp"])
    return made


def model(folder: Path) -> Case:
    """Model files, and predictions of those that are right."""
    made = models(folder)
    np.save(folder / "x.npy", np.ones((3, 2)))
    path = folder / "model.safetensors"

    def whole(tensors: dict[str, np.ndarray], description: Any) -> bytes:
        return save(tensors, metadata={"gpu_bp": json.dumps(description)})

    def with_header(data: bytes, edits: Any, length: int) -> bytes:
        n = int.from_bytes(data[:8], "little")
        header = json.dumps(changed_tree(json.loads(data[8 : 8 + n]), edits)).encode()
        return ((length or len(header)) % 2**64).to_bytes(8, "little") + header + data[8 + n :]

    valid = [whole(*parts) for parts in made.values()]
    described = st.builds(
        lambda parts, edits: whole(parts[0], changed_tree(parts[1], edits)),
        st.sampled_from([*made.values()]),
        TREE_EDITS,
    )
    lengths = st.sampled_from([0] * 12 + [1, 2**31, 2**63, 10**8])
    headed = st.builds(with_header, st.sampled_from(valid), TREE_EDITS, lengths)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        loaded = Model.load(path, NumpyBackend())
        loaded.predict(folder / ("table.csv" if loaded.preparation.columns else "x.npy"))

    return read, st.one_of(described, described, headed, changed_bytes(*valid), st.sampled_from(valid))


def checkpoint(folder: Path) -> Case:
    """The numbers of a checkpoint, whose checksum is right as often as not; what is whole is gone on with."""
    options = {"train": {"steps": 4, "batch_size": 8}, "checkpoint": {"every_steps": 2}}
    parsed = gpu_bp.parse_config({**CONFIG, **options})
    gpu_bp.train(parsed, backend="numpy", run=folder / "run", pictures=False)
    path = folder / "run/checkpoints/step-0000000004.json"
    valid = path.read_bytes()
    body = {key: value for key, value in json.loads(valid).items() if key != "checksum"}

    trainer, metrics = Trainer(parsed, NumpyBackend()), (folder / "run/metrics.jsonl").read_bytes()
    described = {"environment": environment(trainer.model.network.backend), "data": identity(parsed, trainer.dataset)}
    logging.getLogger("gpu_bp").setLevel(logging.ERROR)  # each broken one is told of

    def read(data: bytes) -> None:
        path.write_bytes(data)
        (folder / "run/metrics.jsonl").write_bytes(metrics)
        Resuming(RunFolder(folder / "run"), parsed).restore(trainer, described)
        if trainer.steps == 2:
            raise UserError("it was passed over")

    return read, st.one_of(
        st.builds(lambda edits: sealed(changed_tree(body, edits)), TREE_EDITS), changed_bytes(valid), st.just(valid)
    )


def npy(folder: Path) -> Case:
    """.npy files of rows, and of the weights of a layer."""
    path = folder / "x.npy"
    preparation = gpu_bp.train(
        {
            "data": {"kind": "double-moon", "rows": 9},
            "optimizer": {"kind": "sgd", "learning_rate": 0.1},
            "train": {"steps": 1},
        },
        backend="numpy",
        run=folder / "run",
        pictures=False,
    ).model.preparation
    network = Network([2, 3], ["tanh"])

    def read(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            initialise(network, [FileWeights(kind="file", path=str(path))], 0)
        preparation.read(path)

    return read, npy_files(np.ones((3, 2)))


def npz(folder: Path) -> Case:
    """.npz files of initial weights."""
    path = folder / "weights.npz"
    network = Network([2, 3], ["tanh"])
    weights, biases = (io.BytesIO(), io.BytesIO())
    np.lib.format.write_array(weights, np.ones((3, 2)), allow_pickle=False)
    np.lib.format.write_array(biases, np.ones(3), allow_pickle=False)

    def archive(member: bytes, method: int, name: str, claims: int) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("layers.0.biases.npy", biases.getvalue())
            archive.writestr(name, member)
        data = file.getvalue()
        if claims:  # in the directory, of the last member's size
            entry = data.rindex(b"PK\x01\x02")
            data = data[: entry + 24] + struct.pack("<I", claims) + data[entry + 28 :]
        return data

    name = "layers.0.weights.npy"
    methods = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    names = st.sampled_from([name, name, name, name, "../x.npy", "x", "layers.0.biases"])
    claims = st.sampled_from([0, 0, 0, 0, 1, 2**32 - 1, 10**6])
    members = st.builds(archive, npy_files(np.ones((3, 2))), methods, names, claims)
    valid = [archive(weights.getvalue(), method, name, 0) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        initialise(network, [FileWeights(kind="file", path=str(path))], 0)

    return read, st.one_of(members, changed_bytes(*valid))


def table(folder: Path) -> Case:
    """csv files that are trained on and that are predicted from."""
    path = folder / "rows.csv"
    fields = st.sampled_from(
        ["1", "", '"', '""', '"a,b"', "1e999", "nan", "\0", " 2 ", "é", "\N{FULLWIDTH DIGIT ONE}", "1_0", "x" * 300]
    )
    ends = st.sampled_from(["\n", "\n", "\n", "\r", "\r\n", "\n\n", ""])
    lines = st.builds(lambda row, end: ",".join(row) + end, st.lists(fields, min_size=1, max_size=5), ends)
    heads = st.sampled_from(["a,b\n", "size,kind,price\n", ""])
    made = st.builds(lambda head, rows: (head + "".join(rows)).encode(), heads, st.lists(lines, max_size=8))
    wide = st.builds(lambda n, end: (",".join(map(str, range(n))) + ",a" + end).encode(), st.integers(1, 3000), ends)
    encoded = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]).map(TABLE.encode)
    return _of_tables(folder, path), st.one_of(changed_bytes(TABLE.encode()), made, made, wide, encoded)


def parquet(folder: Path) -> Case:
    """Parquet files likewise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    valid = []
    for k, compression in enumerate(("snappy", "zstd", "gzip", "none")):
        columns: dict[str, Any] = {"size": np.arange(20.0), "price": np.arange(20), "kind": list("abca" * 5)}
        columns["kind"] = pa.array(columns["kind"]).dictionary_encode() if k % 2 else columns["kind"]
        columns["other"] = pa.array(range(20)).cast(pa.decimal128(30, 2))
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, row_group_size=9, compression=compression, write_page_index=k > 1)
        valid.append(file.getvalue())

    def in_footer(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
        start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        footer = edited(data[start:-8], edits)
        return data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1"

    footers = st.builds(in_footer, st.sampled_from(valid), st.lists(EDIT, min_size=1, max_size=4))
    return _of_tables(folder, folder / "rows.parquet"), st.one_of(footers, changed_bytes(*valid))


def _of_tables(folder: Path, path: Path) -> Callable[[bytes], None]:
    models(folder)
    loaded = Model.load(folder / "price/model.safetensors", NumpyBackend())
    data = {"kind": "table", "path": str(path), "categorical_columns": ["kind"], "target_columns": ["price"]}
    config = {"data": data, "optimizer": {"kind": "sgd", "learning_rate": 0.1}, "train": {"epochs": 1}}
    parsed = gpu_bp.parse_config(config)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        refused = False
        try:
            loaded.predict(path)
        except UserError:
            refused = True
        gpu_bp.load_data(parsed).rows("train")
        if refused:
            raise UserError("refused")

    return read


def shards(folder: Path) -> Case:
    """Manifests and the files of shards, whose checksums are right."""
    config = {
        "data": {"kind": "double-moon", "rows": 30},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
        "train": {"epochs": 1},
    }
    parsed, quiet = gpu_bp.parse_config(config), Console(quiet=True)
    folders = {kind: folder / kind for kind in ("npy", "parquet")}
    for kind, place in folders.items():
        generate(parsed, place, backend=NumpyBackend(), file_format=kind, shard_rows=20, console=quiet)
    manifests = {kind: json.loads((place / "manifest.json").read_text()) for kind, place in folders.items()}
    contents = {
        kind: {file.name: file.read_bytes() for file in sorted(place.iterdir()) if file.suffix != ".json"}
        for kind, place in folders.items()
    }

    def read(given: tuple[str, Any]) -> None:
        kind, change = given
        place, manifest = folders[kind], manifests[kind]
        for name, data in contents[kind].items():
            (place / name).write_bytes(data)
        if isinstance(change, bytes):
            (place / "manifest.json").write_bytes(change)
        else:
            number, edits, tree_edits = change
            manifest = json.loads(json.dumps(manifest))
            files = [file for shard in manifest["shards"] for file in shard["files"]]
            data = edited(contents[kind][(file := files[number % len(files)])["name"]], edits)
            (place / file["name"]).write_bytes(data)
            file["bytes"], file["crc32"] = len(data), zlib.crc32(data)
            (place / "manifest.json").write_text(json.dumps(changed_tree(manifest, tree_edits)))
        reader = ShardReader(place)
        for first in range(0, min(reader.n_rows, 100), 10):
            reader.read(first, min(10, reader.n_rows - first))

    kinds = st.sampled_from(["npy", "parquet"])
    files = st.tuples(st.integers(0, 9), st.lists(EDIT, max_size=2), st.lists(TREE_EDIT, max_size=2))
    valid = changed_bytes(*((place / "manifest.json").read_bytes() for place in folders.values()))
    return read, st.tuples(kinds, st.one_of(files, files, files, valid))


def commands(folder: Path) -> Case:
    """Run folders and rows, by the command line: `predict` and `evaluate`, with one of their files changed."""
    models(folder)
    np.save(folder / "rows.npy", np.ones((3, 2)))
    rows = {"arrays": folder / "rows.npy", "price": folder / "table.csv", "kind": folder / "table.csv"}
    cases = [(name, "predict", folder / name / "model.safetensors") for name in rows]
    cases += [(name, "predict", path) for name, path in rows.items()]
    cases += [
        (name, "evaluate", folder / name / file) for name in rows for file in ("model.safetensors", "config.toml")
    ]
    valid = {path: path.read_bytes() for _, _, path in cases}

    def read(given: tuple[tuple[str, str, Path], list[tuple[str, int, int]]]) -> None:
        (name, what, path), edits = given
        if path.name == "config.toml":  # whose larger numbers are much to compute, and no fault
            edits = [(kind, place, value) for kind, place, value in edits if kind in ("flip", "cut", "drop")][:1]
        path.write_bytes(edited(valid[path], edits))
        try:
            command(what, folder / name, *([rows[name]] if what == "predict" else []), "--backend", "numpy")
        finally:
            path.write_bytes(valid[path])

    return read, st.tuples(st.sampled_from(cases), st.lists(EDIT, min_size=1, max_size=3))


FAMILIES = {made.__name__: made for made in (config, model, checkpoint, npy, npz, table, parquet, shards, commands)}


def command(*arguments: object) -> None:
    """Runs a command; what it refuses in one line is raised again."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
            status: object = 0
        except SystemExit as exited:
            status = exited.code
    said = err.getvalue()
    if status == 2 and said.startswith("error: ") and said.count("\n") == 1 and "out of memory" not in said:
        raise UserError(said)
    assert (status in (0, 1), said) == (True, ""), f"exit status {status}: {said}"


def feed(family: str, inputs: int) -> dict[str, Any]:
    """Feeds so many inputs to a family: how many were fed and refused, the slowest's seconds, and megabytes in all."""
    counts = {"inputs": 0, "refused": 0}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        read, strategy = FAMILIES[family](Path(folder))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))

        @hypothesis.settings(
            max_examples=inputs, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
        )
        @given(strategy)
        def one(given: Any) -> None:
            nonlocal slowest
            counts["inputs"] += 1
            begin = time.process_time()
            try:
                read(given)
            except UserError:
                counts["refused"] += 1
            took = time.process_time() - begin
            slowest = max(slowest, took)
            assert took < SECONDS, f"{took:.1f} s"

        one()
    # not ru_maxrss, which is what the process that began this one had, where that is more
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert kilobytes
    return {**counts, "slowest": round(slowest, 3), "megabytes": int(kilobytes[1]) // 1024}


if __name__ == "__main__":
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others reserve more addresses than they use
    print(json.dumps(feed(sys.argv[1], int(sys.argv[2]))))
