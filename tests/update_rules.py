"""The update rules as the papers have them, on floats or arrays; and every record with each of its options on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_bp import registry
from gpu_bp.backends.base import Numbers
from gpu_bp.spec import Flag, Parameter, Penalty, Update


def variants() -> dict[str, Update]:
    """Every record, and those whose options change what is kept with each of these on and off."""
    result = {}
    for name, record in registry.UPDATES.items():
        options: list[list[tuple[str, Any]]] = []
        for key, parameter in record.parameters.items() if record.variant else ():
            if isinstance(parameter, Flag):
                options.append([(key, False), (key, True)])
            elif isinstance(parameter, Parameter) and parameter.default == 0:
                options.append([(key, 0.0), (key, 0.8)])
        for chosen in itertools.product(*options):
            label = " ".join([name, *(key for key, value in chosen if value)])
            result[label] = record.with_parameters(**dict(chosen))
    return result


VARIANTS = variants()


def _sgd(w: Any, g: Any, step: int, rate: float, p: Any) -> tuple[Any, ...]:
    return (w - rate * g,)


def _momentum(w: Any, g: Any, change: Any, step: int, rate: float, p: Any) -> tuple[Any, ...]:
    change = p["momentum"] * change - rate * g  # Haykin, eq. 4.41
    return w + change, change


def _nesterov(w: Any, g: Any, change: Any, step: int, rate: float, p: Any) -> tuple[Any, ...]:
    theta = w - p["momentum"] * change  # w is the point ahead (Sutskever et al., 2013)
    change = p["momentum"] * change - rate * g
    return theta + change + p["momentum"] * change, change


def _adagrad(w: Any, g: Any, total: Any, step: int, rate: float, p: Any) -> tuple[Any, ...]:
    total = total + g**2 + (p["initial_accumulator_value"] if step == 1 else 0)
    return w - rate / (1 + (step - 1) * p["lr_decay"]) * g / (np.sqrt(total) + p["eps"]), total


def _adadelta(w: Any, g: Any, square: Any, changes: Any, step: int, rate: float, p: Any) -> tuple[Any, ...]:
    square = p["rho"] * square + (1 - p["rho"]) * g**2
    change = np.sqrt(changes + p["eps"]) / np.sqrt(square + p["eps"]) * g
    return w - rate * change, square, p["rho"] * changes + (1 - p["rho"]) * change**2


def _rmsprop(w: Any, g: Any, square: Any, *rest: Any) -> tuple[Any, ...]:
    *others, _, rate, p = rest
    square = p["alpha"] * square + (1 - p["alpha"]) * g**2
    spread, state = square, [square]
    if p["centered"]:
        state.append(p["alpha"] * others[0] + (1 - p["alpha"]) * g)
        spread = np.maximum(square - state[-1] ** 2, 0)
    change = g / (np.sqrt(spread) + p["eps"])
    if p["momentum"]:
        change = p["momentum"] * others[-1] + change
        state.append(change)
    return w - rate * change, *state


def _moments(g: Any, mean: Any, square: Any, p: Any) -> tuple[Any, Any]:
    beta1, beta2 = p["betas"]
    return beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g**2


def _adam(w: Any, g: Any, mean: Any, square: Any, *rest: Any) -> tuple[Any, ...]:
    *largest, step, rate, p = rest
    (beta1, beta2), w = p["betas"], w - rate * p.get("decay", 0.0) * w
    mean, square = _moments(g, mean, square, p)
    largest = [np.maximum(largest[0], square)] if p["amsgrad"] else []
    mean_hat, square_hat = mean / (1 - beta1**step), (largest or [square])[0] / (1 - beta2**step)
    return w - rate * mean_hat / (np.sqrt(square_hat) + p["eps"]), mean, square, *largest


def _adamax(w: Any, g: Any, mean: Any, norm: Any, step: int, rate: float, p: Any) -> tuple[Any, ...]:
    beta1, beta2 = p["betas"]
    mean, norm = beta1 * mean + (1 - beta1) * g, np.maximum(beta2 * norm, np.abs(g) + p["eps"])
    return w - rate / (1 - beta1**step) * mean / norm, mean, norm


def _nadam(w: Any, g: Any, mean: Any, square: Any, step: int, rate: float, p: Any) -> tuple[Any, ...]:
    beta1, beta2 = p["betas"]
    momenta = [beta1 * (1 - 0.5 * 0.96 ** (k * p["momentum_decay"])) for k in range(1, step + 2)]
    mean, square = _moments(g, mean, square, p)
    mean_hat = momenta[-1] * mean / (1 - np.prod(momenta)) + (1 - momenta[-2]) * g / (1 - np.prod(momenta[:-1]))
    return w - rate * mean_hat / (np.sqrt(square / (1 - beta2**step)) + p["eps"]), mean, square


def _radam(w: Any, g: Any, mean: Any, square: Any, step: int, rate: float, p: Any) -> tuple[Any, ...]:
    beta1, beta2 = p["betas"]
    mean, square = _moments(g, mean, square, p)
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * step * beta2**step / (1 - beta2**step)
    change = mean / (1 - beta1**step)
    if rho > 5:
        r = np.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
        change = change * r * np.sqrt(1 - beta2**step) / (np.sqrt(square) + p["eps"])
    return w - rate * change, mean, square


def _lion(w: Any, g: Any, mean: Any, step: int, rate: float, p: Any) -> tuple[Any, ...]:
    beta1, beta2 = p["betas"]
    direction = np.sign(beta1 * mean + (1 - beta1) * g)
    return w - rate * (direction + p.get("decay", 0.0) * w), beta2 * mean + (1 - beta2) * g


def _rprop(w: Any, g: Any, sign: Any, size: Any, step: int, rate: float, p: Any) -> tuple[Any, ...]:
    turned, stayed = np.sign(g) * sign < 0, np.sign(g) * sign > 0
    size = (size + (rate if step == 1 else 0)) * np.where(turned, p["etas"][0], np.where(stayed, p["etas"][1], 1))
    size, sign = np.clip(size, *p["step_sizes"]), np.where(turned, 0, np.sign(g))
    return w - sign * size, sign, size


# Parameters that are not the defaults, for the records that have any.
PARAMETERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.8},
    "nesterov": {"momentum": 0.8},
    "adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-6},
    "adadelta": {"rho": 0.8, "eps": 1e-4},
    "rmsprop": {"alpha": 0.8, "eps": 1e-3},
    "adam": {"betas": (0.85, 0.97), "eps": 1e-6},
    "adamw": {"betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.1},
    "adamax": {"betas": (0.85, 0.97), "eps": 1e-6},
    "nadam": {"betas": (0.85, 0.97), "eps": 1e-6, "momentum_decay": 0.5},
    "radam": {"betas": (0.85, 0.97), "eps": 1e-6},
    "lion": {"betas": (0.85, 0.97), "weight_decay": 0.1},
    "rprop": {"etas": (0.4, 1.3), "step_sizes": (0.02, 0.2)},
}

# (w, g, *state, step, rate, parameters) -> new (w, *state); `decay` of the parameters is weight_decay where it acts
RULES: dict[str, Any] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "nesterov": _nesterov,
    "adagrad": _adagrad,
    "adadelta": _adadelta,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adam,
    "adamax": _adamax,
    "nadam": _nadam,
    "radam": _radam,
    "lion": _lion,
    "rprop": _rprop,
}


def numbers(
    backend: Any,
    record: Update,
    penalties: Sequence[Penalty],
    scale: float,
    scalars: dict[str, float],
    dtype: Any = "f",
) -> Numbers:
    """What `Backend.update` reads: the scale, and of the scalars by name those of the penalties and the rule."""
    names = [*(penalty.name for penalty in penalties), *record.scalar_names]
    made: Numbers = backend.numbers(1 + len(names), dtype)
    made.set((scale, *(scalars[name] for name in names)))
    return made
