"""deploy/: the scripts by the real shell, the manifest by its schema, and what both start on ranks.

Of Slurm there are stand-ins for its commands; ssh is one too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT
from on_mpi import Done, Mpi, ended, errors
from trainings import outcome

DEPLOY = ROOT / "deploy"
CONFIG = ROOT / "configs/double-moon.toml"
# 50 steps
CHANGES = ["train.epochs=5", "train.batch_size=100", "train.shards=8", "checkpoint.every_steps=10"]
TRAIN = ["train", CONFIG, *CHANGES, "--backend", "numpy"]
HURT = ROOT / "tests/hurt.py"
KILLED = {"mpich": 9, "open-mpi": 137}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of the training on one process that nobody stops."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = ended([sys.executable, "-m", "gpu_bp", *TRAIN, "--run", run])
    assert done.returncode == 0, done.stderr
    return outcome(run)


@pytest.fixture
def folder(in_tmp: Path) -> Iterator[Path]:
    """A working folder with deploy/ and configs/, as a clone has them; no process is left in it."""
    for name in ("configs", "deploy"):
        shutil.copytree(ROOT / name, in_tmp / name)
    (in_tmp / "hurts").mkdir()
    yield in_tmp
    end = time.monotonic() + 30
    while (left := inside(in_tmp)) and time.monotonic() < end:  # of what a launcher has killed some may still go
        time.sleep(0.01)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


def inside(folder: Path) -> list[int]:
    """The processes that work in that folder, but this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone
            if (process / "cwd").resolve() == folder.resolve():
                found.append(int(process.name))
    return [process for process in found if process != os.getpid()]


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def ahead(*folders: Path) -> str:
    """PATH with these in front."""
    return os.pathsep.join([*map(str, folders), os.environ["PATH"]])


# the loop ---------------------------------------------------------------------------------------------------------


def retry(words: list[Any], target: str = "", **environment: str) -> Done:
    """The script once it has ended, whoever has not; first of a group of processes, with $$ in a target its number."""
    script = f'export TARGET={target}; exec setsid sh "$@" > output 2> errors'
    done = ended(["sh", "-c", script, "-", DEPLOY / "retry.sh", *words], **{"RETRY_PAUSE": "0", **environment})
    done.stdout, done.stderr = Path("output").read_text(), Path("errors").read_text()
    return done


def retry_ranks(mpi: Mpi, plan: str = "", target: str = "") -> Done:
    words = [mpi.mpiexec, "-n", 2, mpi.python, HURT, *TRAIN, "--run", "run", "--resume"]
    return retry(words, target, PLAN=plan, HURT="hurts")


def said(done: Done) -> list[str]:
    """What the loop says."""
    return [line for line in done.stderr.splitlines() if line.startswith("retry.sh: ")]


@pytest.mark.mpi
def test_ranks_that_are_killed(mpi: Mpi, folder: Path, alone: dict[str, Any]) -> None:
    """The first, then the other; the third try ends in the same bits."""
    done = retry_ranks(mpi, "0:25:KILL 1:8:KILL")
    assert done.returncode == 0, done.stderr
    status = KILLED[mpi.name]
    assert said(done) == [f"retry.sh: exit status {status}; try {n} of 10 in 0 s" for n in (2, 3)]
    assert outcome(folder / "run") == alone


@pytest.mark.mpi
@pytest.mark.usefixtures("folder")
def test_what_the_user_has_to_mend_is_not_tried_again(mpi: Mpi) -> None:
    done = retry([mpi.mpiexec, "-n", 2, mpi.python, "-m", "gpu_bp", "train", CONFIG, "--run", "run", "--resume"])
    assert (done.returncode, len(errors(done)), said(done)) == (2, 1, []), done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize(("name", "target", "status"), [("TERM", "$$", 143), ("HUP", "$$", 129), ("INT", "-$$", 130)])
def test_asked_to_end(mpich: Mpi, folder: Path, alone: dict[str, Any], name: str, target: str, status: int) -> None:
    """The script is, or, as by a terminal's Ctrl-C, all of its group: the training pauses, and can be gone on with."""
    done = retry_ranks(mpich, f"0:12:{name}", target)
    assert (done.returncode, said(done)) == (status, []), done.stderr
    summary = json.loads((folder / "run/summary.json").read_text())
    assert (summary["stopped"], summary["steps"]) == ("interrupted", 12)
    assert retry_ranks(mpich).returncode == 0
    assert outcome(folder / "run") == alone


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("status", [0, 2, 15, 126, 127, 129, 130, 141, 143])
def test_tried_once(status: int) -> None:
    done = retry(["sh", "-c", f"echo tried; exit {status}"])
    assert (done.returncode, done.stdout, done.stderr) == (status, "tried\n", "")


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("status", [1, 9, 134, 137, 139, 255])
def test_tried_again(status: int) -> None:
    done = retry(["sh", "-c", f"echo tried; exit {status}"], RETRY_TRIES="3")
    assert (done.returncode, done.stdout) == (status, "tried\n" * 3)
    assert said(done)[-1] == f"retry.sh: exit status {status} at the last of 3 tries"


def test_pauses_grow(folder: Path) -> None:
    program(folder / "bin/sleep", "echo $1 >> pauses")
    retry(["false"], PATH=ahead(folder / "bin"), RETRY_PAUSE="10", RETRY_PAUSE_MAX="35", RETRY_TRIES="5")
    assert (folder / "pauses").read_text().split() == ["10", "20", "35", "35"]


def test_asked_to_end_in_a_pause(folder: Path) -> None:
    """Which ends at once."""
    program(folder / "bin/sleep", f"kill -TERM $PPID; exec {shutil.which('sleep')} 1000")
    done = retry(["false"], PATH=ahead(folder / "bin"))
    assert (done.returncode, len(said(done))) == (143, 1)


def test_nothing_to_try() -> None:
    done = ended(["sh", DEPLOY / "retry.sh"])
    assert (done.returncode, done.stderr) == (2, "usage: sh retry.sh COMMAND [WORD]...\n")


# Slurm ------------------------------------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}


def slurm(folder: Path, srun: str, **environment: str) -> Done:
    """The script as Slurm starts it, with this srun; the words of srun and scontrol are in files of their names."""
    program(folder / "bin/srun", f'echo "$OPENBLAS_NUM_THREADS $SRUN_CPUS_PER_TASK $*" >> srun\n{srun}')
    program(folder / "bin/scontrol", "echo $* >> scontrol")
    words = ["sh", DEPLOY / "slurm.sh", CONFIG, "run", *CHANGES]
    return ended(words, PATH=ahead(folder / "bin"), **SLURM, **environment)


@pytest.mark.mpi
def test_slurm_time_over_and_killed(mpich: Mpi, folder: Path, alone: dict[str, Any]) -> None:
    """A task is told that the time is over, later one is killed, and what is queued again goes on to the same bits."""
    shift = "while [ $1 != gpu-bp ]; do shift; done; shift"
    srun = f'{shift}; exec {mpich.mpiexec} -n 2 {mpich.python} {HURT} "$@" --backend numpy'
    for tries, status in enumerate([143, 9, 0]):
        done = slurm(folder, srun, PLAN="1:12:TERM 0:8:KILL", HURT="hurts", SLURM_RESTART_COUNT=str(tries))
        assert done.returncode == status, done.stderr
        stopped = json.loads((folder / "run/summary.json").read_text())["stopped"]
        assert (stopped == "interrupted") == (status != 0)
    train = f"gpu-bp train {CONFIG} {' '.join(CHANGES)} --run run --resume"
    assert (folder / "srun").read_text().splitlines() == [f"1 1 --mpi=pmix --kill-on-bad-exit=1 {train}"] * 3
    assert (folder / "scontrol").read_text() == "requeue Incomplete 7\n" * 2
    assert outcome(folder / "run") == alone


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(137, 0, 1), (1, 9, 1), (137, 10, 0), (143, 10, 1), (2, 0, 0), (127, 0, 0), (130, 0, 0), (0, 0, 0)],
)
def test_slurm_queued_again(folder: Path, status: int, restarts: int, again: int) -> None:
    done = slurm(folder, f"exit {status}", SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == status
    assert (folder / "scontrol").exists() == bool(again)


def test_slurm_reads_all_options() -> None:
    """Which it does up to the first command."""
    lines = (DEPLOY / "slurm.sh").read_text().splitlines()
    first = next(k for k, line in enumerate(lines) if line and not line.startswith("#"))
    options = [k for k, line in enumerate(lines) if line.startswith("#SBATCH --")]
    assert options
    assert max(options) < first


# several machines -------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_hosts(mpi: Mpi, folder: Path, alone: dict[str, Any]) -> None:
    """A line a rank, for both; here all of them are this machine."""
    (folder / "here").write_text(re.sub(r"^node\d", "localhost", (DEPLOY / "hosts").read_text(), flags=re.M))
    done = ended([mpi.mpiexec, "--hostfile", "here", "-n", 2, mpi.python, "-m", "gpu_bp", *TRAIN, "--run", "run"])
    assert done.returncode == 0, done.stderr
    assert "2 ranks: on " in done.stdout
    assert outcome(folder / "run") == alone


@pytest.mark.mpi
def test_hosts_by_ssh(mpich: Mpi, folder: Path, alone: dict[str, Any]) -> None:
    """To node1 and node2, of which the ssh that is taken makes this machine."""
    ssh = program(folder / "bin/ssh", 'while [ "${1#node}" = "$1" ]; do shift; done; echo $1 >> ssh; shift; eval "$*"')
    words = [mpich.mpiexec, "--hostfile", DEPLOY / "hosts", "-n", 4, mpich.python, "-m", "gpu_bp", *TRAIN]
    done = ended([*words, "--run", "run"], HYDRA_LAUNCHER_EXEC=str(ssh))
    assert done.returncode == 0, done.stderr
    assert sorted((folder / "ssh").read_text().split()) == ["node1", "node2"]
    assert outcome(folder / "run") == alone


# Kubernetes -------------------------------------------------------------------------------------------------------

SCHEMA = json.loads((ROOT / "tests/schemas/mpijob_v2beta1.json").read_text())


@pytest.fixture
def job() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "mpijob.yaml").read_text()))


def refused(job: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(job)]


def replica(job: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A replica's pod and its container."""
    pod = job["spec"]["mpiReplicaSpecs"][name]["template"]["spec"]
    return pod, pod["containers"][0]


def test_the_manifest_is_an_mpijob(job: dict[str, Any]) -> None:
    assert refused(job) == []


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (["spec"], "slotPerWorker", 1),
        (["spec"], "mpiImplementation", "mpich"),
        (["spec", "runPolicy"], "backoffLimit", "10"),
        (["spec", "mpiReplicaSpecs", "Worker", "template", "spec"], "volume", []),
        (["spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers", 0], "volumeMount", []),
    ],
)
def test_a_wrong_field_is_refused(job: dict[str, Any], path: list[Any], key: str, value: Any) -> None:
    there: Any = job
    for step in path:
        there = there[step]
    there[key] = value
    (message,) = refused(job)
    assert repr(value) in message or key in message


def test_the_manifest_agrees_with_itself_and_its_image(job: dict[str, Any]) -> None:
    image, base = (DEPLOY / "Dockerfile.mpi").read_text(), (ROOT / "Dockerfile").read_text()
    (launcher_pod, launcher), (pod, worker) = replica(job, "Launcher"), replica(job, "Worker")
    ranks = int(launcher["command"][2])
    assert ranks == job["spec"]["slotsPerWorker"] * job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
    assert launcher["image"] == worker["image"]
    assert {mount["name"] for mount in worker["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # the user, its home and the working folder are the image's, and so are sshd's port and file
    user = re.search(r"useradd --create-home --uid (\d+) (\w+)", base)
    assert user is not None
    assert {one["securityContext"]["runAsUser"] for one in (launcher_pod, pod)} == {int(user[1])}
    assert job["spec"]["sshAuthMountPath"] == f"/home/{user[2]}/.ssh"
    assert f"HostKey /home/{user[2]}/.ssh/id_rsa" in image
    assert f"WORKDIR {worker['volumeMounts'][0]['mountPath']}\n" in base
    assert image.count(f"Port {worker['readinessProbe']['tcpSocket']['port']}'") == 2
    assert f"> {worker['command'][-1]} " in image
    assert f"PATH={Path(launcher['command'][3]).parent}:" in base


@pytest.mark.mpi
def test_what_the_launcher_starts(job: dict[str, Any], mpich: Mpi, folder: Path) -> None:
    """Trains here, on as many ranks."""
    _, launcher = replica(job, "Launcher")
    mpiexec, flag, ranks, program, *words = [*launcher["command"], *launcher["args"]]
    assert (mpiexec, flag, Path(program).name) == ("mpiexec", "-n", "gpu-bp")
    done = mpich.start(int(ranks), ["-m", "gpu_bp", *words, "train.epochs=1"])
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "runs/moon/summary.json").read_text())["steps"] == 10


# Docker -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [ROOT / "Dockerfile", DEPLOY / "Dockerfile.mpi"], ids=lambda path: path.name)
def test_dockerfile(path: Path) -> None:
    """What it copies is there, and the extras that it installs are the project's."""
    text = path.read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((ROOT / source).exists() for source in sources.split()), sources
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for group in re.findall(r"/source\[([\w,]+)\]", text) for name in group.split(",")}
    assert named <= set(extras)
    assert named == ({"cuda13", "mpi"} if path.parent == ROOT else set())


@pytest.mark.mpi
def test_what_docker_starts(mpich: Mpi, folder: Path) -> None:
    """The words after the image, in the page's commands with ranks."""
    lines = re.findall(r"^docker run .*--entrypoint.*", (ROOT / "docs/distributed.md").read_text(), re.M)
    assert lines
    for line in lines:
        words = shlex.split(line)
        entry = words[words.index("--entrypoint") + 1]
        command = [entry, *words[words.index("gpu-bp") + 1 :]]
        done = ended([*command, "train.epochs=1"], PATH=ahead(mpich.mpiexec.parent))
        assert done.returncode == 0, done.stderr
        assert (folder / "runs/docker/summary.json").exists()
        shutil.rmtree(folder / "runs")
