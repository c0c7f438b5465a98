"""In what numbers a network computes: `train.precision`.

Parameters, gradients, the optimizer's state, losses and sums are in its `dtype`. The factors of the matrix products may
be rounded further, where the device has faster products for it; what is multiplied is then summed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

PrecisionName = Literal["float64", "float32", "tf32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Precision:
    """dtype: of parameters and all that is summed. products: what the factors of products are rounded to, "" for the
    dtype itself. capability: the least compute capability of a CUDA device that has such products."""

    dtype: str
    products: str = ""
    capability: tuple[int, int] = (0, 0)

    @property
    def arithmetic(self) -> str:
        """As `Backend.matmul` takes it."""
        return "tf32" if self.products == "tf32" else ""


PRECISIONS: dict[str, Precision] = {
    "float64": Precision("float64"),
    "float32": Precision("float32"),
    "tf32": Precision("float32", "tf32", (8, 0)),
    "bfloat16": Precision("float32", "bfloat16", (8, 0)),
    "float16": Precision("float32", "float16", (7, 0)),
}


def stored(products: str, dtype: Any) -> np.dtype[Any]:
    """In what the factors of such products are stored; TF32 has no dtype of its own, it is read from float32."""
    if products == "bfloat16":
        import ml_dtypes  # late: who does not ask for it does not need it

        dtype = ml_dtypes.bfloat16
    elif products == "float16":
        dtype = np.float16
    made: np.dtype[Any] = np.dtype(dtype)
    return made


def dotted(capability: tuple[int, int]) -> str:
    """A compute capability as it is written: 8.0."""
    return "{}.{}".format(*capability)
