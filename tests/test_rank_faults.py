"""What goes wrong on one rank of a training, from the command line: one line says on which, and the job ends.

Each rank works in a folder of its own, in which its data lie: the config names a link that leads each to its own.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from on_mpi import Done, Mpi, ended, errors
from trainings import COMMON, ON_HOST

import gpu_bp
from gpu_bp import NumpyBackend, UserError, dump_config, parse_config
from gpu_bp.data import load_data
from gpu_bp.memory import estimate, size
from gpu_bp.ranks import Alone
from gpu_bp.run_folder import RunFolder
from gpu_bp.scaling_here import OneOf

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="a link to the working folder, as Linux has it"),
]

# Metrics are called before the first step, and after every epoch: what they do is done after two of these.
OWN = """
import os, resource
from gpu_bp import runs
from gpu_bp.step import Step

rank = int(os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
calls = 0

def on(which, do):
    def metric(y_true, y_pred):
        global calls
        calls += 1
        if calls == 3 and rank == which:
            do()
        return 0.0
    return metric

def fail(error):
    raise error

def fail_at_the_next_step(error):
    whole = Step.__call__
    def step(self, batch):
        Step.__call__ = whole
        raise error
    Step.__call__ = step

fails = on(1, lambda: fail(KeyError("a bug")))
fills_the_disk = on(0, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
cuts = on(1, lambda: os.truncate("inputs.npy", 200))
removes = on(1, lambda: os.remove("inputs.npy"))
runs_out = on(1, lambda: fail_at_the_next_step(MemoryError()))
has_a_bug = on(1, lambda: fail_at_the_next_step(KeyError("a bug")))

def rises_on_0(y_true, y_pred):
    global calls
    calls += rank == 0
    return float(calls)
"""
OTHER = """
import os
from gpu_bp import runs

found = runs.environment
runs.environment = lambda backend: {**found(backend), WHAT: "2." + os.environ["PMI_RANK"]}
none = lambda y_true, y_pred: 0.0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a config, and a folder of each of two ranks."""
    rng = np.random.default_rng(0)
    inputs, config = rng.standard_normal((70, 3)), {**COMMON, "train": {"epochs": 6, "batch_size": 8, "shards": 2}}
    config["data"] = {"kind": "arrays", "validation_rows": 20, **ON_HOST}
    for name, array in (("inputs", inputs), ("targets", inputs.sum(axis=1))):
        config["data"][name] = f"{tmp_path}/{name}.npy"
        (tmp_path / f"{name}.npy").symlink_to(f"/proc/self/cwd/{name}.npy")
        for rank in "01":
            (tmp_path / rank).mkdir(exist_ok=True)
            np.save(tmp_path / rank / f"{name}.npy", array)
    (tmp_path / "config.toml").write_text(dump_config(parse_config(config)))
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path


def metric(name: str, folder: Path) -> str:
    return f'train.metrics=["{folder}/mine.py:{name}"]'


def train(
    mpi: Mpi,
    folder: Path,
    *words: object,
    module: tuple[str, ...] = (),
    config: object = "",
    quiet: bool = True,
) -> Done:
    command = ["-W", "error", *module, "-m", "gpu_bp", "train", config or folder / "config.toml", *words]
    enter = f'cd "{folder}/${{PMI_RANK:-$OMPI_COMM_WORLD_RANK}}" && exec "$@"'
    options = ["--run", folder / "run", "--backend", "numpy", *["--quiet"] * quiet]
    return ended([mpi.mpiexec, "-n", 2, "sh", "-c", enter, "sh", mpi.python, *command, *options], MPLBACKEND="agg")


def line_of(done: Done, status: int = 2) -> str:
    """The one line of a job that has failed."""
    assert done.returncode == status, done.stderr
    assert ("Traceback" in done.stderr) == (status == 1)
    (line,) = errors(done)
    return line.removeprefix("error: ")


# on all ways of starting it -------------------------------------------------------------------------------------


@pytest.fixture(params=[(), ("-m", "mpi4py")], ids=["", "mpi4py"])
def module(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return tuple(request.param)


def test_a_rank_that_does_not_see_the_data(mpi: Mpi, module: tuple[str, ...], folder: Path) -> None:
    (folder / "1/inputs.npy").unlink()
    assert line_of(train(mpi, folder, module=module)) == f"rank 1: data.inputs: no file {folder}/inputs.npy"
    assert not (folder / "run").exists()


def test_another_config(mpi: Mpi, module: tuple[str, ...], folder: Path) -> None:
    assert line_of(train(mpi, folder, "data.inputs=inputs.npy", module=module)) == (
        f"rank 0: rank 1 has another config: data.inputs is {folder}/1/inputs.npy there, and {folder}/0/inputs.npy on "
        "rank 0; give all ranks the same one"
    )
    assert not (folder / "run").exists()


def test_an_exception(mpi: Mpi, module: tuple[str, ...], folder: Path) -> None:
    assert line_of(train(mpi, folder, metric("fails", folder), module=module)) == (
        f"rank 1: metric {folder}/mine.py:fails: KeyError: 'a bug'"
    )


def test_a_full_disk(mpi: Mpi, module: tuple[str, ...], folder: Path) -> None:
    """On rank 0; and once there is room it goes on."""
    line = line_of(train(mpi, folder, metric("fills_the_disk", folder), "network.hidden=[60]", module=module))
    assert re.fullmatch(rf"rank 0: {folder}/run/\S+: (No space left on device|File too large)", line)


# on one -----------------------------------------------------------------------------------------------------------


def test_other_data(mpich: Mpi, folder: Path) -> None:
    np.save(folder / "1/inputs.npy", np.zeros((70, 3)))
    assert line_of(train(mpich, folder)).startswith("rank 0: rank 1 does not train on the same: data.inputs.digest is ")
    assert not (folder / "run").exists()


@pytest.mark.parametrize("what", ["gpu_bp", "numpy"])
def test_other_libraries(mpich: Mpi, what: str, folder: Path) -> None:
    """Another gpu_bp is refused, and of others one is warned."""
    (folder / "other.py").write_text(OTHER.replace("WHAT", repr(what)))
    done = train(mpich, folder, f'train.metrics=["{folder}/other.py:none"]', quiet=False)
    how = f"{what} is 2.1 there, and 2.0 on rank 0"
    if what == "gpu_bp":
        assert line_of(done) == f"rank 0: rank 1 does not train on the same: {how}"
    else:
        assert (done.returncode, errors(done)) == (0, [])
        assert f"the last bits of rank 1 may be others than those of rank 0: {how}\n" in done.stdout


@pytest.mark.parametrize(
    ("fault", "said"), [("cuts", " became shorter while it was read"), ("removes", ": No such file or directory")]
)
def test_data_that_go_away(mpich: Mpi, fault: str, said: str, folder: Path) -> None:
    assert line_of(train(mpich, folder, metric(fault, folder))) == f"rank 1: {folder}/inputs.npy{said}"


def test_memory_that_runs_out(mpich: Mpi, folder: Path) -> None:
    line = line_of(train(mpich, folder, metric("runs_out", folder)))
    needed = re.match("rank 1: out of memory at step 8: the training needs about ([^,]+), ", line)
    assert needed
    # as much as is counted for one of two ranks, and not for one by itself
    own = [f"data.{name}={folder}/0/{name}.npy" for name in ("inputs", "targets")]
    config = gpu_bp.load_config(folder / "config.toml", own)
    dataset, backend = load_data(config), NumpyBackend()
    wanted, alone = (size(estimate(config, dataset, backend, ranks).total) for ranks in (OneOf(2), Alone()))
    assert needed[1] == wanted != alone


def test_a_bug(mpich: Mpi, folder: Path) -> None:
    """The traceback is shown."""
    assert line_of(train(mpich, folder, metric("has_a_bug", folder)), 1) == "rank 1: KeyError: 'a bug'"


def test_a_training_that_diverges(mpich: Mpi, folder: Path) -> None:
    """The line is that of a single process, of the rows of all ranks."""
    changes = ["optimizer.kind=sgd", "optimizer.learning_rate=1e9", "network.activation=identity"]
    line = line_of(train(mpich, folder, *changes))
    shutil.move(folder / "run", folder / "before")
    own = [f"data.{name}={folder}/0/{name}.npy" for name in ("inputs", "targets")]
    config = gpu_bp.load_config(folder / "config.toml", [*changes, *own])
    with pytest.raises(UserError, match="of the step's 8 rows") as alone:
        gpu_bp.train(config, backend="numpy", run=folder / "run", pictures=False)
    assert line == f"rank 0: {alone.value}"


def test_parameters_diverge_at_the_end(mpich: Mpi, folder: Path) -> None:
    """Which rank 0 alone sees, when it saves them: nothing is there to go back to for the others."""
    changes = ["train.batch_size=64", "train.epochs=1", "optimizer.learning_rate=1e39", "train.on_divergence=rewind"]
    line = line_of(train(mpich, folder, *changes))
    assert line.startswith("rank 0: the training diverged at step 1: parameters.layers.0.weights is not finite")


def test_more_ranks_than_shards(mpich: Mpi, folder: Path) -> None:
    assert line_of(train(mpich, folder, "train.shards=1")) == (
        "rank 0: there are 2 ranks, and train.shards is 1; set train.shards = 2 or a larger power of two, or "
        "start fewer ranks"
    )


def test_a_rank_that_does_not_see_the_config(mpich: Mpi, folder: Path) -> None:
    shutil.move(folder / "config.toml", folder / "0")
    assert line_of(train(mpich, folder, config="config.toml")).startswith("rank 1: config config.toml: ")


def test_a_run_folder_that_is_used(mpich: Mpi, folder: Path) -> None:
    """Which rank 0 alone looks at."""
    (folder / "run").mkdir()
    (folder / "run/file").touch()
    assert line_of(train(mpich, folder)).startswith(f"rank 0: run folder {folder}/run is not empty")


def test_a_metric_that_is_another_one_on_each_rank(mpich: Mpi, folder: Path) -> None:
    """All take that of rank 0, by which none of them stops early."""
    name = f"{folder}/mine.py:rises_on_0"
    metrics = f'train.metrics=[{{kind="{name}", higher_is_better=true}}]'
    done = train(mpich, folder, metrics, 'stopping={metric="validation_rises_on_0", patience=1}')
    assert (done.returncode, errors(done)) == (0, []), done.stderr
    lines = RunFolder(folder / "run").metrics()
    assert len(lines) == 6
    assert [line["validation_rises_on_0"] for line in lines] == sorted(
        {line["validation_rises_on_0"] for line in lines}
    )
