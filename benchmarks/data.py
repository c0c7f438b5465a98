"""Data against what they must not be slower than, each pair in one run.

    python -m benchmarks.data [--backend auto|numpy|cupy] [--gib 1] [--json FILE]

- uniforms: of `numpy.random.Generator(Philox)` filling the same array (NumPy); of a copy of the same array (CUDA).
- generated batch: of a training step of a 3 x 256 network, batch 1024, on those rows (`linear`, 32 uniform inputs).
- streamed shards: of `numpy.load` of the same files, the first time (when every file is read twice, for its checksum)
  and again.

Ratios, since machines are shared. More `--gib` show that streaming takes no more memory for more rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import at_least, backend_for
from benchmarks.rounds import alternate
from gpu_bp import Batches, Dataset, Network, Objective, Optimizer, Step, load_data, parse_config, registry, select
from gpu_bp.backends import Backend
from gpu_bp.data.shards import write_shards
from gpu_bp.data.source import Rows
from gpu_bp.registry import Purpose
from gpu_bp.schedule import constant

N_INPUTS, BATCH, WIDTH = 32, 1024, 256
FILL = 2**22


@dataclass(frozen=True)
class Ratio:
    """A measurement: `value` must be at most (or at least, where `least`) the `limit`, if any; None: not measured."""

    what: str
    value: float | None
    limit: float | None
    least: bool = False
    note: str = ""

    @property
    def passed(self) -> bool | None:
        if self.value is None or self.limit is None:
            return None
        return self.value >= self.limit if self.least else self.value <= self.limit


def uniforms(backend: Backend) -> Ratio:
    """The speed of a fill of uniforms, as a part of its peer's."""
    out = backend.zeros((FILL,), np.float64)

    def fill() -> None:
        backend.uniforms(1, Purpose.INPUTS, 0, out)

    if backend.name == "numpy":
        generator = np.random.Generator(np.random.Philox(1))
        ours, numpys = alternate(backend, [fill, lambda: generator.random(out=out)])
        return Ratio("uniforms, of the speed of numpy.random.Generator(Philox)", numpys / ours, 0.6, least=True)
    other = backend.zeros((FILL,), np.float64)

    def copy() -> None:
        other[...] = out

    ours, copying = alternate(backend, [fill, copy])
    # a copy reads and writes each byte, a fill writes it
    return Ratio("uniforms, bytes a second of a copy's", copying / 2 / ours, 0.5, least=True)


def generated_batch(backend: Backend) -> Ratio:
    """The time of a batch of `linear`, as a part of the step that trains on it."""
    data = {"kind": "linear", "rows": 10**9, "n_inputs": N_INPUTS, "distribution": "uniform", "residency": "host"}
    config = parse_config(
        {"data": data, "optimizer": {"kind": "adam", "learning_rate": 0.001}, "train": {"steps": 10**6}}
    )
    source = load_data(config, backend=backend).sources["train"]
    batches = Batches(backend, source, BATCH, "ordered", seed=0).epoch(0)
    network = Network([N_INPUTS, WIDTH, WIDTH, WIDTH, 1], ["tanh"] * 3 + ["identity"], backend=backend)
    step = Step(
        Objective(network, registry.loss("squared_error"), BATCH),
        Optimizer(registry.update("adam"), network, constant(1e-3)),
    )
    batch = next(batches)
    making, stepping = alternate(backend, [lambda: next(batches), lambda: step(batch)])
    limit = 0.1 if backend.name == "numpy" else 0.05
    return Ratio(f"a generated batch of {BATCH} x {N_INPUTS}, of a step of 3 x {WIDTH}", making / stepping, limit)


class Counted:
    """Rows that cost nothing to make: a `Reader` of as many as are asked for."""

    n_inputs, n_targets, binary, weighted, block_rows, where = N_INPUTS, 1, False, False, 1024, "counted rows"
    classes: tuple[str, ...] = ()

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows

    def read(self, first: int, n: int, out: Rows | None = None) -> Rows:
        inputs = np.full((n, N_INPUTS), first % 1000, np.float32)
        return Rows(inputs, targets=inputs[:, :1])


def streamed(gib: float, folder: Path) -> list[Ratio]:
    """The speed of streaming a shard folder, as a part of that of loading its files; the first time and again."""
    rows = int(gib * 2**30 / (4 * (N_INPUTS + 1)))
    write_shards(Counted(rows), folder, rows=rows, config={}, dtype="float32")
    files = sorted(folder.glob("*.npy"))
    backend, _ = select("numpy")
    data = {"kind": "shards", "path": str(folder), "residency": "host"}
    config = parse_config({"data": data, "optimizer": {"kind": "sgd", "learning_rate": 0.1}, "train": {"epochs": 1}})
    before = _peak()
    dataset = load_data(config)
    times: dict[str, list[float]] = {"first": [_stream(backend, dataset)], "again": [], "load": []}
    grown = (_peak() - before) / 2**20
    for _ in range(3):
        times["load"].append(_load(files))
        times["again"].append(_stream(backend, dataset))
    load = sorted(times["load"])[1]
    what = f"streaming {gib:g} GiB of shards, of the speed of numpy.load"
    return [
        Ratio(f"{what}, checksums verified", load / times["first"][0], None, note=f"memory + {grown:.0f} MiB"),
        Ratio(what, load / sorted(times["again"])[1], 0.8, least=True),
    ]


def _stream(backend: Backend, dataset: Dataset) -> float:
    batches = Batches(backend, dataset.sources["train"], BATCH, "ordered", seed=0)
    begin = time.perf_counter()
    for _ in batches.epoch(0):
        pass
    return time.perf_counter() - begin


def _load(files: list[Path]) -> float:
    begin = time.perf_counter()
    for file in files:
        np.load(file, allow_pickle=False)
    return time.perf_counter() - begin


def _peak() -> int:
    """Peak resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(backend: Backend, gib: float = 1.0) -> list[Ratio]:
    """All measurements that this backend can give."""
    ratios = []
    if backend.name == "numpy":  # first, so that the peak of memory is its own
        with tempfile.TemporaryDirectory() as folder:
            ratios = streamed(gib, Path(folder) / "shards")
    ratios += [uniforms(backend), generated_batch(backend)]
    if backend.name == "numpy":
        ratios += [
            Ratio("on CUDA: a generated batch, of a step", None, 0.05),
            Ratio("on CUDA: uniforms, bytes a second of a copy's", None, 0.5, least=True),
        ]
    return ratios


def table(ratios: list[Ratio]) -> str:
    """The ratios as a Markdown table."""
    lines = ["| what | ratio | limit | |", "|---|---|---|---|"]
    for r in ratios:
        value = "not measured" if r.value is None else f"{r.value:.3f}"
        limit = "" if r.limit is None else f"at {'least' if r.least else 'most'} {r.limit:g}"
        remarks = [*(["MISSED"] if r.passed is False else []), *([r.note] if r.note else [])]
        lines.append(f"| {r.what} | {value} | {limit} | {', '.join(remarks)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--gib", type=at_least(0.001, float), default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    backend = backend_for(parser, options.backend)
    ratios = run(backend, options.gib)
    print(table(ratios))
    if options.json:
        report: list[dict[str, Any]] = [asdict(ratio) | {"passed": ratio.passed} for ratio in ratios]
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
