"""Which epilogue of cublasLt can take a layer's bias and activation, and where one was measured to be faster.

Without a row in FASTER nothing is done in one: what decides is measured once, and committed, and never at run time. The
rows are what `python -m benchmarks.epilogues` prints on a device. None was measured yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gpu_bp import registry
from gpu_bp.spec import Activation, Array, RowActivation


class Faster(NamedTuple):
    """On such devices an epilogue is faster than a product and kernels, from so many rows and units on.

    Attributes:
        epilogue: of `cublaslt.EPILOGUES`.
        product: dtypes of factors and product, and the arithmetic: a row of `cublas.PRODUCTS`.
        capability: the compute capability of the device, such as "90".
        least_rows: samples. least_width: units of the layer, and its inputs.
        measured: device, libraries and date.
    """

    epilogue: str
    product: tuple[str, str, str]
    capability: str
    least_rows: int
    least_width: int
    measured: str

    def holds_for(
        self, epilogue: str, product: tuple[str, str, str], capability: str, rows: int, widths: tuple[int, int]
    ) -> bool:
        return (
            self[:3] == (epilogue, product, capability) and rows >= self.least_rows and min(widths) >= self.least_width
        )


FASTER: tuple[Faster, ...] = ()


def faster(
    table: Iterable[Faster],
    epilogue: str,
    product: tuple[str, str, str],
    capability: str,
    rows: int,
    widths: tuple[int, int],
) -> bool:
    """Whether a table says so of a product of so many rows between layers of these widths."""
    return any(row.holds_for(epilogue, product, capability, rows, widths) for row in table)


# By the formula rather than by the name, which a record of somebody's own may have too.
_OF_FORMULA = {
    registry.activation(name).value.cuda: epilogue
    for name, epilogue in (("identity", "bias"), ("relu", "relu_bias"), ("gelu_tanh", "gelu_bias"))
}


def of_layer(activation: Activation | RowActivation | None, net_input: Array, output: Array) -> str:
    """The epilogue that gives what `Backend.dense` must leave: net input and output, which may be one array; or "".

    cublasLt's gelu is the one with tanh, and leaves its net input; the others leave one array.
    """
    epilogue = "bias" if activation is None else _OF_FORMULA.get(activation.value.cuda, "")
    one = activation is None or output is net_input
    return epilogue if one == (epilogue != "gelu_bias") else ""
