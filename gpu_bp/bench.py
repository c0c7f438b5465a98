"""Where the time of a training step goes, and what of the machine it uses.

Three things are measured, one after the other, on the same backend: the training's own steps, as the trainer takes
them, for the time a step; the same steps again one operation at a time (see `timing.py`), for the parts of it; and a
product of large matrices and a sum of large arrays, for what the machine can do.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from gpu_bp.backends import Backend
from gpu_bp.config import Config
from gpu_bp.errors import UserError
from gpu_bp.memory import size
from gpu_bp.precision import PRECISIONS, stored
from gpu_bp.timing import Spent, Timing
from gpu_bp.trainer import Trainer

SECONDS = 3.0
ENDLESS = 10**9  # steps
WARM_UP = 3  # steps at least: kernels are compiled and arrays are made
SETTLED = 100  # steps between two looks at the device's times

# What the machine can do: products of ever larger matrices until one takes so long, and a sum of two large arrays.
MATRICES = (512, 1024, 2048, 4096, 8192)
LONG = 0.05  # seconds
SUMMED = 2**26  # bytes of each of the three arrays, beyond any cache
MUCH = (4096, 4096), 2**20  # widths and rows that are work for all workers
TRIES = 5  # of which the best counts


@dataclass(frozen=True)
class Peak:
    """What the machine can do, a second: floating-point operations of a product, and bytes read and written.

    matrices: the largest product's rows. array_bytes: of each array of the sum.
    """

    flops: float
    matrices: int
    bytes_per_second: float
    array_bytes: int


@dataclass(frozen=True)
class Bench:
    """What was measured of a training.

    data: where its rows lie. batch_size: rows of a step, but for the last of an epoch. steps, rows, seconds: of the
    steps that were taken undisturbed. phases: what a step takes one operation at a time, by phase.
    """

    backend: str
    device: str
    libraries: Mapping[str, Any]
    precision: str
    data: str
    batch_size: int
    steps: int
    rows: int
    seconds: float
    phases: Mapping[str, Spent]
    peak: Peak

    @property
    def total(self) -> Spent:
        """Of all phases."""
        return Spent(*(sum(getattr(x, name) for x in self.phases.values()) for name in ("seconds", "flop", "n_bytes")))

    def share(self, phase: str) -> float:
        """A phase's part of the time of all."""
        return self.phases[phase].seconds / self.total.seconds

    def to_json(self) -> dict[str, Any]:
        """All of it, with what follows from it."""
        total, step = self.total, self.seconds / self.steps
        return {
            "backend": self.backend,
            "device": self.device,
            "libraries": dict(self.libraries),
            "precision": self.precision,
            "data": self.data,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "rows": self.rows,
            "seconds": self.seconds,
            "rows_per_second": self.rows / self.seconds,
            "step": self._rates(Spent(step, total.flop, total.n_bytes)),
            "phases": {name: {"share": self.share(name), **self._rates(phase)} for name, phase in self.phases.items()},
            "peak": vars(self.peak),
        }

    def _rates(self, spent: Spent) -> dict[str, Any]:
        flops, n_bytes = (x / spent.seconds if spent.seconds else 0.0 for x in (spent.flop, spent.n_bytes))
        return {
            "seconds": spent.seconds,
            "flop": spent.flop,
            "bytes": spent.n_bytes,
            "flops": flops,
            "flops_of_peak": flops / self.peak.flops,
            "bytes_per_second": n_bytes,
            "bytes_of_peak": n_bytes / self.peak.bytes_per_second,
        }

    def lines(self) -> list[str]:
        """The same, to be read."""
        peak, total, step = self.peak, self.total, self.seconds / self.steps
        libraries = ", ".join(f"{name} {value}" for name, value in self.libraries.items())
        rows = [(name, f"{self.share(name):.0%}", phase) for name, phase in self.phases.items()]
        rows.append(("sum", f"{1:.0%}", total))
        rows.append(("the step itself", "", Spent(step, total.flop, total.n_bytes)))
        return [
            f"{self.device}: {self.precision}, {libraries}",
            self.data,
            f"{self.rows / self.seconds:,.0f} rows/s, {1e3 * step:.4g} ms a step "
            f"(batch_size {self.batch_size:,}, {self.steps:,} steps)",
            f"the machine: {peak.flops / 1e9:,.4g} GFLOP/s (product of matrices of {peak.matrices:,} rows), "
            f"{peak.bytes_per_second / 1e9:,.4g} GB/s (sum of arrays of {size(peak.array_bytes)})",
            "",
            _line("phase", "ms a step", "share", "GFLOP/s", "of peak", "GB/s", "of peak"),
            *(self._row(*row) for row in rows),
            "",
            "The phases were timed one operation at a time, the step itself as a training takes it.",
        ]

    def _row(self, name: str, share: str, spent: Spent) -> str:
        rates = self._rates(spent)
        products = (f"{rates['flops'] / 1e9:,.4g}", f"{rates['flops_of_peak']:.0%}") if spent.flop else ("-", "-")
        moved = f"{rates['bytes_per_second'] / 1e9:,.4g}", f"{rates['bytes_of_peak']:.0%}"
        return _line(name, f"{1e3 * spent.seconds:.4f}", share, *products, *moved)


def _line(name: str, *cells: str) -> str:
    return "  ".join([f"{name:<15}", *(f"{cell:>9}" for cell in cells)])


def bench(config: Config, backend: Backend, *, seconds: float = SECONDS, profile: bool = False) -> Bench:
    """Measures the training of a config on a backend; writes nothing.

    Args:
        seconds: how long steps are taken; half as long again for their parts.
        profile: steps and operations have names in a profiler's picture (NVTX).

    Raises:
        UserError: as a training; or there is nothing to write names for a profiler with.
    """
    if profile and backend.name == "numpy":
        raise UserError("--profile writes NVTX ranges, which NumPy has not: it needs CUDA, --backend cupy")
    config = endless(config)
    taken = take_steps(Trainer(config, backend), seconds, profile=profile)
    timing = Timing(backend, spans=profile)
    phases = take_apart(Trainer(config, cast(Backend, timing)), timing, seconds / 2, profile=profile)
    precision = config.train.precision
    return Bench(
        backend=backend.name,
        device=backend.device,
        libraries=backend.libraries(),
        precision=precision,
        phases=phases,
        peak=measure_peak(backend, precision),
        **taken,
    )


def endless(config: Config) -> Config:
    """The same training without an end, and without a line of metrics, so that nothing is evaluated."""
    train = {"epochs": None, "steps": ENDLESS, "log_every": ENDLESS}
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def take_steps(trainer: Trainer, seconds: float, *, profile: bool = False) -> dict[str, Any]:
    """Takes steps as a training does, for so long: what a `Bench` says of them."""
    backend, over = trainer.model.network.backend, False
    with closing(trainer.run(lambda: "measured" if over else "", together=True)) as steps:

        def take(seconds: float, least: int) -> float:
            begin = time.perf_counter()
            for n in itertools.count(1):
                with backend.span("step") if profile else nullcontext():
                    next(steps)
                if n >= least and time.perf_counter() - begin >= seconds:
                    break
            backend.synchronize()
            return time.perf_counter() - begin

        take(seconds / 10, WARM_UP)
        before = trainer.steps, trainer.rows
        taken = take(seconds, 1)
        measured = {
            "data": trainer.where_data,
            "batch_size": trainer.step_rows,
            "steps": trainer.steps - before[0],
            "rows": trainer.rows - before[1],
            "seconds": taken,
        }
        over = True
        next(steps)  # the trainer pauses, and looks whether all these steps were well
        return measured


def take_apart(trainer: Trainer, timing: Timing, seconds: float, *, profile: bool = False) -> dict[str, Spent]:
    """What a step of a trainer whose backend is timed spends in each phase, one operation at a time."""
    with closing(plain_steps(trainer, timing)) as steps:
        for _ in range(WARM_UP):
            next(steps)
        timing.settle()
        timing.reset()
        begin = time.perf_counter()
        for n in itertools.count(1):
            with timing.span("step, one operation at a time") if profile else nullcontext():
                next(steps)
            over = time.perf_counter() - begin >= seconds
            if over or n % SETTLED == 0:
                timing.settle()
            if over:
                break
    return {name: Spent(x.seconds / n, x.flop / n, x.n_bytes / n) for name, x in timing.spent.items()}


def plain_steps(trainer: Trainer, timing: Timing) -> Generator[None, None, None]:
    """The steps of a trainer whose backend is timed, part by part, epoch after epoch."""
    for epoch in itertools.count():
        with closing(trainer.batches.epoch(epoch)) as batches:
            while True:
                with timing.part("data"):
                    batch = next(batches, None)
                if batch is None:
                    break
                with timing.part("computation"):
                    trainer.step(batch)
                if batch.last:
                    yield


# What the machine can do ---------------------------------------------------------------------------------------------


def measure_peak(backend: Backend, precision: str) -> Peak:
    """The best of several tries, in arrays of that precision: what there is room for."""
    chosen = PRECISIONS[precision]
    products = _products(backend, stored(chosen.products, chosen.dtype), chosen.arithmetic)
    return Peak(*products, *measure_sums(backend, chosen.dtype))


def _products(backend: Backend, dtype: Any, arithmetic: str) -> tuple[float, int]:
    """Operations a second, and the rows of the largest matrices."""
    best, largest, item = 0.0, 0, np.dtype(dtype).itemsize
    for n in MATRICES:
        if largest and 3 * n * n * item > backend.free_bytes() / 2:
            break
        a, b, out = _arrays(backend, (n, n), dtype)
        seconds = _best(backend, lambda: backend.matmul(a, b, out, arithmetic=arithmetic))  # noqa: B023, called here
        best, largest = max(best, 2 * n**3 / seconds), n
        if seconds > LONG:
            break
    return best, largest


def measure_sums(backend: Backend, dtype: str) -> tuple[float, int]:
    """Bytes a second, and those of an array: its parts at once, by all workers."""
    n = min(SUMMED, backend.free_bytes() // 6) // np.dtype(dtype).itemsize
    arrays = _arrays(backend, (n,), dtype)
    step = -(-n // backend.division(*MUCH).workers)
    parts = [[array[start : start + step] for array in arrays] for start in range(0, n, step)]
    actions = [backend.record(partial(backend.add, *part), worker) for worker, part in enumerate(parts)]
    seconds = _best(backend, lambda: backend.together(actions))
    n_bytes = arrays[0].nbytes
    return 3 * n_bytes / seconds, n_bytes


def _arrays(backend: Backend, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any, Any]:
    """Two arrays of numbers, for a GPU takes less power over zeros; and one for the result."""
    numbers = np.resize(np.random.default_rng(0).random(2**16, np.float32).astype(dtype), shape)
    return backend.to_device(numbers), backend.to_device(numbers), backend.zeros(shape, dtype)


def _best(backend: Backend, call: Callable[[], Any]) -> float:
    """Seconds of the shortest of several calls, after one that does not count."""
    call()
    taken = []
    for _ in range(TRIES):
        begin = backend.mark()
        call()
        taken.append(backend.seconds(begin, backend.mark()))
    return min(taken)
