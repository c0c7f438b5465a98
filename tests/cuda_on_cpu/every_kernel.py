"""All kernels that the backend calls, by calling it with every record on a stand-in that runs nothing."""

from __future__ import annotations

import numpy as np

from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.cpu import Kernel
from cuda_on_cpu.fake_cupy import FakeCupy
from gpu_bp import registry
from gpu_bp.spec import Activation, FreeLoss, FusedLoss

# Kinds, so that tests can be spread over processes.
KINDS = ("activations", "free losses", "others")


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
            b.hidden_delta(phi, delta, v, y)
    elif kind == "free losses":
        for loss in registry.LOSSES.values():
            for phi in activations if isinstance(loss, FreeLoss) else []:
                b.output_delta(loss, phi, v, probabilities, y, losses, delta)
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
        for record in registry.UPDATES.values():
            state = [b.zeros((6,), dtype) for _ in record.state]
            scalars = record.scalars(1, 0.1, **record.values)
            b.update(record, b.zeros((6,), dtype), b.zeros((6,), dtype), state, 1.0, scalars, 3)
    else:
        raise ValueError(kind)
    return list({kernel.text: kernel for kernel in cupy.device.kernels}.values())
