"""Products by cuBLAS through NVIDIA's own bindings, which a CUDA graph can hold. Only cublaslt.py imports nvmath too.

CuPy refuses to have its products captured (its issue 6290), and allocates for some of them. Here the handle and the
workspace are our own, so that nothing is allocated while a product is asked for, and nothing waits.

    gemm = Gemm(workspace, current_stream)                     # workspace: WORKSPACE bytes on the device
    gemm(delta, y, gradient, transpose_a=True, add=True)       # gradient += delta.T @ y
    gemm(x, w, v, transpose_b=True, arithmetic="tf32")         # a row of PRODUCTS: what is not one is refused

Arrays are C-contiguous, by rows; cuBLAS has them by columns, and so computes out.T = op(b).T @ op(a).T.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

from gpu_bp.spec import Array

# What NVIDIA recommends for Hopper; others take less of it. See cublasSetWorkspace.
WORKSPACE = 32 * 2**20

# CUDA's numbers of its types (cudaDataType).
TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}


class Arithmetic(NamedTuple):
    """In what cuBLAS multiplies and sums: its number (cublasComputeType_t), and the C type of alpha and beta."""

    number: int
    scalar: Any


# float32 is float32: cuBLAS takes TF32 only where it is asked for.
ARITHMETIC = {
    "float32": Arithmetic(68, ctypes.c_float),  # CUBLAS_COMPUTE_32F
    "tf32": Arithmetic(77, ctypes.c_float),  # CUBLAS_COMPUTE_32F_FAST_TF32
    "float64": Arithmetic(70, ctypes.c_double),  # CUBLAS_COMPUTE_64F
}

# dtype of the factors, of the product, and the arithmetic: of a pair of dtypes the first is taken unasked.
PRODUCTS = (
    ("float32", "float32", "float32"),
    ("float32", "float32", "tf32"),
    ("float64", "float64", "float64"),
    ("float16", "float16", "float32"),
    ("float16", "float32", "float32"),
    ("bfloat16", "bfloat16", "float32"),
    ("bfloat16", "float32", "float32"),
)
UNASKED = {(factors, product): arithmetic for factors, product, arithmetic in reversed(PRODUCTS)}

ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT: by cuBLAS's own rule, which depends on the shapes and not on time
HOST = 0  # CUBLAS_POINTER_MODE_HOST: alpha and beta are read when a product is asked for; a graph has them as they are
# CUBLAS_DEFAULT_MATH, and what is summed in parts stays in the arithmetic's type until the end.
MATH = 0 | 16


def bindings() -> Any:
    """The module nvmath.bindings.cublas. Late: to import it takes a second.

    Raises:
        ImportError: it is not installed.
    """
    from nvmath.bindings import cublas

    return cublas


def version() -> str:
    """Of the bindings, for `Backend.libraries`."""
    return f"nvmath-python {metadata.version('nvmath-python')}"


class Sizes(NamedTuple):
    """Of a product: its rows and columns, what is summed over, and the arithmetic (of ARITHMETIC)."""

    rows: int
    inner: int
    columns: int
    arithmetic: str


def sizes(a: Array, b: Array, out: Array, transpose_a: bool, transpose_b: bool, arithmetic: str) -> Sizes:
    """Those of out = op(a) @ op(b).

    Raises:
        ValueError: shapes that do not go together, dtypes or an arithmetic that PRODUCTS has not, or an array that
            is not C-contiguous.
    """
    of_factors, of_product = str(a.dtype), str(out.dtype)
    arithmetic = arithmetic or UNASKED.get((of_factors, of_product), "none")
    if b.dtype != a.dtype or (of_factors, of_product, arithmetic) not in PRODUCTS:
        raise ValueError(f"no product of {a.dtype} and {b.dtype} into {out.dtype} by {arithmetic} arithmetic")
    rows, inner = a.shape[::-1] if transpose_a else a.shape
    inner_b, columns = b.shape[::-1] if transpose_b else b.shape
    if inner != inner_b or out.shape != (rows, columns):
        raise ValueError(f"{(rows, inner)} @ {(inner_b, columns)} is no product of shape {out.shape}")
    if not (a.flags.c_contiguous and b.flags.c_contiguous and out.flags.c_contiguous):
        raise ValueError("the arrays of a product must be C-contiguous")
    return Sizes(rows, inner, columns, arithmetic)


class Gemm:
    """Matrix products on whatever stream is the current one. Not for two threads at once.

    Args:
        workspace: WORKSPACE bytes on the device. current_stream: gives the address of the current stream.
        cublas: the bindings.
    """

    def __init__(self, workspace: Array, current_stream: Callable[[], int], cublas: Any) -> None:
        self._cublas = cublas
        self._workspace = workspace
        self._current_stream = current_stream
        self._stream: int | None = None
        self._handle = cublas.create()
        weakref.finalize(self, cublas.destroy, self._handle).atexit = False  # the process takes it along
        cublas.set_pointer_mode(self._handle, HOST)
        cublas.set_math_mode(self._handle, MATH)
        scalars = {arithmetic.scalar for arithmetic in ARITHMETIC.values()}
        self._scalars = {scalar: (scalar(0), scalar(1)) for scalar in scalars}

    def __call__(
        self,
        a: Array,
        b: Array,
        out: Array,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        add: bool = False,
        arithmetic: str = "",
    ) -> None:
        """out = op(a) @ op(b), or out += it; op transposes or does not.

        Raises:
            ValueError: what is no product: see `sizes`.
        """
        rows, inner, columns, arithmetic = sizes(a, b, out, transpose_a, transpose_b, arithmetic)
        self._follow()
        number, scalar = ARITHMETIC[arithmetic]
        zero, one = self._scalars[scalar]
        self._cublas.gemm_ex(
            self._handle,
            int(transpose_b),
            int(transpose_a),
            columns,
            rows,
            inner,
            ctypes.addressof(one),
            b.data.ptr,
            TYPES[str(a.dtype)],
            b.shape[1],
            a.data.ptr,
            TYPES[str(a.dtype)],
            a.shape[1],
            ctypes.addressof(one if add else zero),
            out.data.ptr,
            TYPES[str(out.dtype)],
            columns,
            number,
            ALGORITHM,
        )

    def _follow(self) -> None:
        """The handle goes over to the current stream. The workspace is set after it, which takes cuBLAS's own back."""
        stream = self._current_stream()
        if stream != self._stream:
            self._cublas.set_stream(self._handle, stream)
            self._cublas.set_workspace(self._handle, self._workspace.data.ptr, self._workspace.nbytes)
            self._stream = stream
