"""Optimizers: how the parameters w change, given their mean gradient g. CUDA text beside its NumPy twin.

Each step's scalars are computed in float64 on the host. To add one: write its record here; the table at the
end is what the rest of the package reads.
"""

import math

import numpy as np

from gpu_bp.spec import Parameter, Scratch, Twin, Update

Array = np.ndarray
HAYKIN = "Haykin, Neural Networks and Learning Machines, 3rd ed."


# sgd: the delta rule, w -= rate g -------------------------------------------------------------------------


def _sgd(w: Array, g: Array, s: Scratch, rate: float) -> None:
    g *= rate
    w -= g


sgd = Update(
    name="sgd",
    source=HAYKIN + ", chapter 4: the delta rule",
    scalar_names=("rate",),
    scalars=lambda step, learning_rate: {"rate": learning_rate},
    update=Twin("w -= rate * g;", _sgd),
)


# momentum: the generalized delta rule, change = momentum change - rate g; w += change ---------------------
# The rate stands inside, so a changed rate acts on new gradients only.


def _momentum(w: Array, g: Array, change: Array, s: Scratch, rate: float, momentum: float) -> None:
    g *= rate
    change *= momentum
    change -= g
    w += change


momentum = Update(
    name="momentum",
    source=HAYKIN + ", chapter 4: the generalized delta rule",
    parameters={"momentum": Parameter(0.9, "[0, 1)")},
    state=("change",),
    scalar_names=("rate", "momentum"),
    scalars=lambda step, learning_rate, momentum: {"rate": learning_rate, "momentum": momentum},
    update=Twin("change = momentum * change - rate * g; w += change;", _momentum),
)


# nesterov: momentum with the gradient at the point ahead, in the form of Sutskever et al. -----------------


def _nesterov(w: Array, g: Array, change: Array, s: Scratch, rate: float, momentum: float) -> None:
    g *= rate
    change *= momentum
    change -= g
    w -= g
    np.multiply(change, momentum, out=s.b)
    w += s.b


nesterov = Update(
    name="nesterov",
    source="Nesterov (1983); Sutskever et al. (2013), after the change of variables of Bengio et al. (2012)",
    parameters={"momentum": Parameter(0.9, "[0, 1)")},
    state=("change",),
    scalar_names=("rate", "momentum"),
    scalars=momentum.scalars,
    update=Twin("change = momentum * change - rate * g; w += momentum * change - rate * g;", _nesterov),
)


# adam: the step is the mean gradient over the root of its mean square, both corrected for starting at 0 ---
# adamw: adam with the weights also shrunk by rate * weight_decay.


def _adam(
    w: Array,
    g: Array,
    mean: Array,
    square: Array,
    s: Scratch,
    step_size: float,
    rest1: float,
    beta2: float,
    rest2: float,
    root: float,
    epsilon: float,
) -> None:
    np.subtract(g, mean, out=s.b)
    s.b *= rest1
    mean += s.b
    g *= g
    g *= rest2
    square *= beta2
    square += g
    np.sqrt(square, out=g)
    g *= root
    g += epsilon
    np.divide(mean, g, out=g)
    g *= step_size
    w -= g


def _adam_scalars(step: int, learning_rate: float, beta1: float, beta2: float, epsilon: float) -> dict[str, float]:
    return {
        "step_size": learning_rate / (1 - beta1**step),
        "rest1": 1 - beta1,
        "beta2": beta2,
        "rest2": 1 - beta2,
        "root": 1 / math.sqrt(1 - beta2**step),
        "epsilon": epsilon,
    }


_ADAM_CUDA = """
mean += rest1 * (g - mean);
square = beta2 * square + rest2 * (g * g);
w -= step_size * (mean / (sqrt(square) * root + epsilon));
"""
_ADAM_SCALARS = ("step_size", "rest1", "beta2", "rest2", "root", "epsilon")
_ADAM_PARAMETERS = {
    "beta1": Parameter(0.9, "[0, 1)"),
    "beta2": Parameter(0.999, "[0, 1)"),
    "epsilon": Parameter(1e-8, "[1e-30, inf)"),  # less may be 0 in float32, and 0 / 0 where there is no gradient
}

adam = Update(
    name="adam",
    source="Kingma and Ba (2015), algorithm 1",
    parameters=_ADAM_PARAMETERS,
    state=("mean", "square"),
    scalar_names=_ADAM_SCALARS,
    scalars=_adam_scalars,
    update=Twin(_ADAM_CUDA, _adam),
)

adamw = Update(
    name="adamw",
    source="Loshchilov and Hutter (2019), algorithm 2",
    parameters={**_ADAM_PARAMETERS, "weight_decay": Parameter(0.01, "[0, inf)")},
    state=("mean", "square"),
    scalar_names=_ADAM_SCALARS,
    scalars=_adam_scalars,
    update=adam.update,
)


UPDATES = (sgd, momentum, nesterov, adam, adamw)
ALIASES: dict[str, str] = {}
