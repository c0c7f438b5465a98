"""Optimizers: how the parameters w change, given their mean gradient g. CUDA text beside its NumPy twin.

Each step's scalars are computed in float64 on the host. Here are the delta rules; the other families stand in modules
of their own. To add one: write its record; the table at the end is what the rest of the package reads.
"""

import numpy as np

from gpu_bp.kernels.updates_adam import adam, adamax, adamw, nadam, radam
from gpu_bp.kernels.updates_scaled import adadelta, adagrad, rmsprop
from gpu_bp.kernels.updates_sign import lion, rprop
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


UPDATES = (
    sgd,
    momentum,
    nesterov,
    adagrad,
    adadelta,
    rmsprop,
    adam,
    adamw,
    adamax,
    nadam,
    radam,
    lion,
    rprop,
)
ALIASES: dict[str, str] = {}
