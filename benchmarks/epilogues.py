"""Where an epilogue of cublasLt is faster than a product and kernels: the rows of gpu_bp/backends/epilogues.py.

    python -m benchmarks.epilogues [--json FILE]

Needs a CUDA device. First, whether trainings agree: the change by one step in float32 to 1e-5, and the loss after 1,000
steps to 1e-3. Then a layer of so many rows and units, and the gradients of its weights and biases, are computed apart
and in one, both captured in a graph, in interleaved rounds. An epilogue counts as faster where the third quartile of
its rounds is below the first one of the others, and its median at least 3 % below theirs. A row is printed where that
is so at all shapes of the grid that are as large; beyond the grid nobody has looked.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np

from benchmarks.rounds import each_round
from gpu_bp import Batch, Network, Objective, Optimizer, Step, UserError, registry, select
from gpu_bp.backends.cublas import PRODUCTS
from gpu_bp.backends.cublaslt import EPILOGUES
from gpu_bp.backends.epilogues import Faster
from gpu_bp.schedule import constant

ROWS = (256, 4096, 32768)
WIDTHS = (64, 256, 1024, 4096)
AT_ONCE = 10  # layers a graph: to launch it costs the host some
SECONDS = 0.02  # a round
MARGIN = 0.03
ACTIVATIONS = {"bias": "identity", "relu_bias": "relu", "gelu_bias": "gelu_tanh"}
# How far results may lie apart, of the largest one: sums in another order, then rounded.
TOLERANCES = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
STEP, LOSS = 1e-5, 1e-3  # of trainings
STEPS = 1000
TOO_LARGE = "does not fit into the memory"


@dataclass(frozen=True)
class Cell:
    """A layer of so many rows and units, and as many inputs: microseconds apart and in one, by quartiles.

    They are empty where nothing could be measured, for the `reason`. `difference` is that of the results.
    """

    epilogue: str
    product: tuple[str, str, str]
    rows: int
    width: int
    apart: tuple[float, ...] = ()
    in_one: tuple[float, ...] = ()
    difference: float = 0.0
    reason: str = ""

    @property
    def faster(self) -> bool:
        if self.reason or self.difference > TOLERANCES[self.product[1]]:
            return False
        return self.in_one[2] < self.apart[0] and self.in_one[1] <= (1 - MARGIN) * self.apart[1]


@dataclass(frozen=True)
class Agreement:
    """Of a training apart and in one: how far the changes by a step, and the losses after all, lie apart, relatively.

    `found`: for how many products cublasLt has an algorithm. There is a `reason` where it failed.
    """

    activation: str
    found: int = 0
    step: float = 0.0
    loss: float = 0.0
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.found > 0 and self.step <= STEP and self.loss <= LOSS


def everything(capability: str) -> list[Faster]:
    """A table by which all is done in one that can be."""
    return [Faster(name, product, capability, 0, 0, "") for name in EPILOGUES for product in PRODUCTS]


def measured_products(epilogue: str, backend: Any) -> list[tuple[str, str, str]]:
    """Those that trainings in lower precisions have: gradients are float32, whatever the factors."""
    refused = {name for name in ("tf32", "float16", "bfloat16") if backend.refuses(name)}
    return [
        product
        for product in PRODUCTS
        if product[0] != "float64"
        and (epilogue != "bias_gradient" or product[1] == "float32")
        and not refused & set(product)
    ]


def measure(backend: type[Any], epilogue: str, product: tuple[str, str, str], rows: int, width: int) -> Cell:
    """Times a layer on a `CupyBackend` that does all apart, and on one that does this in one."""
    cell, (of_factors, of_product, arithmetic) = Cell(epilogue, product, rows, width), product
    apart = backend(epilogues=())
    in_one = backend(epilogues=everything(apart.libraries()["compute capability"]))
    if 2 * 4 * (4 * rows * width + 3 * width * width) > apart.free_bytes():
        return replace(cell, reason=TOO_LARGE)
    block = np.random.default_rng(0).standard_normal((min(rows, 1024), width)).astype(np.float32)

    def array(*shape: int, dtype: str = of_factors, scale: float = 1.0, first: float = 0.5) -> Any:
        host = np.resize(np.float32(scale) * block, shape)
        host.flat[0] = first
        made = apart.zeros(shape, dtype)
        apart.copy(apart.to_device(host), made)
        return made

    signals = array(rows, width, scale=0.1, first=np.nan)  # which must stay one
    made: list[tuple[Any, Any]] = []
    if epilogue == "bias_gradient":
        inputs = array(rows, width)
        made = [(apart.zeros((width, width), of_product), apart.zeros((width,), "float32")) for _ in range(2)]
        calls = [
            partial(apart.dense_gradients, signals, inputs, *made[0], arithmetic=arithmetic),
            partial(in_one.products.dense_gradients, signals, inputs, *made[1], arithmetic),
        ]
    else:
        phi = registry.activation(ACTIVATIONS[epilogue])
        layer = array(width, width, scale=width**-0.5), array(width, dtype="float32")
        for _ in range(2):
            v = apart.zeros((rows, width), of_product)
            made.append((v, apart.zeros((rows, width), of_product) if epilogue == "gelu_bias" else v))
        calls = [
            partial(apart.dense, phi, signals, *layer, *made[0], arithmetic=arithmetic),
            partial(in_one.products.dense, phi, signals, *layer, *made[1], arithmetic),
        ]
    calls[0]()
    if not calls[1]():
        return replace(cell, reason="cublasLt has no such product")
    difference = max(_difference(*(apart.to_host(x) for x in pair)) for pair in zip(*made, strict=True))
    recorded = [apart.record(partial(_several, call)) for call in calls]
    rounds = each_round(apart, recorded, seconds=SECONDS)
    apart_us, in_one_us = (tuple(1e6 * x / AT_ONCE for x in quantiles(each, n=4)) for each in rounds)
    return replace(cell, apart=apart_us, in_one=in_one_us, difference=difference)


def _several(call: Callable[[], Any]) -> None:
    for _ in range(AT_ONCE):
        call()


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Of the largest finite number; infinite where one has a NaN that the other has not."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if (np.isnan(a) != np.isnan(b)).any():
        return float("inf")
    return float(np.nanmax(np.abs(a - b), initial=0) / max(np.nanmax(np.abs(a), initial=0), 1e-30))


def rows_of(cells: Sequence[Cell], capability: str, measured: str) -> list[Faster]:
    """The rows of the table: of an epilogue and its dtypes the smallest shapes from which on all cells are faster."""
    found = []
    kind = lambda cell: (cell.epilogue, cell.product)  # noqa: E731
    for (epilogue, product), group in itertools.groupby(sorted(cells, key=kind), kind):
        of_kind = [c for c in group if c.reason != TOO_LARGE]
        corners = [
            (c.rows, c.width)
            for c in of_kind
            if all(other.faster for other in of_kind if other.rows >= c.rows and other.width >= c.width)
        ]
        smallest = [c for c in corners if not any(o != c and o[0] <= c[0] and o[1] <= c[1] for o in corners)]
        found += [Faster(epilogue, product, capability, rows, width, measured) for rows, width in sorted(smallest)]
    return found


def agree(backend: type[Any], activation: str, steps: int = STEPS) -> Agreement:
    """Trains in float32 on a backend that does all apart, and on one that does in one what can be."""
    capability = backend().libraries()["compute capability"]
    changes, losses, found = [], [], 0
    for table in ((), everything(capability)):
        b = backend(epilogues=table)
        widths, rng = [16, 64, 64, 8], np.random.default_rng(1)
        network = Network(widths, [activation, activation, "identity"], backend=b)
        network.load({name: 0.2 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
        x = rng.standard_normal((256, widths[0])).astype(np.float32)
        d = np.tanh(x @ rng.standard_normal((widths[0], widths[-1])).astype(np.float32) / 4)
        batch = Batch(b.to_device(x), b.to_device(d), b.to_device(np.arange(256)))
        step = Step(
            Objective(network, registry.loss("squared_error"), 256),
            Optimizer(registry.update("momentum"), network, constant(0.02)),
        )
        before = b.to_host(network.parameters)
        step(batch)
        changes.append(b.to_host(network.parameters) - before)
        for _ in range(steps - 2):
            step(batch)
        step.objective.mean_loss()  # forgotten
        step(batch)
        losses.append(step.objective.mean_loss())
        found = b.products.lt.found if b.products.lt else 0
    return Agreement(activation, found, _difference(*changes), abs(losses[1] / losses[0] - 1))


def run(backend: Any, steps: int = STEPS) -> list[Agreement]:
    """Of every activation that can be done in one; nothing on a backend without cublasLt."""
    if backend.name != "cupy" or backend.products.gemm is None:
        return []
    found = []
    for name in ACTIVATIONS.values():
        try:
            found.append(agree(type(backend), name, steps))
        except Exception as error:  # a report of everything else is worth more than a traceback
            found.append(Agreement(name, reason=f"{type(error).__name__}: {error}"))
    return found


def run_cell(backend: type[Any], epilogue: str, product: tuple[str, str, str], rows: int, width: int) -> Cell:
    """As `measure`, where an error is the reason why there is nothing."""
    try:
        return measure(backend, epilogue, product, rows, width)
    except Exception as error:
        return Cell(epilogue, product, rows, width, reason=f"{type(error).__name__}: {error}")


def table(cells: Sequence[Cell]) -> str:
    """As a readable table."""
    lines = ["| epilogue | dtypes | rows | units | apart, us | in one, us | |", "|---|---|---|---|---|---|---|"]
    for c in cells:
        times = [f"{t[1]:.1f} ({t[0]:.1f} to {t[2]:.1f})" if t else "" for t in (c.apart, c.in_one)]
        verdict = c.reason or ("faster" if c.faster else "")
        lines.append(
            f"| {c.epilogue} | {' '.join(c.product)} | {c.rows} | {c.width} | {' | '.join(times)} | {verdict} |"
        )
    return "\n".join(lines)


def agreement_table(found: Sequence[Agreement]) -> str:
    """As a readable table."""
    lines = ["| activation | products in one | after a step | loss after all | |", "|---|---|---|---|---|"]
    for a in found:
        verdict = "ok" if a.passed else f"does not pass {a.reason}".strip()
        lines.append(f"| {a.activation} | {a.found} | {a.step:.1e} | {a.loss:.1e} | {verdict} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        backend: Any = select("cupy")[0]
        if backend.products.gemm is None:
            raise UserError(f"epilogues need NVIDIA's bindings: {backend.products.why_not}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    libraries = backend.libraries()
    measured = f"{backend.device}, cuBLAS {libraries['cublas']}, {datetime.now(UTC):%Y-%m-%d}"
    print(measured, agreement_table(found := run(backend)), sep="\n\n", flush=True)
    cells = []
    for epilogue in EPILOGUES:
        for product, rows, width in itertools.product(measured_products(epilogue, backend), ROWS, WIDTHS):
            cells.append(run_cell(type(backend), epilogue, product, rows, width))
    rows_found = rows_of(cells, libraries["compute capability"], measured)
    print("", table(cells), "", "FASTER: tuple[Faster, ...] = (", sep="\n")
    print(*(f"    Faster({', '.join(repr(x) for x in row)})," for row in rows_found), ")", sep="\n")
    if options.json:
        report = {
            "measured": measured,
            "libraries": libraries,
            "agreements": [asdict(a) | {"passed": a.passed} for a in found],
            "cells": [asdict(c) | {"faster": c.faster} for c in cells],
            "rows": [row._asdict() for row in rows_found],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(a.passed for a in found) else 1


if __name__ == "__main__":
    sys.exit(main())
