"""Losses of several outputs a target: quantiles, or a mean and a variance. As in `losses.py`, which lists them.

A network that is trained by one says how far off its prediction may be. The twins copy the outputs y[:, k] of all
targets into arrays without gaps and e[:, k] out of them: with gaps, NumPy's functions make buffers.
"""

import numpy as np

from gpu_bp.kernels.functions import logistic
from gpu_bp.spec import GroupedLoss, Numbers, Parameter, Scratch, Twin

Array = np.ndarray


# quantile: for each level q with r = y - d, (1 - q) r above the target and -q r below it -------------------
# Its mean is least where the share q of the targets lies below y. At level 1/2 it is half the absolute error.


def _quantile(y: Array, d: Array, loss: Array, e: Array, s: Scratch, levels: tuple[float, ...]) -> None:
    loss.fill(0)
    for k, level in enumerate(levels):
        np.copyto(s.a, y[:, k])
        s.a -= d
        np.greater(s.a, 0, out=s.mask)
        np.sign(s.a, out=s.b)
        s.b *= level
        np.copyto(s.b, 1 - level, where=s.mask)
        np.copyto(e[:, k], s.b)
        s.a *= s.b
        loss += s.a


def _quantile_labels(levels: tuple[float, ...]) -> tuple[str, ...]:
    """In percent, with two digits at least: q05, q50, q97.5."""
    return tuple(f"q{100 * level:02.12g}" for level in levels)


def _middle(levels: tuple[float, ...]) -> tuple[int, ...]:
    """The level that is nearest to 1/2; of two that are as near, such as 0.1 and 0.9, both."""
    distance = np.abs(np.subtract(levels, 0.5))
    return tuple(np.flatnonzero(distance <= distance.min() + 1e-12).tolist())


quantile = GroupedLoss(
    name="quantile",
    source="Koenker and Bassett (1978)",
    parameters={"levels": Numbers((0.5,), "(0, 1)", rising=True)},
    targets="real",
    labelled=_quantile_labels,
    best=_middle,
    interval=True,
    error_signals=Twin(
        """
        loss = T(0);
        for (int k = 0; k < groups; ++k) {
            const T r = Y(k) - d;
            const T slope = r > T(0) ? T(1) - levels[k] : (r < T(0) ? -levels[k] : r);  // as in mean_absolute_error
            E(k) = slope;
            loss += slope * r;
        }
        """,
        _quantile,
    ),
    kinks=lambda levels: (0.0,),
)


# gaussian_nll: 1/2 (log var + (d - mean)^2 / var), the negative log likelihood of a normal variable less its
# constant 1/2 log(2 pi). Output 0 is the mean; var = softplus(output 1) + eps, which is never 0.


def _gaussian_nll(y: Array, d: Array, loss: Array, e: Array, s: Scratch, eps: float) -> None:
    np.copyto(s.a, y[:, 1])
    logistic(s.a, s.c, s)
    np.logaddexp(s.a, 0, out=s.a)
    s.a += eps  # the variance, whose derivative by output 1 is s.c
    np.copyto(s.b, y[:, 0])
    s.b -= d
    np.divide(s.b, s.a, out=loss)
    np.copyto(e[:, 0], loss)
    s.b *= loss  # r^2 / var
    np.log(s.a, out=loss)
    loss += s.b
    loss *= 0.5
    np.subtract(1, s.b, out=s.b)
    s.c /= s.a
    s.b *= s.c
    s.b *= 0.5
    np.copyto(e[:, 1], s.b)


def _mean_and_variance(outputs: Array, eps: float) -> Array:
    predicted = outputs.astype(np.float64)
    predicted[:, 1] = np.logaddexp(predicted[:, 1], 0) + eps
    return predicted


gaussian_nll = GroupedLoss(
    name="gaussian_nll",
    source="Nix and Weigend (1994)",
    parameters={"eps": Parameter(1e-6, "(0, inf)")},
    targets="real",
    labelled=lambda eps: ("", "variance"),
    best=lambda eps: (0,),
    powers={"variance": 2},
    predictions=_mean_and_variance,
    error_signals=Twin(
        """
        const T variance = softplus(Y(1)) + eps;
        const T r = Y(0) - d;
        const T z = r / variance;
        loss = T(0.5) * (log(variance) + r * z);
        E(0) = z;
        E(1) = T(0.5) * (logistic(Y(1)) / variance * (T(1) - r * z));
        """,
        _gaussian_nll,
    ),
)
