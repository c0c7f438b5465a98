"""Precisions that a backend lacks: refused before anything is made, in one line that says why and what to use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w

import gpu_bp
from gpu_bp import Network, NumpyBackend, Trainer, UserError
from gpu_bp.backends import Backend
from gpu_bp.cli import main
from gpu_bp.config_file import parse_config
from gpu_bp.precision import PRECISIONS, PrecisionName

Tiny = Callable[..., dict[str, Any]]
LOW = [name for name, precision in PRECISIONS.items() if precision.products]
LEAST = {"tf32": "8.0", "bfloat16": "8.0", "float16": "7.0"}


def test_the_schema_names_them_all() -> None:
    assert get_args(PrecisionName) == tuple(PRECISIONS)
    assert list(LEAST) == LOW


@pytest.mark.parametrize("precision", LOW)
def test_numpy_refuses(precision: str, tiny_config: Tiny, tmp_path: Path) -> None:
    config = parse_config(tiny_config(train={"precision": precision}))
    with pytest.raises(UserError) as refused:
        gpu_bp.train(config, backend="numpy", run=tmp_path / "run")
    assert str(refused.value) == (
        f"train.precision = {precision}: the numpy backend has no matrix products in {precision}; use float32, or "
        f"--backend cupy on a GPU of compute capability {LEAST[precision]} or newer"
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=f"train.precision = {precision}: the numpy backend"):
        Network([2, 3, 1], ["tanh", "identity"], backend=NumpyBackend(), products=precision)


@pytest.mark.parametrize("precision", LOW)
def test_a_training(backend: Backend, precision: str, tiny_config: Tiny) -> None:
    """Where there are such products it ends near float32's; else it is refused."""
    finals = []
    for each in (precision, "float32"):
        made = tiny_config(train={"precision": each, "epochs": 15}, loss={"kind": "cross_entropy"})
        if each == precision and backend.refuses(precision):
            with pytest.raises(UserError, match=f"train.precision = {precision}: "):
                Trainer(parse_config(made), backend)
            return
        trainer = Trainer(parse_config(made), backend)
        finals.append([line for line in trainer.run() if line][-1]["validation_loss"])
    assert finals[0] != finals[1]
    assert finals[0] == pytest.approx(finals[1], rel={"tf32": 0.005, "bfloat16": 0.05, "float16": 0.1}[precision])


def test_the_command_line(tiny_config: Tiny, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and one line; gradients are checked in float64 whatever the precision."""
    (in_tmp / "tiny.toml").write_text(tomli_w.dumps(tiny_config(train={"precision": "bfloat16"})))
    for command in ("train", "info"):
        with pytest.raises(SystemExit) as exited:
            main([command, "tiny.toml", "--backend", "numpy"])
        assert exited.value.code == 2
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "train.precision = bfloat16" in line] == said[-1:]
    with pytest.raises(SystemExit) as exited:
        main(["check-gradients", "tiny.toml", "--json"])
    assert exited.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)["passed"]


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("capability", "lacking"),
    [("61", LOW), ("70", ["tf32", "bfloat16"]), ("75", ["tf32", "bfloat16"]), ("80", []), ("120", [])],
)
def test_a_device_that_is_too_old(capability: str, lacking: list[str]) -> None:
    from cuda_on_cpu.backend import cupy_backend_module
    from cuda_on_cpu.fake_cupy import FakeCupy

    backend = cupy_backend_module(FakeCupy(capability=capability)).CupyBackend()
    said = f"has compute capability {capability[:-1]}.{capability[-1]}, and"
    refused = [name for name in LOW if said in (backend.refuses(name) or "")]
    assert refused == lacking
    for name in lacking:
        assert f"{name} needs {LEAST[name]} or newer; use float32" in backend.refuses(name)
