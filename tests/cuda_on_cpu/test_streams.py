"""Rows that come from the host while the device computes: what must wait for what, on a device that is as late as it
may be. Each wait is left out once, and is seen to be missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpu_bp
from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.device import PinnedMemoryError
from cuda_on_cpu.fake_cupy import FakeCupy
from gpu_bp import Batches, Network, Objective, Optimizer, Source, Step, registry
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.data.sources import UploadedSource, empty
from gpu_bp.data.task import Task
from gpu_bp.schedule import constant

pytestmark = pytest.mark.kernels


class Waves(Source):
    """Rows of a host: two waves in the row's number, and one as the target."""

    def __init__(self) -> None:
        super().__init__(61, 2, 1, Task("none"), block_rows=4)

    def fill(self, rows: Any, batch: Any) -> None:
        batch.inputs[:] = np.sin(rows[:, None] * [1.0, 0.3])
        batch.targets[:] = np.cos(rows[:, None] * 0.7)


def trained(b: Backend, *, waits: bool) -> np.ndarray:
    """The parameters after three epochs over windows of three blocks, the second left early.

    waits: whether the host waits after each step, so that the device is never behind; else it waits at the end alone.
    """
    batches = Batches(b, Waves(), 5, "shuffled", 1, dtype="float64", window_blocks=3)
    network = Network([2, 4, 1], ["tanh", "identity"], backend=b, dtype="float64")
    rng = np.random.default_rng(1)
    network.load({name: 0.5 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    step = Step(
        Objective(network, registry.loss("squared_error"), 5), Optimizer(registry.update("sgd"), network, constant(0.1))
    )
    for epoch, n in enumerate((13, 5, 13)):
        for _, batch in zip(range(n), batches.epoch(epoch), strict=False):
            step(batch)
            if waits:
                b.synchronize()
    return b.to_host(network.parameters)


def lazy_backend(cupy: FakeCupy | None = None, **faults: Any) -> Any:
    """A CupyBackend on a lazy device, with other methods."""
    module = cupy_backend_module(cupy or FakeCupy(lazy=True))
    return type("Faulty", (module.CupyBackend,), faults)()


@pytest.mark.parametrize("waits", [False, True])
def test_a_training_over_windows(waits: bool) -> None:
    """No copy comes too early or too late, however late the device is: the same as NumPy's."""
    got, wanted = (trained(b, waits=waits) for b in (lazy_backend(), NumpyBackend()))
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


def nothing(*_: Any) -> None:
    pass


def upload_at_once(self: Any, host: np.ndarray, array: Any) -> None:
    """`upload` that does not wait for what reads the array."""
    array.data.copy_from_host_async(host.ctypes.data, host.nbytes, self._uploads)
    self._uploaded.record(self._uploads)


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        pytest.param({"await_uploads": nothing}, True, id="computed before the rows arrive"),
        pytest.param({"upload": upload_at_once}, False, id="copied over rows that are still to be gathered"),
        pytest.param({"finish_uploads": nothing}, False, id="staging memory filled before it was copied"),
    ],
)
def test_a_missing_wait_is_seen(fault: dict[str, Any], waits: bool) -> None:
    """The first shows where the copies are behind the steps, the others where the steps are behind the copies."""
    got, wanted = (trained(b, waits=waits) for b in (lazy_backend(**fault), NumpyBackend()))
    assert not np.allclose(got, wanted, rtol=1e-6)


def test_staging_memory_that_goes_too_early_is_seen() -> None:
    """Pinned memory that was given back is given to the next who asks; the copy must have been made."""
    rows, source = np.arange(7), Waves()
    for fault in ({}, {"finish_uploads": nothing}):
        b = lazy_backend(**fault)
        batch = empty(b, source, 7, "float64")
        UploadedSource(b, source).fill(b.to_device(rows), batch)
        if fault:
            with pytest.raises(PinnedMemoryError):
                b.to_host(batch.inputs)
        else:
            np.testing.assert_array_equal(b.to_host(batch.inputs), np.sin(rows[:, None] * [1.0, 0.3]))


def test_windows_that_are_dropped_take_no_memory_from_a_copy() -> None:
    """An epoch is left, and its window goes, while the rows are on their way to the device."""
    for fault in ({}, {"finish_uploads": nothing}):
        cupy = FakeCupy(lazy=True)
        b = lazy_backend(cupy, **fault)
        next(Batches(b, Waves(), 5, "shuffled", 1, dtype="float64").epoch(0))  # a single window, without a thread
        if fault:
            with pytest.raises(PinnedMemoryError):
                cupy.cuda.runtime.deviceSynchronize()
        else:
            cupy.cuda.runtime.deviceSynchronize()


def test_a_wait_is_for_what_the_event_was() -> None:
    """An event that is recorded anew is waited for as it was when the wait was asked for; nobody runs further."""
    cupy, ran = FakeCupy(lazy=True), []
    other, event = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Event()
    cupy.device.launch(lambda: ran.append("first"))
    event.record()
    other.wait_event(event)
    cupy.device.launch(lambda: ran.append("second"))
    event.record()
    cupy.device.launch(lambda: ran.append("copied"), other.queue)
    assert ran == []
    other.synchronize()
    assert ran == ["first", "copied"]
    event.synchronize()
    assert ran == ["first", "copied", "second"]


def test_long_ranges_are_generated_in_parts() -> None:
    """The same rows, and stages on the device that have room for a part alone."""
    config = gpu_bp.parse_config(
        {
            "data": {"kind": "teacher", "rows": 50},
            "optimizer": {"kind": "sgd", "learning_rate": 1},
            "train": {"steps": 1},
        }
    )
    rows = []
    for numbers in (2**24, 32 * 7):  # the widest stage has 32 columns
        module = cupy_backend_module(FakeCupy())
        module.Generator.AT_ONCE = numbers
        rows.append(gpu_bp.load_data(config, backend=module.CupyBackend()).rows("train"))
    np.testing.assert_array_equal(rows[0].inputs, rows[1].inputs)
    np.testing.assert_array_equal(rows[0].targets, rows[1].targets)
