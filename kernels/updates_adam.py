"""Optimizers of the family of Adam: running means of the gradient and of its square, corrected for starting at 0."""

import math

import numpy as np

from gpu_bp.spec import Flag, Numbers, Parameter, Scratch, Twin, Update

Array = np.ndarray

BETAS = Numbers((0.9, 0.999), "[0, 1)", count=2)
EPS = Parameter(1e-8, "[1e-30, inf)")  # less may be 0 in float32, and 0 / 0 where there is no gradient


def _mean(g: Array, mean: Array, s: Scratch, rest1: float) -> None:
    np.subtract(g, mean, out=s.b)
    s.b *= rest1
    mean += s.b


def _moments(g: Array, mean: Array, square: Array, s: Scratch, rest1: float, beta2: float, rest2: float) -> None:
    _mean(g, mean, s, rest1)
    np.multiply(g, g, out=s.b)
    s.b *= rest2
    square *= beta2
    square += s.b


_MEAN_CUDA = "mean += rest1 * (g - mean);"
_MOMENTS_CUDA = f"""
{_MEAN_CUDA}
square = beta2 * square + rest2 * (g * g);
"""
_MOMENTS = ("rest1", "beta2", "rest2")


def _moment_scalars(betas: tuple[float, float]) -> dict[str, float]:
    return {"rest1": 1 - betas[0], "beta2": betas[1], "rest2": 1 - betas[1]}


# adam: the step is the mean gradient over the root of its mean square -------------------------------------
# adamw: adam with the weights also shrunk by rate * weight_decay.
# amsgrad: over the root of the largest mean square so far.


def _adam_step(w: Array, root_of: Array, mean: Array, s: Scratch, step_size: float, eps: float) -> None:
    np.sqrt(root_of, out=s.b)
    s.b += eps
    np.divide(mean, s.b, out=s.b)
    s.b *= step_size
    w -= s.b


def _adam(
    w: Array,
    g: Array,
    mean: Array,
    square: Array,
    s: Scratch,
    step_size: float,
    eps: float,
    **rests: float,
) -> None:
    _moments(g, mean, square, s, **rests)
    _adam_step(w, square, mean, s, step_size, eps)


def _amsgrad(
    w: Array,
    g: Array,
    mean: Array,
    square: Array,
    largest: Array,
    s: Scratch,
    step_size: float,
    eps: float,
    **rests: float,
) -> None:
    _moments(g, mean, square, s, **rests)
    np.maximum(largest, square, out=largest)
    _adam_step(w, largest, mean, s, step_size, eps)


def _adam_scalars(
    step: int, learning_rate: float, betas: tuple[float, float], eps: float, amsgrad: bool
) -> dict[str, float]:
    root = math.sqrt(
        1 - betas[1] ** step
    )  # of the mean square's correction: above and below the line, for fewer passes
    return _moment_scalars(betas) | {"step_size": learning_rate * root / (1 - betas[0] ** step), "eps": eps * root}


_ADAM = Twin(_MOMENTS_CUDA + "w -= step_size * (mean / (sqrt(square) + eps));", _adam)
_AMSGRAD = Twin(
    _MOMENTS_CUDA
    + """if (!(square <= largest)) largest = square;
w -= step_size * (mean / (sqrt(largest) + eps));""",
    _amsgrad,
)


def _adam_variant(amsgrad: bool, **_: object) -> tuple[tuple[str, ...], Twin]:
    return (("mean", "square", "largest"), _AMSGRAD) if amsgrad else (("mean", "square"), _ADAM)


_ADAM_PARAMETERS: dict[str, Parameter | Flag | Numbers] = {"betas": BETAS, "eps": EPS, "amsgrad": Flag()}
_ADAM_SCALARS = (*_MOMENTS, "step_size", "eps")

adam = Update(
    name="adam",
    source="Kingma and Ba (2015), algorithm 1; amsgrad: Reddi et al. (2018), algorithm 2",
    parameters=_ADAM_PARAMETERS,
    scalar_names=_ADAM_SCALARS,
    scalars=_adam_scalars,
    update=_ADAM,
    variant=_adam_variant,
)

adamw = Update(
    name="adamw",
    source="Loshchilov and Hutter (2019), algorithm 2",
    parameters={**_ADAM_PARAMETERS, "weight_decay": Parameter(0.01, "[0, inf)")},
    scalar_names=_ADAM_SCALARS,
    scalars=_adam_scalars,
    update=_ADAM,
    variant=_adam_variant,
)


# adamax: the mean gradient over the largest gradient, which fades ------------------------------------------


def _adamax(
    w: Array, g: Array, mean: Array, norm: Array, s: Scratch, rest1: float, beta2: float, step_size: float, eps: float
) -> None:
    _mean(g, mean, s, rest1)
    np.absolute(g, out=g)
    g += eps
    norm *= beta2
    np.maximum(norm, g, out=norm)
    np.divide(mean, norm, out=g)
    g *= step_size
    w -= g


adamax = Update(
    name="adamax",
    source="Kingma and Ba (2015), algorithm 2",
    parameters={"betas": BETAS, "eps": EPS},
    state=("mean", "norm"),
    scalar_names=("rest1", "beta2", "step_size", "eps"),
    scalars=lambda step, learning_rate, betas, eps: {
        "rest1": 1 - betas[0],
        "beta2": betas[1],
        "step_size": learning_rate / (1 - betas[0] ** step),
        "eps": eps,
    },
    update=Twin(
        f"""
        {_MEAN_CUDA}
        const T size = fabs(g) + eps;
        norm *= beta2;
        norm = norm >= size || norm != norm ? norm : size;  // a NaN stays one
        w -= step_size * (mean / norm);
        """,
        _adamax,
    ),
)


# nadam: adam that takes the mean gradient of the next step, with a momentum that grows ---------------------


def _nadam(
    w: Array,
    g: Array,
    mean: Array,
    square: Array,
    s: Scratch,
    own: float,
    ahead: float,
    root: float,
    eps: float,
    **rests: float,
) -> None:
    _moments(g, mean, square, s, **rests)
    g *= own
    np.multiply(mean, ahead, out=s.b)
    g += s.b
    np.sqrt(square, out=s.b)
    s.b *= root
    s.b += eps
    g /= s.b
    w -= g


def _nadam_momentum(step: int, beta1: float, momentum_decay: float) -> float:
    return float(beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay)))


# The last step that was asked for, and its product: replaced whole, so that threads cannot spoil it for each other.
_PRODUCTS: dict[tuple[float, float], tuple[int, float]] = {}


def _nadam_product(step: int, beta1: float, momentum_decay: float) -> float:
    """The product of the momenta of steps 1 to `step`: after the step before one factor more, else all of them."""
    last, product = _PRODUCTS.get((beta1, momentum_decay), (0, 1.0))
    if last > step:
        last, product = 0, 1.0
    for k in range(last + 1, step + 1):
        if product <= 2**-60:  # 1 - product is 1 from here on
            break
        product *= _nadam_momentum(k, beta1, momentum_decay)
    _PRODUCTS[beta1, momentum_decay] = step, product
    return product


def _nadam_scalars(
    step: int, learning_rate: float, betas: tuple[float, float], eps: float, momentum_decay: float
) -> dict[str, float]:
    now, after = (_nadam_momentum(k, betas[0], momentum_decay) for k in (step, step + 1))
    product = _nadam_product(step, betas[0], momentum_decay)
    return _moment_scalars(betas) | {
        "own": learning_rate * (1 - now) / (1 - product),
        "ahead": learning_rate * after / (1 - product * after),
        "root": 1 / math.sqrt(1 - betas[1] ** step),
        "eps": eps,
    }


nadam = Update(
    name="nadam",
    source="Dozat (2016), algorithm 2, with the momenta of PyTorch",
    parameters={"betas": BETAS, "eps": EPS, "momentum_decay": Parameter(4e-3, "[0, inf)")},
    state=("mean", "square"),
    scalar_names=(*_MOMENTS, "own", "ahead", "root", "eps"),
    scalars=_nadam_scalars,
    update=Twin(_MOMENTS_CUDA + "w -= (own * g + ahead * mean) / (sqrt(square) * root + eps);", _nadam),
)


# radam: adam whose step is as small as the variance of the mean square asks for; at first momentum alone ---


def _radam(
    w: Array,
    g: Array,
    mean: Array,
    square: Array,
    s: Scratch,
    adaptive: float,
    plain: float,
    eps: float,
    **rests: float,
) -> None:
    _moments(g, mean, square, s, **rests)
    np.sqrt(square, out=g)
    g += eps
    np.divide(adaptive, g, out=g)
    g += plain
    g *= mean
    w -= g


def _radam_scalars(step: int, learning_rate: float, betas: tuple[float, float], eps: float) -> dict[str, float]:
    beta1, beta2 = betas
    step_size, rest = learning_rate / (1 - beta1**step), 1 - beta2**step
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * step * beta2**step / rest  # of the average that the mean square amounts to
    scalars = _moment_scalars(betas) | {"adaptive": 0.0, "plain": step_size, "eps": eps}
    if length > 5:
        rectified = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
        scalars |= {"adaptive": step_size * math.sqrt(rest * rectified), "plain": 0.0}
    return scalars


radam = Update(
    name="radam",
    source="Liu et al. (2020), algorithm 2; momentum alone up to a length of 5, as PyTorch",
    parameters={"betas": BETAS, "eps": EPS},
    state=("mean", "square"),
    scalar_names=(*_MOMENTS, "adaptive", "plain", "eps"),
    scalars=_radam_scalars,
    update=Twin(_MOMENTS_CUDA + "w -= mean * (adaptive / (sqrt(square) + eps) + plain);", _radam),
)
