"""All kernels that the backend calls, by calling it with every record on a stand-in that runs nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import update_rules
from variants import VARIANTS, program, variant

from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.cpu import Kernel
from cuda_on_cpu.fake_cupy import FakeCupy
from gpu_bp import registry
from gpu_bp.data.preparation import Preparation, code_labels, code_targets
from gpu_bp.data.sources import GeneratedSource, empty
from gpu_bp.data.synthetic import Set
from gpu_bp.registry import Permutations, Purpose
from gpu_bp.spec import Activation, FusedLoss

# Kinds, so that tests can be spread over processes.
RECORDS = ("activations", "losses of any activation", "others", "random numbers")
KINDS = (*RECORDS, *VARIANTS)


def every_kernel(kind: str, dtype: str) -> list[Kernel]:
    """The kernels of a kind, each once, for float32 or float64."""
    cupy = FakeCupy(dry=True)
    module = cupy_backend_module(cupy)
    b = module.CupyBackend()
    v, y, losses, delta, probabilities = (b.zeros((2, 3), dtype) for _ in range(5))
    biases, classes = b.zeros((3,), dtype), b.zeros((2,), np.int64)
    activations = [phi for phi in registry.ACTIVATIONS.values() if isinstance(phi, Activation)]
    if kind == "activations":
        for phi in activations:
            b.activate(phi, v, None, y)
            b.activate(phi, v, biases, y)
            b.hidden_delta(phi, delta, v, y, delta)
    elif kind == "losses of any activation":
        many = registry.loss("quantile", levels=[0.01 * k for k in range(1, 100)])
        for loss in (*registry.LOSSES.values(), many):
            taken = [] if isinstance(loss, FusedLoss) else activations[:1] if loss is many else activations
            n = loss.n_outputs(3)
            outputs = [b.zeros((2, n), dtype) for _ in range(3)]
            for phi in taken:
                b.output_delta(loss, phi, outputs[0], probabilities, outputs[1], losses, outputs[2])
    elif kind == "others":
        module.why_unusable()
        for row in registry.ACTIVATIONS.values():
            if row not in activations:
                b.activate(row, v, None, y)
        for loss in registry.LOSSES.values():
            # a row kernel writes one loss a row, for which `losses` has room too
            targets = (probabilities, classes) if loss.targets == "classes" else (probabilities,)
            for target in targets if isinstance(loss, FusedLoss) else ():
                b.output_delta(
                    loss, activations[0], v, target, y, b.zeros((2, 1), dtype) if loss.per_row else losses, delta
                )
        b.column_sums(v, biases)
        b.accumulate(losses, b.zeros((1,), np.float64))
        b.accumulate(losses, b.zeros((1,), np.float64), squares=True)
        of_a_step(b, v, y, losses, delta, biases, classes)
        for record in update_rules.VARIANTS.values():
            state = [b.zeros((6,), dtype) for _ in record.state]
            parameters = {name: value for name, value in record.values.items() if name != "weight_decay"}
            scalars = record.scalars(1, 0.1, **parameters) | dict.fromkeys(registry.PENALTIES, 0.1)
            for penalties in ([], [*registry.PENALTIES.values()]):
                for factor, flag in itertools.product((None, b.zeros((1,), dtype)), (None, b.zeros((1,), np.int64))):
                    arrays = (b.zeros((6,), dtype), b.zeros((6,), dtype), state)
                    given = update_rules.numbers(b, record, penalties, 1.0, scalars, dtype)
                    b.update(record, penalties, *arrays, given, 3, factor, flag)
    elif kind == "random numbers":
        doubles, rows = b.zeros((5,), np.float64), b.zeros((2, 5), np.int64)
        b.uniforms(0, Purpose.NOISE, 0, doubles)
        b.normals(0, Purpose.NOISE, 0, doubles)
        b.count(0, rows[0])
        b.permute(Permutations.of(0, Purpose.ORDER, 5, 0, 2), 0, rows)
    else:
        for k in range(len(VARIANTS[kind])):
            generate(b, variant(kind, k), dtype)
    return list({kernel.text: kernel for kernel in cupy.device.kernels}.values())


def stored_kernels(dtype: Any) -> list[Kernel]:
    """The kernels of which arrays are stored in that dtype of fewer bits than float32."""
    cupy = FakeCupy(dry=True)
    b = cupy_backend_module(cupy).CupyBackend()
    small, other, whole = b.zeros((2, 3), dtype), b.zeros((2, 3), dtype), b.zeros((2, 3), np.float32)
    columns, step = b.zeros((3,), np.float32), b.zeros((1,), np.int64)
    b.copy(whole, small)
    b.column_sums(small, columns)
    for phi in (phi for phi in registry.ACTIVATIONS.values() if isinstance(phi, Activation)):
        for biases in (None, columns):
            b.activate(phi, small, biases, other)
        b.activate(phi, whole, columns, other)  # of a normalised layer
        for error, v, delta in ((small, small, small), (small, whole, whole), (whole, whole, whole)):
            b.hidden_delta(phi, error, v, other, delta)
    for x, y in itertools.product((small, whole), repeat=2):
        b.add(x, y, x)
        b.dropout(0, step, 5, 0.5, x, y)
    made = {kernel.text: kernel for kernel in cupy.device.kernels}.values()
    return [kernel for kernel in made if "float16.cuh" in kernel.text]


def of_a_step(b: Any, v: Any, y: Any, losses: Any, delta: Any, gains: Any, classes: Any) -> None:
    """What only some trainings use."""
    dtype = v.dtype
    scale, weights, factor = b.zeros((2, 1), dtype), b.zeros((2,), dtype), b.zeros((1,), dtype)
    total = b.zeros((1,), np.float64)
    b.add(v, y, y)
    for biases in (None, gains):
        b.normalise(v, gains, biases, scale, y)
    b.normalise_delta(delta, v, scale, gains)
    b.column_dots(v, y, b.zeros((3,), dtype))
    b.weigh(weights, losses, delta)
    for targets in (classes, v):
        for own in (None, b.zeros((2,), dtype)):
            b.class_weights(targets, gains, own, weights)
    step = b.zeros((1,), np.int64)
    b.dropout(0, step, 5, 0.5, v, v)
    b.input_noise(0, step, 5, 0.5, v, y)
    b.copy(v, y)
    b.copy(classes, b.zeros(classes.shape, np.int64))
    b.advance(step)
    for weight in (None, total):
        for squares in (None, total):
            for loss_scale in (None, b.zeros((1,), dtype)):
                b.step_factor(1.0, weight, squares, 1.0, factor, loss_scale)
    b.multiply(v, factor)
    counters = [b.zeros((1,), np.int64) for _ in range(4)]
    b.adjust_scale(factor, *counters, 2000, 1.0, 2.0**24)
    for flag in (None, b.zeros((1,), np.int64)):
        b.limit_norms(v, 1.0, flag)
        b.average(v, y, 0.5, flag)
    b.watch(gains, total, step, flag)


def generate(b: Any, made: Set, dtype: str) -> None:
    """The rows of a set as files would hold them, in float64; in float32 scaled and coded, as a network sees them."""
    rows = b.zeros((2,), np.int64)
    if dtype == "float64":
        target = b.zeros((2, made.target.width), np.int64 if made.classes else np.float64)
        b.generate(program(made), 0, 0, rows, (b.zeros((2, made.inputs.width), np.float64), target))
        return
    for name in ("squared_error", *(["cross_entropy"] if made.classes else [])):
        loss, n = registry.loss(name), made.inputs.width
        coding = code_labels(made.classes, loss) if made.classes else code_targets(made.target.width, made.binary, loss)
        scaling = {"shift": (0.5,) * n, "scale": (2.0,) * n}
        targets = {"target_shift": (0.5,) * made.target.width, "target_scale": (2.0,) * made.target.width}
        for chosen in (scaling, *([] if made.classes else [scaling | targets])):
            source = GeneratedSource(b, made, 0, 0, 100, Preparation(coding.task, **chosen), coding)
            source.fill(rows, empty(b, source, 2, dtype))
