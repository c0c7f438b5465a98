"""Optimizers that look at the sign of the gradient alone, not at its size."""

import numpy as np

from gpu_bp.kernels.functions import clamp, cuda_sign
from gpu_bp.spec import Numbers, Parameter, Scratch, Twin, Update

Array = np.ndarray

# lion: the sign of a mean of the gradient and its running mean; the weights also shrink by rate * weight_decay


def _lion(
    w: Array, g: Array, mean: Array, s: Scratch, rate: float, beta1: float, rest1: float, beta2: float, rest2: float
) -> None:
    np.multiply(mean, beta1, out=s.b)
    np.multiply(g, rest1, out=s.c)
    s.b += s.c
    np.sign(s.b, out=s.b)
    s.b *= rate
    w -= s.b
    mean *= beta2
    g *= rest2
    mean += g


lion = Update(
    name="lion",
    source="Chen et al. (2023), algorithm 2",
    parameters={
        "betas": Numbers((0.9, 0.99), "[0, 1)", count=2),
        "weight_decay": Parameter(0.0, "[0, inf)"),
    },
    state=("mean",),
    scalar_names=("rate", "beta1", "rest1", "beta2", "rest2"),
    scalars=lambda step, learning_rate, betas: {
        "rate": learning_rate,
        "beta1": betas[0],
        "rest1": 1 - betas[0],
        "beta2": betas[1],
        "rest2": 1 - betas[1],
    },
    update=Twin(
        f"""
        const T direction = beta1 * mean + rest1 * g;
        w -= rate * {cuda_sign("direction")};
        mean = beta2 * mean + rest2 * g;
        """,
        _lion,
    ),
)


# rprop: a step size of its own for each weight, larger while the sign stays and smaller where it turns ------
# The first step sizes are the rate. Where the sign turns, that weight waits a step.


def _rprop(
    w: Array,
    g: Array,
    sign: Array,
    size: Array,
    s: Scratch,
    slower: float,
    faster: float,
    smallest: float,
    largest: float,
    beginning: float,
) -> None:
    size += beginning
    np.sign(g, out=g)
    np.multiply(g, sign, out=s.b)
    np.greater(s.b, 0, out=s.mask)
    np.multiply(size, faster, out=size, where=s.mask)
    np.less(s.b, 0, out=s.mask)
    np.multiply(size, slower, out=size, where=s.mask)
    clamp(size, smallest, largest, out=size)
    np.copyto(g, 0, where=s.mask)
    np.copyto(sign, g)
    g *= size
    w -= g


def _rprop_scalars(
    step: int, learning_rate: float, etas: tuple[float, float], step_sizes: tuple[float, float]
) -> dict[str, float]:
    return {
        "slower": etas[0],
        "faster": etas[1],
        "smallest": step_sizes[0],
        "largest": step_sizes[1],
        "beginning": learning_rate if step == 1 else 0.0,  # the state starts at zero
    }


rprop = Update(
    name="rprop",
    source="Riedmiller and Braun (1993), as iRprop- of Igel and Huesken (2000)",
    parameters={
        "etas": Numbers((0.5, 1.2), ("(0, 1)", "(1, inf)"), count=2),
        "step_sizes": Numbers((1e-6, 50.0), "(0, inf)", count=2, rising=True),
    },
    state=("sign", "size"),
    scalar_names=("slower", "faster", "smallest", "largest", "beginning"),
    scalars=_rprop_scalars,
    update=Twin(
        f"""
        const T now = {cuda_sign("g")};
        const T agreement = now * sign;
        size += beginning;
        size = clamp(size * (agreement > T(0) ? faster : (agreement < T(0) ? slower : T(1))), smallest, largest);
        sign = agreement < T(0) ? T(0) : now;
        w -= sign * size;
        """,
        _rprop,
    ),
    full_batch=True,
)
