"""Optimizers that divide the gradient by the root of its squares: their sum, or their running mean."""

from typing import Any

import numpy as np

from gpu_bp.spec import Flag, Parameter, Scratch, Twin, Update

Array = np.ndarray

# adagrad: over the root of the sum of all squares so far ---------------------------------------------------


def _adagrad(w: Array, g: Array, total: Array, s: Scratch, rate: float, eps: float, beginning: float) -> None:
    np.multiply(g, g, out=s.b)
    s.b += beginning
    total += s.b
    np.sqrt(total, out=s.b)
    s.b += eps
    g /= s.b
    g *= rate
    w -= g


def _adagrad_scalars(
    step: int, learning_rate: float, lr_decay: float, initial_accumulator_value: float, eps: float
) -> dict[str, float]:
    return {
        "rate": learning_rate / (1 + (step - 1) * lr_decay),
        "eps": eps,
        "beginning": initial_accumulator_value if step == 1 else 0.0,  # the state starts at zero
    }


adagrad = Update(
    name="adagrad",
    source="Duchi, Hazan and Singer (2011), figure 1",
    parameters={
        "lr_decay": Parameter(0.0, "[0, inf)"),
        "initial_accumulator_value": Parameter(0.0, "[0, inf)"),
        "eps": Parameter(1e-10, "[1e-30, inf)"),
    },
    state=("total",),
    scalar_names=("rate", "eps", "beginning"),
    scalars=_adagrad_scalars,
    update=Twin("total += g * g + beginning; w -= rate * (g / (sqrt(total) + eps));", _adagrad),
)


# adadelta: times the root of the running mean of the squares of its own changes ----------------------------


def _adadelta(
    w: Array, g: Array, square: Array, changes: Array, s: Scratch, rate: float, rho: float, rest: float, eps: float
) -> None:
    np.multiply(g, g, out=s.b)
    s.b *= rest
    square *= rho
    square += s.b
    np.add(square, eps, out=s.b)
    np.sqrt(s.b, out=s.b)
    np.add(changes, eps, out=s.c)
    np.sqrt(s.c, out=s.c)
    s.c /= s.b
    g *= s.c
    np.multiply(g, g, out=s.b)
    s.b *= rest
    changes *= rho
    changes += s.b
    g *= rate
    w -= g


adadelta = Update(
    name="adadelta",
    source="Zeiler (2012), algorithm 1",
    parameters={"rho": Parameter(0.9, "[0, 1)"), "eps": Parameter(1e-6, "[1e-30, inf)")},
    state=("square", "changes"),
    scalar_names=("rate", "rho", "rest", "eps"),
    scalars=lambda step, learning_rate, rho, eps: {"rate": learning_rate, "rho": rho, "rest": 1 - rho, "eps": eps},
    update=Twin(
        """
        square = rho * square + rest * (g * g);
        const T change = g * (sqrt(changes + eps) / sqrt(square + eps));
        changes = rho * changes + rest * (change * change);
        w -= rate * change;
        """,
        _adadelta,
    ),
)


# rmsprop: over the root of the running mean of the squares -------------------------------------------------
# centered: less the square of the running mean. With momentum, the quotient goes into a sum that fades.


def _rmsprop(centered: bool, momentum: float, **_: object) -> tuple[tuple[str, ...], Twin]:
    """The state and the formula with or without the two options."""

    def update(w: Array, g: Array, square: Array, *others_and_scratch: Any, **scalars: float) -> None:
        *others, s = others_and_scratch
        _rmsprop_step(w, g, square, others[0] if centered else None, others[-1] if momentum else None, s, **scalars)

    spread = "square"
    text = "square = alpha * square + rest * (g * g);"
    if centered:
        text += " mean += rest * (g - mean); const T variance = square - mean * mean;"
        spread = "(variance < T(0) ? T(0) : variance)"  # rounding may take it below
    quotient = f"g / (sqrt({spread}) + eps)"
    text += (
        f" change = momentum * change + {quotient}; w -= rate * change;" if momentum else f" w -= rate * ({quotient});"
    )
    state = ("square", *(["mean"] if centered else []), *(["change"] if momentum else []))
    return state, Twin(text, update)


def _rmsprop_step(
    w: Array,
    g: Array,
    square: Array,
    mean: Array | None,
    change: Array | None,
    s: Scratch,
    rate: float,
    alpha: float,
    rest: float,
    eps: float,
    momentum: float,
) -> None:
    np.multiply(g, g, out=s.b)
    s.b *= rest
    square *= alpha
    square += s.b
    if mean is None:
        np.sqrt(square, out=s.b)
    else:
        np.subtract(g, mean, out=s.b)
        s.b *= rest
        mean += s.b
        np.multiply(mean, mean, out=s.b)
        np.subtract(square, s.b, out=s.b)
        np.maximum(s.b, 0, out=s.b)
        np.sqrt(s.b, out=s.b)
    s.b += eps
    g /= s.b
    if change is not None:
        change *= momentum
        change += g
        np.copyto(g, change)
    g *= rate
    w -= g


rmsprop = Update(
    name="rmsprop",
    source="Tieleman and Hinton (2012), lecture 6.5; centered: Graves (2013), equations 38 to 40",
    parameters={
        "alpha": Parameter(0.99, "[0, 1)"),
        "eps": Parameter(1e-8, "[1e-30, inf)"),
        "momentum": Parameter(0.0, "[0, 1)"),
        "centered": Flag(),
    },
    scalar_names=("rate", "alpha", "rest", "eps", "momentum"),
    scalars=lambda step, learning_rate, alpha, eps, momentum, centered: {
        "rate": learning_rate,
        "alpha": alpha,
        "rest": 1 - alpha,
        "eps": eps,
        "momentum": momentum,
    },
    update=_rmsprop(centered=False, momentum=0.0)[1],
    variant=_rmsprop,
)
