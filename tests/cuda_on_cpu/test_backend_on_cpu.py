"""CupyBackend, its own Python, on the stand-in: the same results as NumPy's, and nothing in a step that a graph
could not hold. (The formulas themselves: test_kernels_on_cpu.py and test_other_kernels_on_cpu.py.)"""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, bike_sharing

from benchmarks.curves import CHANGED
from cuda_on_cpu import codegen
from cuda_on_cpu.backend import MODULES, cupy_backend_module, cupy_on_cpu
from cuda_on_cpu.fake_cupy import FakeCupy
from cuda_on_cpu.steps import make_batch, make_step
from cuda_on_cpu.test_kernels_on_cpu import dtypes, orders
from gpu_bp import Network, Optimizer, Trainer, load_config, registry
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.schedule import linear

pytestmark = pytest.mark.kernels

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))


# The protocol's methods ------------------------------------------------------------------------------------


def test_the_stand_in_is_usable() -> None:
    module = cupy_backend_module()
    assert module.why_unusable() is None
    assert module.CupyBackend().name == "cupy"
    assert "stands in" in cupy_on_cpu().device
    assert sys.modules["cupy"] is codegen.real_cupy()


@dtypes
def test_arrays(dtype: str) -> None:
    b = cupy_on_cpu()
    host = np.arange(12, dtype=dtype).reshape(3, 4)
    for given in (host, host.T, host[::2]):
        np.testing.assert_array_equal(b.to_host(b.to_device(given)), given)
    zeros = b.zeros((2, 3), dtype)
    assert zeros.dtype == dtype
    np.testing.assert_array_equal(b.to_host(zeros), np.zeros((2, 3)))
    back = b.to_host(zeros)
    back[...] = 1  # a copy: the device's array is unharmed
    assert not b.to_host(zeros).any()


@pytest.mark.parametrize("shape", [(10, 3), (10,), (10, 1)])
def test_gather(shape: tuple[int, ...]) -> None:
    rows = np.array([9, 0, 3, 3])
    for dtype in (np.float32, np.float64, np.int64):
        table = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        results = []
        for b in (cupy_on_cpu(), NumpyBackend()):
            out = b.zeros((4, *shape[1:]), dtype)
            b.gather(b.to_device(table), b.to_device(rows), out)
            results.append(b.to_host(out))
        np.testing.assert_array_equal(results[0], results[1])


@dtypes
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 4, 5), (1, 4, 1), (5, 1, 3), (1, 1, 7), (7, 1, 1)])
def test_matmul(sizes: tuple[int, int, int], dtype: str) -> None:
    m, k, n = sizes
    rng = np.random.default_rng(0)
    for ta, tb in itertools.product((False, True), repeat=2):
        a = rng.standard_normal((k, m) if ta else (m, k)).astype(dtype)
        c = rng.standard_normal((n, k) if tb else (k, n)).astype(dtype)
        results = []
        for b in (cupy_on_cpu(), NumpyBackend()):
            out = b.to_device(np.full((m, n), np.nan, dtype))
            b.matmul(b.to_device(a), b.to_device(c), out, transpose_a=ta, transpose_b=tb)
            results.append(b.to_host(out))
        np.testing.assert_allclose(results[0], results[1], rtol=1e-5 if dtype == "float32" else 1e-14)


# A step ----------------------------------------------------------------------------------------------------


def parameters_after(b: Backend, loss: str, update: str, *, rate: Any = None) -> tuple[np.ndarray, float]:
    step = make_step(b, loss, update, rate=rate)
    for rows in (8, 8, 5, 8, 1):
        step(make_batch(b, loss, rows))
    return b.to_host(step.objective.network.parameters), step.objective.mean_loss()


@pytest.mark.parametrize("update", list(registry.UPDATES))
@pytest.mark.parametrize("loss", list(registry.LOSSES))
def test_steps_agree_with_numpy(loss: str, update: str) -> None:
    """Five steps of every loss with every update, shorter batches among them, and a falling rate."""
    results = [parameters_after(b, loss, update, rate=linear(0.1, 0.01, 5)) for b in (cupy_on_cpu(), NumpyBackend())]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-12, atol=1e-14)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-12)


@orders
def test_steps_in_any_order_of_threads(order: Any) -> None:
    b = cupy_backend_module(FakeCupy(order)).CupyBackend()
    for one, two in zip(
        parameters_after(b, "cross_entropy", "adam"),
        parameters_after(cupy_on_cpu(), "cross_entropy", "adam"),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("update", list(registry.UPDATES))
@pytest.mark.parametrize("loss", list(registry.LOSSES))
def test_a_step_allocates_nothing(loss: str, update: str) -> None:
    """After the first step of a batch size, the one that is captured too: no allocation, no copy of an array, no wait
    for the device.

    The scalars that change with every step are copied from pinned memory, which the host does not wait for.
    """
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend()
    step, batch = make_step(b, loss, update), make_batch(b, loss, 8)
    step(batch)
    cupy.device.counts.clear()
    for _ in range(3):
        step(batch)
    assert cupy.device.counts.pop("launches") > 0
    assert cupy.device.counts.pop("graphs") == 3
    record = registry.update(update)
    parameters = {name: value for name, value in record.values.items() if name != "weight_decay"}
    scalars = [record.scalars(k, 0.1, **parameters) for k in range(1, 5)]
    changed = sum(one != two for one, two in itertools.pairwise(scalars))
    assert cupy.device.counts.pop("asynchronous copies", 0) == changed
    assert not +cupy.device.counts


@pytest.mark.parametrize("lazy", [False, True])
def test_scalars_outlive_their_copies(lazy: bool) -> None:
    """More steps than there are rows of pinned memory, on a device that is as late as it may be."""
    steps, cupy = 1300, FakeCupy(lazy=lazy)
    module = cupy_backend_module(cupy)
    assert steps > 2 * module.Scalars.ROWS
    results = []
    for b in (module.CupyBackend(), NumpyBackend()):
        network = Network([2, 1], ["identity"], backend=b, dtype="float64")
        optimizer = Optimizer(registry.update("adam"), network, linear(0.1, 0.01, steps))
        gradients = b.to_device(np.ones(network.layout.size))
        for _ in range(steps):
            optimizer.step(gradients, 1.0)
        results.append(b.to_host(network.parameters))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-12)
    assert cupy.device.counts["synchronisations"] < 20 + 2 * steps / module.Scalars.ROWS


def test_a_rate_or_batch_size_that_changes_costs_a_copy() -> None:
    """The scalars hold 1 / rows and the rate; a change of either is a copy, which nobody waits for."""
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend()
    full, short = make_batch(b, "squared_error", 8), make_batch(b, "squared_error", 5)
    step = make_step(b, "squared_error", "sgd")
    for batch in (full, short, full):
        step(batch)
    cupy.device.counts.clear()
    for batch, copies in ((full, 0), (short, 1), (short, 1), (full, 2)):
        step(batch)
        assert cupy.device.counts["asynchronous copies"] == copies
    assert cupy.device.counts["allocations"] == cupy.device.counts["synchronisations"] == 0


# Whole trainings -------------------------------------------------------------------------------------------


def config_overrides(name: str) -> list[str]:
    overrides = ["train.precision=float64", "train.log_every=1", *CHANGED.get(name, ())]
    if name == "bike-sharing":
        overrides.append(f"data.path={bike_sharing()}")
    return overrides


@pytest.mark.parametrize("name", CONFIGS)
def test_first_50_steps_of_a_config(name: str) -> None:
    """The loss of every step, and the validation and training metrics where there are any, to 1e-9."""
    config = load_config(ROOT / "configs" / f"{name}.toml", config_overrides(name))
    curves = []
    for b in (cupy_on_cpu(), NumpyBackend()):
        trainer = Trainer(config, b)
        lines = [line for line in itertools.islice(trainer.run(), 50) if line is not None]
        for line in lines:
            line.pop("seconds")
        curves.append([*lines, {k: v for k, v in trainer.evaluate()["train"].items() if not isinstance(v, list)}])
    assert len(curves[0]) == 51
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, rel=1e-9, abs=1e-300)


# The real module -------------------------------------------------------------------------------------------


def test_names_of_the_real_cupy() -> None:
    """Every `cupy.a.b` that the backend's text names is there once it is imported (the stand-in has them all)."""
    folder = ROOT / "gpu_bp/backends"
    texts = [path.read_text().replace("from __future__ import annotations", "") for path in sorted(folder.glob("*.py"))]
    tree = ast.parse("\n".join(texts))
    # cupy.cublas and cupy.cuda.cublas need cuBLAS itself, which these tests do without: what names them is left out
    late = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "cublas"]
    assert len(late) == 1
    skipped = {id(node) for node in ast.walk(late[0])}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in skipped]
    named = {text for node in attributes if re.fullmatch(r"cupy(\.\w+)+", text := ast.unparse(node))}
    assert {"cupy.take", "cupy.cuda.runtime.getDeviceCount", "cupy.cuda.using_allocator"} <= named
    asked = {name for name in named if name.startswith("cupy.cuda.cublas")}
    script = "\n".join([f"from {MODULES[0]} import cupy", *sorted(named - asked)])
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    cupy_folder = Path(str(codegen.real_cupy().__file__)).parent
    assert "\ndef gemm(transa, transb, a, b, out=None" in (cupy_folder / "cublas.py").read_text()
    of_cupy_itself = (cupy_folder.parent / "cupyx" / "_runtime.py").read_text()
    assert all(f"{name}(" in of_cupy_itself for name in asked - {"cupy.cuda.cublas"})
