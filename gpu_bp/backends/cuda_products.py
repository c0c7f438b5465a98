"""The products of the CuPy backend: by NVIDIA's bindings where these can be used, by CuPy elsewhere.

A bias, an activation or a bias's gradient is done in one with its product where the table of measurements says that it
is faster (`epilogues.py`), and cublasLt has such a product (`cublaslt.py`).
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Sequence

import numpy as np

from gpu_bp.backends.base import or_unknown
from gpu_bp.backends.cublas import UNASKED, WORKSPACE, Gemm, bindings, version
from gpu_bp.backends.cublaslt import Lt
from gpu_bp.backends.cublaslt import bindings as lt_bindings
from gpu_bp.backends.cuda_launch import cublas, cupy
from gpu_bp.backends.epilogues import Faster, faster, of_layer
from gpu_bp.spec import Activation, Array, RowActivation

log = logging.getLogger("gpu_bp")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _current_stream() -> int:
    address: int = cupy.cuda.get_current_stream().ptr
    return address


class Products:
    """Matrix products on the current stream.

    Args:
        why_not: why the bindings are not to be used; "" where they are.
        table: where an epilogue is faster. capability: of the device, such as "90".

    Attributes:
        why_not: why the bindings are not used, once `gemm` was looked at.
    """

    def __init__(self, why_not: str, table: Sequence[Faster], capability: str) -> None:
        self.why_not = why_not
        self._capability = capability
        self._table = [row for row in table if row.capability == capability]

    @functools.cached_property
    def gemm(self) -> Gemm | None:
        """cuBLAS through NVIDIA's bindings; None where they cannot be used."""
        if self.why_not:
            return None
        try:
            return Gemm(cupy.empty(WORKSPACE, np.uint8), _current_stream, bindings())
        except ModuleNotFoundError:
            self.why_not = "nvmath-python is not installed (pip install 'gpu_bp[cuda13]', or cuda12)"
        except Exception as error:
            self.why_not = f"nvmath-python cannot be used: {first_line(error)}"
        return None

    @functools.cached_property
    def lt(self) -> Lt | None:
        """cublasLt likewise; None too where no epilogue is faster on this device."""
        if not self._table or self.gemm is None:
            return None
        try:
            return Lt(cupy.empty(WORKSPACE, np.uint8), _current_stream, lt_bindings())
        except Exception as error:
            log.warning(f"epilogues of cublasLt are not used, which would be faster: {first_line(error)}")
        return None

    def by(self) -> str:
        """What computes them, for `Backend.libraries`."""
        if self.gemm is None:
            return "cupy"
        table = f", epilogues {zlib.crc32(repr(self._table).encode()):08x}" if self._table else ""
        return f"{or_unknown(version)}{table}"

    def __call__(
        self, a: Array, b: Array, out: Array, *, transpose_a: bool = False, transpose_b: bool = False, arithmetic: str
    ) -> None:
        """out = a @ b, as `Backend.matmul`."""
        if self.gemm is not None:
            self.gemm(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b, arithmetic=arithmetic)
            return
        # gemm rather than cupy.matmul, which allocates for products of 1 x 1
        cublas().gemm("T" if transpose_a else "N", "T" if transpose_b else "N", a, b, out=out)

    def dense(
        self,
        activation: Activation | RowActivation | None,
        inputs: Array,
        weights: Array,
        biases: Array | None,
        net_input: Array,
        output: Array,
        arithmetic: str,
    ) -> bool:
        """`Backend.dense` in one; whether it was done, or else nothing."""
        if self.lt is None or biases is None:
            return False
        epilogue = of_layer(activation, net_input, output)
        out, aux = (output, net_input) if epilogue == "gelu_bias" else (net_input, None)
        if not self._faster(epilogue, inputs, weights, out, arithmetic):
            return False
        return self.lt(epilogue, inputs, weights, out, biases, aux, transpose_b=True, arithmetic=arithmetic)

    def dense_gradients(
        self, delta: Array, inputs: Array, weights: Array, biases: Array | None, arithmetic: str
    ) -> bool:
        """`Backend.dense_gradients` in one; whether it was done, or else nothing."""
        if self.lt is None or biases is None:
            return False
        epilogue = "bias_gradient"
        if not self._faster(epilogue, delta, weights, weights, arithmetic):
            return False
        return self.lt(epilogue, delta, inputs, weights, biases, transpose_a=True, arithmetic=arithmetic)

    def _faster(self, epilogue: str, signals: Array, weights: Array, out: Array, arithmetic: str) -> bool:
        """Whether the table says so of the signals' rows and the widths of the layer with these weights."""
        dtypes = str(signals.dtype), str(out.dtype)
        product = (*dtypes, arithmetic or UNASKED.get(dtypes, ""))
        return faster(self._table, epilogue, product, self._capability, len(signals), weights.shape)
