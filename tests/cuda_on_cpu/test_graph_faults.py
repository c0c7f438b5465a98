"""Where there is no CUDA graph, since a capture failed or none is wanted: every step is taken once all the same, and
why is said once. A launch that fails is told."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

import gpu_bp.backends
from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.fake_cupy import FakeCupy
from cuda_on_cpu.steps import assert_same_bits, backends, make_batch, make_step, state_of

pytestmark = pytest.mark.kernels


class NoGraphError(Exception):
    """Planted."""


def trained(b: Any, update: str = "momentum") -> list[np.ndarray]:
    step, batch = make_step(b, "squared_error", update), make_batch(b, "squared_error", 8)
    for _ in range(5):
        step(batch)
    return state_of(step)


def waits(self: Any, *arguments: Any) -> None:
    """What does something that no graph can hold, after half of the step."""
    self.synchronize()
    self.watched(*arguments)


def begin(self: Any) -> None:
    raise NoGraphError("no capture begins")


def end(self: Any) -> Any:
    self._device.capture = None
    raise NoGraphError("the capture was not valid")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("waits", "synchronisations during a capture"),
        ("begin_capture", "no capture begins"),
        ("end_capture", "the capture was not valid"),
    ],
)
def test_a_capture_that_fails(
    fault: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every step is taken once all the same, and why is said once, in words; what comes later can still be captured."""
    (b, cupy), (plain, _) = backends()
    wanted = trained(plain)
    stream = type(cupy.cuda.Stream())
    with monkeypatch.context() as planted, caplog.at_level(logging.WARNING, "gpu_bp"):
        if fault == "waits":
            planted.setattr(type(b), "watched", type(b).watch, raising=False)
            planted.setattr(type(b), "watch", waits)
        else:
            planted.setattr(stream, fault, {"begin_capture": begin, "end_capture": end}[fault])
        for _ in range(2):
            assert_same_bits(trained(b), wanted)
    assert cupy.device.counts["graphs"] == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"steps are not captured in a CUDA graph, which would be faster: {words}"
    ]
    assert_same_bits(trained(b), wanted)
    assert (cupy.device.counts["graphs"], b.captures.count) == (4, 1)


def test_an_interrupt_leaves_no_capture_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised as ever, and the step may be taken again."""
    (b, cupy), (plain, _) = backends()
    step, batch = make_step(b, "squared_error", "sgd"), make_batch(b, "squared_error", 8)
    step(batch)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as planted:
        planted.setattr(type(b), "watch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(batch)
    step.optimizer.steps = 1
    step.objective.rows = 8
    for _ in range(4):
        step(batch)
    assert_same_bits(state_of(step), trained(plain, "sgd"))
    assert cupy.device.counts["graphs"] == 4


def test_a_launch_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows what it has done: the error is told."""
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend()
    step, batch = make_step(b, "squared_error", "sgd"), make_batch(b, "squared_error", 8)
    for _ in range(2):
        step(batch)
    before = state_of(step)[0]
    monkeypatch.setattr(cupy.device, "launch", lambda call, queue: (_ for _ in ()).throw(NoGraphError("launch failed")))
    with pytest.raises(NoGraphError, match="launch failed"):
        step(batch)
    assert_same_bits([before], state_of(step)[:1])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'nvmath'"), "nvmath-python is not installed (pip install"),
        (RuntimeError("no libcublas\nsecond line"), "nvmath-python cannot be used: no libcublas"),
    ],
)
def test_without_the_bindings(error: Exception, words: str, caplog: pytest.LogCaptureFixture) -> None:
    """CuPy multiplies, nothing is captured, and it is said why, once."""
    cupy = FakeCupy()

    def bindings() -> Any:
        raise error

    module = cupy_backend_module(cupy, bindings)
    b = module.CupyBackend()
    with caplog.at_level(logging.WARNING, "gpu_bp"):
        assert module.why_unusable() is None
        states = [trained(b), trained(b)]
    assert_same_bits(*states)
    assert (cupy.device.counts["graphs"], b.captures.count) == (0, 0)
    assert words in b.captures.refused
    assert len(caplog.records) == 1
    assert words in caplog.text
    assert "\nsecond" not in caplog.text
    assert b.libraries()["products"] == "cupy"
    for got, wanted in zip(states[0], trained(cupy_backend_module().CupyBackend()), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_no_graphs_as_asked(caplog: pytest.LogCaptureFixture) -> None:
    """Which is nothing to be told."""
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend(graphs=False)
    trained(b)
    assert (cupy.device.counts["graphs"], caplog.records) == (0, [])
    assert b.libraries()["products"] != "cupy"


@pytest.mark.parametrize(("value", "graphs"), [(None, 4), ("1", 4), ("0", 0)])
def test_the_environment_says_no(value: str | None, graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For whoever looks for a fault."""
    cupy = FakeCupy()
    monkeypatch.setattr(gpu_bp.backends, "cupy_backend", cupy_backend_module(cupy), raising=False)
    monkeypatch.delenv("GPU_BP_GRAPHS", raising=False)
    if value is not None:
        monkeypatch.setenv("GPU_BP_GRAPHS", value)
    trained(gpu_bp.backends.select("cupy")[0])
    assert cupy.device.counts["graphs"] == graphs
