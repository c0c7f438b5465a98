"""Products by cublasLt, with an epilogue: what is done to them before they leave the chip, without another pass.

    lt = Lt(workspace, current_stream, bindings())             # workspace: WORKSPACE bytes on the device
    lt("relu_bias", x, w, y, b, transpose_b=True)              # y = relu(x @ w.T + b)
    lt("gelu_bias", x, w, y, b, v, transpose_b=True)           # v = x @ w.T + b, y = gelu_tanh(v)
    lt("bias_gradient", delta, x, dw, db, transpose_a=True)    # dw = delta.T @ x, db = the column sums of delta

What is to be done is laid down once for each shape: cublasLt is asked then, by its own rule, which of its algorithms to
take. Where it has none, nothing is done, and the call says so. Arrays are C-contiguous, by rows; cublasLt has them by
columns, and so computes out.T = op(b).T @ op(a).T, as in cublas.py.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpu_bp.backends.cublas import ARITHMETIC, TYPES, WORKSPACE, sizes
from gpu_bp.spec import Array

__all__ = ["EPILOGUES", "WORKSPACE", "Lt", "bindings"]

# cublasLt's numbers (cublasLtEpilogue_t). A bias has as many elements as cublasLt's D has rows, which are our columns;
# the gradient of one as D has columns, our rows: the sums of its B, our `a`, which must be transposed.
EPILOGUES = {
    "bias": 4,  # BIAS: out = product + bias
    "relu_bias": 6,  # RELU_BIAS: out = max(product + bias, 0)
    "gelu_bias": 164,  # GELU_AUX_BIAS: aux = product + bias, out = gelu of it, in the form with tanh
    "bias_gradient": 512,  # BGRADB: out = product, bias = the column sums of a
}

# Numbers and C types of what is said of a product (cublasLtMatmulDescAttributes_t).
TRANSA, TRANSB = (3, ctypes.c_int32), (4, ctypes.c_int32)
EPILOGUE, BIAS_POINTER = (7, ctypes.c_uint32), (8, ctypes.c_int64)
AUX_POINTER, AUX_LD = (11, ctypes.c_int64), (12, ctypes.c_int64)
BIAS_TYPE = (26, ctypes.c_int32)
# And of what an algorithm must do with (cublasLtMatmulPreferenceAttributes_t).
MAX_WORKSPACE, REDUCTION = (1, ctypes.c_uint64), (3, ctypes.c_uint32)
ALIGNMENTS = tuple((number, ctypes.c_uint32) for number in (5, 6, 7, 8))  # of A, B, C, D, in bytes

# CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: what is summed in parts stays in the arithmetic's type, as by cublas.py.
IN_ARITHMETIC = 2
AUX_MULTIPLE = 8  # the leading dimension of what a gelu leaves beside its output is a multiple of it


def bindings() -> Any:
    """The module nvmath.bindings.cublasLt. Late: to import it takes a second.

    Raises:
        ImportError: it is not installed.
    """
    from nvmath.bindings import cublasLt

    return cublasLt


class Plan(NamedTuple):
    """A product as cublasLt has it: its handles of what is to be done and of A, B and D, and the algorithm."""

    what: int
    a: int
    b: int
    out: int
    found: np.ndarray  # which begins with the algorithm
    scalar: Any


class Lt:
    """Matrix products with an epilogue on whatever stream is the current one. Not for two threads at once.

    Args:
        workspace: WORKSPACE bytes on the device. current_stream: gives the address of the current stream.
        lt: the bindings.

    Attributes:
        found: for how many products it has an algorithm, of those that were asked for.
    """

    def __init__(self, workspace: Array, current_stream: Callable[[], int], lt: Any) -> None:
        self._lt = lt
        self._workspace = workspace
        self._current_stream = current_stream
        self._handle = lt.create()
        self._plans: dict[Any, Plan | None] = {}
        scalars = {arithmetic.scalar for arithmetic in ARITHMETIC.values()}
        self._scalars = {scalar: (scalar(0), scalar(1)) for scalar in scalars}
        weakref.finalize(self, _destroy, lt, self._handle, self._plans).atexit = False  # the process takes it along

    @property
    def found(self) -> int:
        return sum(plan is not None for plan in self._plans.values())

    def __call__(
        self,
        epilogue: str,
        a: Array,
        b: Array,
        out: Array,
        bias: Array,
        aux: Array | None = None,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        arithmetic: str = "",
    ) -> bool:
        """out = op(a) @ op(b), with an epilogue of EPILOGUES; whether it was done, or else nothing.

        Raises:
            ValueError: what is no product (see `cublas.sizes`), or a bias or aux that does not go with it.
        """
        rows, inner, columns, arithmetic = sizes(a, b, out, transpose_a, transpose_b, arithmetic)
        of_rows = epilogue == "bias_gradient"
        if bias.shape != (rows if of_rows else columns,) or (of_rows and not transpose_a):
            raise ValueError(f"{epilogue} of a product of shape {out.shape} has no bias of shape {bias.shape}")
        gelu = epilogue == "gelu_bias"
        if gelu != (aux is not None) or (aux is not None and (aux.shape, aux.dtype) != (out.shape, out.dtype)):
            raise ValueError(f"{epilogue} leaves {'its' if gelu else 'no'} net input beside its output, of its shape")
        aligned = tuple(min(256, x.data.ptr & -x.data.ptr) for x in (a, b, out, bias, *(() if aux is None else (aux,))))
        dtypes = (str(a.dtype), str(out.dtype), str(bias.dtype))
        key = (epilogue, arithmetic, dtypes, (rows, inner, columns), transpose_a, transpose_b, aligned)
        if key not in self._plans:
            self._plans[key] = self._plan(*key, bias, aux)
        plan = self._plans[key]
        if plan is None:
            return False
        zero, one = self._scalars[plan.scalar]
        self._point(plan.what, bias, aux)
        self._lt.matmul(
            self._handle,
            plan.what,
            ctypes.addressof(one),
            b.data.ptr,
            plan.a,
            a.data.ptr,
            plan.b,
            ctypes.addressof(zero),
            out.data.ptr,
            plan.out,
            out.data.ptr,
            plan.out,
            plan.found.ctypes.data,
            self._workspace.data.ptr,
            self._workspace.nbytes,
            self._current_stream(),
        )
        return True

    def _plan(
        self,
        epilogue: str,
        arithmetic: str,
        dtypes: tuple[str, str, str],
        shape: tuple[int, int, int],
        transpose_a: bool,
        transpose_b: bool,
        aligned: tuple[int, ...],
        bias: Array,
        aux: Array | None,
    ) -> Plan | None:
        """None where cublasLt has no algorithm for such a product."""
        (rows, inner, columns), lt = shape, self._lt
        of_factors, of_product, of_bias = (TYPES[dtype] for dtype in dtypes)
        if aux is not None and columns % AUX_MULTIPLE:
            return None
        number, scalar = ARITHMETIC[arithmetic]
        what = lt.matmul_desc_create(number, TYPES["float64" if scalar is ctypes.c_double else "float32"])
        self._set(what, TRANSA, int(transpose_b))
        self._set(what, TRANSB, int(transpose_a))
        self._set(what, EPILOGUE, EPILOGUES[epilogue])
        if of_bias != of_product:  # which is what it is taken for, unasked
            self._set(what, BIAS_TYPE, of_bias)
        if aux is not None:
            self._set(what, AUX_LD, columns)
        self._point(what, bias, aux)  # without them it has no algorithm
        # rows, columns and leading dimension, by columns
        plan = Plan(
            what,
            _layout(lt, of_factors, *((inner, columns) if transpose_b else (columns, inner))),
            _layout(lt, of_factors, *((rows, inner) if transpose_a else (inner, rows))),
            _layout(lt, of_product, columns, rows),
            np.zeros(1, lt.matmul_heuristic_result_dtype),
            scalar,
        )
        wanted = lt.matmul_preference_create()
        of_a, of_b, *others = aligned
        values = (of_b, of_a, min(others), min(others))
        for attribute, value in (
            (MAX_WORKSPACE, self._workspace.nbytes),
            (REDUCTION, IN_ARITHMETIC),
            *zip(ALIGNMENTS, values, strict=True),
        ):
            self._set(wanted, attribute, value, lt.matmul_preference_set_attribute)
        count = ctypes.c_int(0)
        try:
            lt.matmul_algo_get_heuristic(
                self._handle,
                plan.what,
                plan.a,
                plan.b,
                plan.out,
                plan.out,
                wanted,
                1,
                plan.found.ctypes.data,
                ctypes.addressof(count),
            )
        except lt.cuBLASLtError:  # the product is not among those that it has
            count.value = 0
        lt.matmul_preference_destroy(wanted)
        if count.value and plan.found["state"][0] == 0:
            return plan
        _forget(lt, plan)
        return None

    def _point(self, what: int, bias: Array, aux: Array | None) -> None:
        """Says where they are."""
        self._set(what, BIAS_POINTER, bias.data.ptr)
        if aux is not None:
            self._set(what, AUX_POINTER, aux.data.ptr)

    def _set(
        self,
        of: int,
        attribute: tuple[int, Any],
        value: int,
        setter: Callable[[int, int, int, int], None] | None = None,
    ) -> None:
        number, kind = attribute
        held = kind(value)
        (setter or self._lt.matmul_desc_set_attribute)(of, number, ctypes.addressof(held), ctypes.sizeof(held))


def _layout(lt: Any, kind: int, rows: int, columns: int) -> int:
    """Of a matrix whose columns follow each other."""
    layout: int = lt.matrix_layout_create(kind, rows, columns, rows)
    return layout


def _forget(lt: Any, plan: Plan) -> None:
    lt.matmul_desc_destroy(plan.what)
    for layout in (plan.a, plan.b, plan.out):
        lt.matrix_layout_destroy(layout)


def _destroy(lt: Any, handle: int, plans: dict[Any, Plan | None]) -> None:
    for plan in plans.values():
        if plan is not None:
            _forget(lt, plan)
    lt.destroy(handle)
