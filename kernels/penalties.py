"""What is done to the mean gradient g, or to the parameters w, before an update rule: CUDA text beside its NumPy twin.

They run in the kernel of the update, in the order of the table: first the gradient of the loss is clipped, then the
gradients of the penalties are added to it, as in PyTorch, and last the weights decay on their own.
"""

import numpy as np

from gpu_bp.kernels.functions import clamp, cuda_sign
from gpu_bp.spec import Penalty, Scratch, Twin

Array = np.ndarray


# clip_value: every element of g is held between -clip_value and clip_value ----------------------------------


def _clip_value(w: Array, g: Array, s: Scratch, clip_value: float) -> None:
    clamp(g, -clip_value, clip_value, out=g)


clip_value = Penalty(
    name="clip_value",
    source="Mikolov (2012), section 3.2.2",
    apply=Twin("g = clamp(g, -clip_value, clip_value);", _clip_value),
    weights_only=False,
)


# l2: the gradient of 1/2 l2 |w|^2 ---------------------------------------------------------------------------


def _l2(w: Array, g: Array, s: Scratch, l2: float) -> None:
    np.multiply(w, l2, out=s.b)
    g += s.b


l2 = Penalty(
    name="l2",
    source="Krogh and Hertz (1992)",
    apply=Twin("g += l2 * w;", _l2),
    weights_only=True,
)


# l1: the gradient of l1 |w|, 0 where w is 0 -----------------------------------------------------------------


def _l1(w: Array, g: Array, s: Scratch, l1: float) -> None:
    np.sign(w, out=s.b)
    s.b *= l1
    g += s.b


l1 = Penalty(
    name="l1",
    source="Tibshirani (1996)",
    apply=Twin(f"g += l1 * {cuda_sign('w')};", _l1),
    weights_only=True,
)


# weight_decay: w shrinks on its own, whatever the gradient; the number is learning_rate * weight_decay -------


def _weight_decay(w: Array, g: Array, s: Scratch, weight_decay: float) -> None:
    np.multiply(w, weight_decay, out=s.b)
    w -= s.b


weight_decay = Penalty(
    name="weight_decay",
    source="Loshchilov and Hutter (2019), equation 1",
    apply=Twin("w -= weight_decay * w;", _weight_decay),
    weights_only=True,
)


PENALTIES = (clip_value, l2, l1, weight_decay)
