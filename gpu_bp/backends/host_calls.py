"""What the NumPy backend calls beside NumPy's own functions and the twins: again and again, where it is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gpu_bp.backends.host_scratch import Scratch
from gpu_bp.registry import Purpose, element_of_step, normals
from gpu_bp.registry import dropout as dropout_of
from gpu_bp.spec import Array

FEW = 2**13  # elements to be added


def is_set(flag: Array | None) -> bool:
    """Whether a training has gone wrong: see `Backend.watch`."""
    return flag is not None and bool(flag.item() >= 0)


def advance(counter: Array) -> None:
    counter[0] += 1


def add_sum(x: Array, ones: Array, total: Array) -> None:
    """Pairwise, so that float32 is accurate enough within a batch; a few are added faster as a product."""
    total[0] += x.dot(ones) if len(x) <= FEW else np.add.reduce(x)


def dropout(seed: int, step: Array, start: int, rate: float, x: Array, out: Array, scratch: Scratch) -> None:
    dropout_of(seed, element_of_step(int(step[0]), 0, start), rate, x, out, scratch)


def input_noise(seed: int, step: Array, start: int, sd: float, x: Array, out: Array) -> None:
    noise = normals(seed, Purpose.INPUT_NOISE, element_of_step(int(step[0]), 0, start), len(x))
    np.add(x, sd * noise, out=out, casting="unsafe")


def step_factor(
    scale: float, weight: Array | None, squares: Array | None, most: float, out: Array, loss_scale: Array | None
) -> None:
    total = 1.0 if weight is None else float(weight[0])
    mean = 1 / total if total > 0 else 0.0
    if loss_scale is not None:
        mean /= float(loss_scale[0])
    clip = 1.0 if squares is None else most / (math.sqrt(float(squares[0])) * scale * mean + 1e-6)
    out[0] = mean * min(clip, 1.0)


def adjust_scale(
    scale: Array, good: Array, skip: Array, steps: Array, flag: Array, every: int, least: float, most: float
) -> None:
    if is_set(flag):
        return
    skipped = is_set(skip)
    run = 0 if skipped else int(good[0]) + 1
    if skipped and scale[0] > least:
        scale *= 0.5
    elif skipped:
        flag[0] = steps[0] + 1
    elif run == every and scale[0] < most:
        scale *= 2
    good[0] = run % every


def watch(gradients: Array, zeros: Array, total: Array, steps: Array, flag: Array) -> None:
    """As many elements at a time as there are zeros: 0 times what is finite is 0, and 0 times anything else is NaN."""
    n, finite = len(zeros), math.isfinite(total.item())
    for start in range(0, len(gradients), n):
        part = gradients[start : start + n]
        finite = finite and part.dot(zeros[: len(part)]) == 0
    if not finite and not is_set(flag):
        flag[0] = steps[0] + 1


def unless_set(flag: Array | None, run: Callable[[], object]) -> None:
    if not is_set(flag):
        run()
