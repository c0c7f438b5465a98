"""The command line: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from conftest import ROOT
from matplotlib.image import imread
from rich.console import Console

from gpu_bp import NumpyBackend, Trainer, UserError, backends, load_config
from gpu_bp.cli import main
from gpu_bp.errors import in_words
from gpu_bp.progress import watch

Tiny = Callable[..., dict[str, Any]]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: its exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exited.value.code or 0), captured.out, captured.err

    return run


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def write(in_tmp: Path, tiny_config: Tiny) -> Callable[..., Path]:
    """Writes a tiny config, with sections changed, into the working folder."""

    def write(**sections: Any) -> Path:
        path = in_tmp / "tiny.toml"
        path.write_text(tomli_w.dumps(tiny_config(**sections)))
        return path

    return write


def picture(path: Path) -> np.ndarray:
    assert path.read_bytes().startswith(PNG)
    pixels: np.ndarray = imread(path)
    assert pixels.std() > 0.02, "the picture is blank"
    return pixels


def test_train_evaluate_predict(cli: Cli, write: Callable[..., Path], in_tmp: Path) -> None:
    """The main path, on data with two inputs: pictures, metrics and predictions."""
    status, out, err = cli("train", write(), "train.epochs=3", "--run", "run", "--backend", "numpy")
    assert (status, err) == (0, "")
    assert "numpy backend, as asked" in out
    assert "epoch 3  step 21" in out
    assert "run folder: run" in out
    picture(in_tmp / "run/curves.png")
    picture(in_tmp / "run/boundary.png")
    assert not (in_tmp / "run/predictions.png").exists()
    resolved = tomllib.loads((in_tmp / "run/config.toml").read_text())
    assert resolved["train"]["epochs"] == 3
    summary = json.loads((in_tmp / "run/summary.json").read_text())

    status, out, err = cli("evaluate", "run", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {name: summary[name] for name in ("train", "validation", "test")}
    assert "accuracy" in cli("evaluate", "run")[1]

    np.save("x.npy", np.array([[0.0, 8.0], [10.0, -4.0], [1e3, -1e3]]))
    status, out, err = cli("predict", "run", "x.npy")
    assert (status, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 3
    assert [row["class"] for row in rows] == ["upper" if float(row["y"]) > 0 else "lower" for row in rows]
    assert cli("predict", "run", "x.npy", "-o", "y.csv") == (0, "", "")
    assert Path("y.csv").read_text() == out
    assert cli("predict", "run", "x.npy", "-o", "y.npy")[0] == 0
    np.testing.assert_array_equal(np.load("y.npy")[:, 0], [float(row["y"]) for row in rows])


def test_quiet(cli: Cli, write: Callable[..., Path]) -> None:
    assert cli("train", write(), "--quiet", "--run", "run") == (0, "", "")


def test_softmax_classes_have_probabilities(cli: Cli, write: Callable[..., Path]) -> None:
    cli("train", write(loss={"kind": "cross_entropy"}), "--run", "run", "--quiet")
    np.save("x.npy", np.array([[0.0, 8.0], [10.0, -4.0]]))
    for row in csv.DictReader(io.StringIO(cli("predict", "run", "x.npy")[1])):
        p = {name: float(row[f"p_{name}"]) for name in ("lower", "upper")}
        assert sum(p.values()) == pytest.approx(1, abs=1e-6)
        assert row["class"] == max(p, key=lambda name: p[name])


HOUSES = """
[data]
kind = "table"
path = "houses.csv"
target_columns = ["price", "rent"]
test_rows = 40
[network]
hidden = [6]
[loss]
kind = "squared_error"
[optimizer]
kind = "adam"
learning_rate = 0.02
[train]
epochs = 20
precision = "float64"
"""


@pytest.fixture
def houses(in_tmp: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes houses.csv, houses.toml and the test rows as last.csv: the prices and rents of these, and their scales."""
    size, noise = np.random.default_rng(0).uniform(10, 100, 200), np.random.default_rng(1).standard_normal((200, 2))
    targets = np.stack([1000 + 20 * size, 5 + 0.1 * size], axis=1) + noise * [100, 0.5]
    lines = [f"{s!r},{price!r},{rent!r}" for s, (price, rent) in zip(size.tolist(), targets.tolist(), strict=True)]
    Path("houses.csv").write_text("\n".join(["size,price,rent", *lines]) + "\n")
    Path("last.csv").write_text("\n".join(["size,price,rent", *lines[160:]]) + "\n")
    Path("houses.toml").write_text(HOUSES)
    return targets[160:], targets[:160].std(axis=0)


def predicted_from(cli: Cli, *loss: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns that a run with that loss predicts for last.csv, and its metrics of these rows."""
    assert cli("train", "houses.toml", *loss, "--run", "run", "--quiet")[0] == 0
    picture(Path("run/predictions.png"))
    picture(Path("run/fit.png"))
    rows = [*csv.DictReader(io.StringIO(cli("predict", "run", "last.csv")[1]))]
    test = json.loads(Path("run/summary.json").read_text())["test"]
    assert json.loads(cli("evaluate", "run", "--json")[1])["test"] == test
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}, test


def test_means_and_variances_in_raw_units(cli: Cli, houses: tuple[np.ndarray, np.ndarray]) -> None:
    """From the columns that are predicted follow the loss and the metrics of the summary."""
    targets, sd = houses
    columns, test = predicted_from(cli, "loss.kind=gaussian_nll")
    assert [*columns] == ["price", "rent", "price_variance", "rent_variance"]
    mean, variance = np.stack([*columns.values()], axis=1).reshape(-1, 2, 2).swapaxes(0, 1)
    loss = (np.log(variance / sd**2) + (mean - targets) ** 2 / variance).sum(axis=1).mean() / 2
    assert loss == pytest.approx(test["loss"], rel=1e-9)
    assert (((mean - targets) / sd) ** 2).mean() == pytest.approx(test["mse"], rel=1e-9)
    assert "coverage" not in test


def test_quantiles_in_raw_units(cli: Cli, houses: tuple[np.ndarray, np.ndarray]) -> None:
    targets, sd = houses
    columns, test = predicted_from(cli, "loss.kind=quantile", "loss.levels=[0.05, 0.5, 0.975]")
    assert [*columns] == [f"{name}_{level}" for level in ("q05", "q50", "q97.5") for name in ("price", "rent")]
    levels = np.stack([*columns.values()], axis=1).reshape(-1, 3, 2)
    error = (targets[:, None] - levels) / sd
    q = np.array([[0.05], [0.5], [0.975]])
    assert np.maximum(q * error, (q - 1) * error).sum(axis=(1, 2)).mean() == pytest.approx(test["loss"], rel=1e-9)
    assert (error[:, 1] ** 2).mean() == pytest.approx(test["mse"], rel=1e-9)
    assert ((levels[:, 0] <= targets) & (targets <= levels[:, 2])).mean() == pytest.approx(test["coverage"])


def test_a_table_gives_raw_units(cli: Cli, in_tmp: Path) -> None:
    """predict takes raw rows and gives raw units; on the test rows it reproduces the summary's mse."""
    rng = np.random.default_rng(0)
    lines, prices = ["kind,size,price"], []
    for k in range(300):
        size, kind = float(rng.uniform(10, 100)), "abc"[k % 3]
        prices.append(1000 + 20 * size + 300 * (k % 3) + float(rng.standard_normal()))
        lines.append(f"{kind},{size!r},{prices[-1]!r}")
    Path("houses.csv").write_text("\n".join(lines) + "\n")
    Path("houses.toml").write_text(
        """
        [data]
        kind = "table"
        path = "houses.csv"
        target_columns = ["price"]
        categorical_columns = ["kind"]
        validation_rows = 30
        test_rows = 60
        [network]
        hidden = [8]
        [optimizer]
        kind = "adam"
        learning_rate = 0.01
        [train]
        epochs = 60
        """
    )
    assert cli("train", "houses.toml", "--run", "run", "--quiet")[0] == 0
    picture(in_tmp / "run/predictions.png")
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["test"]["r2"] > 0.99
    Path("last.csv").write_text("\n".join([lines[0], *lines[-60:]]) + "\n")
    out = cli("predict", "run", "last.csv")[1]
    predicted = np.array([float(row["price"]) for row in csv.DictReader(io.StringIO(out))])
    sd = np.std(prices[:210])
    assert (((predicted - prices[-60:]) / sd) ** 2).mean() == pytest.approx(summary["test"]["mse"], abs=1e-6)
    # the target column may be missing, and others may stand in another order
    Path("bare.csv").write_text("size,kind\n50,a\n")
    assert cli("predict", "run", "bare.csv")[0] == 0
    for text, message in (
        ("size\n50\n", "unknown column 'kind'"),
        ("size,kind\n50,z\n", "bare.csv, line 2, column kind: 'z' does not occur in the training rows (a, b, c)"),
    ):
        Path("bare.csv").write_text(text)
        status, _, err = cli("predict", "run", "bare.csv")
        assert status == 2
        assert message in err
    np.save("x.npy", np.ones((2, 4)))
    assert "give a .csv file" in cli("predict", "run", "x.npy")[2]


def test_check_gradients(cli: Cli) -> None:
    for name in ("xor", "double-moon", "encoder"):
        status, out, _ = cli("check-gradients", ROOT / f"configs/{name}.toml", "--json")
        report = json.loads(out)
        assert status == 0
        assert report["passed"]
        assert {(a["layer"], a["array"]) for a in report["arrays"]} == {
            (layer, array) for layer in (0, 1) for array in ("weights", "biases")
        }
        assert max(a["error"] for a in report["arrays"]) <= 1e-6
    assert "the gradients agree" in cli("check-gradients", ROOT / "configs/xor.toml")[1]


def test_check_gradients_fails_loudly(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.NumpyBackend, "hidden_delta", lambda *arguments: None)
    status, out, _ = cli("check-gradients", ROOT / "configs/xor.toml")
    assert status == 1
    assert "do not agree" in out


def test_info_and_schema(cli: Cli) -> None:
    facts = json.loads(cli("info", "--json")[1])
    assert facts["numpy"] == np.__version__
    assert facts["backend"] in ("numpy", "cupy")
    assert "python" in cli("info")[1]
    assert json.loads(cli("schema")[1])["title"] == "Config"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.toml"], "config none.toml: No such file or directory"),
        (["train", "tiny.toml", "network.hiden=[3]"], "did you mean network.hidden?"),
        (["train", "tiny.toml", "--backend", "cuda"], "unknown backend 'cuda'; did you mean cupy?"),
        (["train", "tiny.toml", "--run", "."], "run folder . is not empty"),
        (["train"], "Missing argument"),
        (["train", "tiny.toml", "--epochs", "3"], "No such option"),
        (["evaluate", "none"], "none is not a run folder: there is no such folder"),
        (["evaluate", "."], ". is not a run folder: it has no config.toml"),
        (["predict", ".", "x.npy"], ". is not a run folder"),
        (["predict", "run", "x.txt"], "x.txt: a .csv or .npy file is needed"),
        (["predict", "run", "x.npy"], "inputs: no file x.npy"),
        (["predict", "run", "wide.npy"], "wide.npy has 3 columns, this network takes 2 inputs"),
        (["predict", "run", "good.npy", "-o", "y.txt"], "y.txt: the output must be a .csv or .npy file"),
        (["predict", "run", "good.npy", "-o", "none/y.csv"], "No such file or directory"),
        (["check-gradients", "none.toml"], "No such file"),
        (["trian"], "No such command"),
        (["train", "tiny.toml", "network.hidden=[1000000000,1000000000]"], "out of memory"),
        (["train", "tiny.toml", "data.rows=1000000000000000", "data.residency=device"], 'residency = "host" would fit'),
        (["train", "tiny.toml", "--run", "x" * 300], "File name too long"),
        (["evaluate", "tiny.toml"], "tiny.toml is not a run folder: it is a file"),
    ],
)
def test_errors_are_one_line(cli: Cli, write: Callable[..., Path], arguments: list[str], message: str) -> None:
    write()
    if "predict" in arguments and "run" in arguments:
        cli("train", "tiny.toml", "--run", "run", "--quiet")
        np.save("wide.npy", np.ones((2, 3)))
        np.save("good.npy", np.ones((2, 2)))
    status, _, err = cli(*arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_cupy_never_falls_back(cli: Cli, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a usable GPU, `cupy` says what was tried and why it failed; `auto` says which it took and why."""
    monkeypatch.setattr(backends, "_cupy", lambda _: (None, "no CUDA driver or device: planted"))
    status, _, err = cli("train", write(), "--backend", "cupy")
    assert status == 2
    assert err == (
        "error: backend cupy cannot be used: no CUDA driver or device: planted; use --backend numpy, or auto\n"
    )
    status, out, _ = cli("train", "tiny.toml")
    assert status == 0
    assert out.startswith("numpy backend, because cupy cannot be used: no CUDA driver or device: planted\n")


def test_a_cupy_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    for name in ("cuda_launch", "cupy_backend"):
        monkeypatch.delitem(sys.modules, f"gpu_bp.backends.{name}", raising=False)
    monkeypatch.delattr(backends, "cupy_backend", raising=False)
    with pytest.raises(UserError, match="backend cupy cannot be used: import cupy failed: "):
        backends.select("cupy")
    assert backends.select("auto")[0].name == "numpy"


def command(*arguments: str, **keywords: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpu_bp", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **keywords,
    )


def test_ctrl_c_leaves_a_readable_run(write: Callable[..., Path], cli: Cli) -> None:
    write()
    with command("train", "tiny.toml", "train.epochs=10000000", "--run", "run", "--backend", "numpy") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step" in line:
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err + out
    assert json.loads(Path("run/summary.json").read_text())["stopped"] == "interrupted"
    assert cli("evaluate", "run", "--json")[0] == 0
    assert load_config("run/config.toml").train.epochs == 10000000


def test_sigterm_is_like_ctrl_c(write: Callable[..., Path]) -> None:
    write()
    with command("train", "tiny.toml", "train.epochs=10000000", "--run", "run", "--backend", "numpy") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step" in line:
                process.terminate()
                break
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, "")
    assert "interrupted at step" in out
    assert Path("run/model.safetensors").exists()


def test_a_training_goes_on_when_nobody_reads(write: Callable[..., Path]) -> None:
    write()
    with command("train", "tiny.toml", "train.epochs=300", "--run", "run", "--backend", "numpy") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert json.loads(Path("run/summary.json").read_text())["stopped"] == ""


def test_no_arguments_show_the_help(cli: Cli) -> None:
    status, out, err = cli()
    assert (status, err) == (0, "")
    assert "check-gradients" in out


def test_no_traceback_when_the_reader_leaves(write: Callable[..., Path]) -> None:
    with command("schema") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes files")
def test_an_output_that_is_closed(write: Callable[..., Path]) -> None:
    write()
    line = f"{sys.executable} -m gpu_bp train tiny.toml --backend numpy --run a"
    done = subprocess.run(f"{line} >&-", shell=True, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(f"{line} >&- 2>&-", shell=True, timeout=60)  # it is not empty
    assert done.returncode == 2


def test_progress_bar_on_a_terminal(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal there is a bar with loss, speed and time left; in a pipe there are plain lines."""
    write()
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "100"}
    with command("train", "tiny.toml", "--run", "a", env=environment) as process:
        bar, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "14/14" in bar
    assert "rows/s" in bar
    with command("train", "tiny.toml", "--run", "b") as process:
        plain, _ = process.communicate(timeout=60)
    assert "\x1b" not in plain


def test_the_bar_of_a_run_that_is_gone_on_with(write: Callable[..., Path]) -> None:
    """It begins where the run is, and its speed is not that of all rows in the time since it was gone on with."""
    trainer = Trainer(load_config(write()), NumpyBackend())
    trainer.steps, trainer.rows, trainer.seconds = 7, 1000, 10.0

    def last_step() -> Iterator[dict[str, Any] | None]:
        trainer.steps, trainer.rows, trainer.seconds = 14, 2000, 20.0
        yield None

    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, color_system=None)
    assert list(watch(console)(trainer, last_step())) == [None]
    assert " 7/14 " in text.getvalue()
    assert " 0/14 " not in text.getvalue()
    assert " 100 rows/s" in text.getvalue()


def test_memory_that_runs_out_without_a_word() -> None:
    assert in_words(MemoryError()).startswith("out of memory: smaller network.hidden")
    assert in_words(MemoryError("of the device")) == "out of memory: of the device"


def test_the_source_folder_alone_says_what_to_do(tmp_path: Path) -> None:
    """From a clone that is not installed, `gpu_bp.kernels` is missing: the message says what to run."""
    blocker = "import sys; sys.modules['gpu_bp.kernels'] = None\nimport gpu_bp"
    done = subprocess.run([sys.executable, "-c", blocker], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "run `pip install -e .` in it" in done.stderr.splitlines()[-1]
