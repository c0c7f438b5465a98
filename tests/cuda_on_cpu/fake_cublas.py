"""A stand-in for nvmath.bindings.cublas: its signatures, computed with NumPy on column-major memory, and as strict.

Matrices are found by their addresses and leading dimensions alone, so that a wrong one gives wrong values or an error.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from cuda_on_cpu.fake_cupy import FakeCupy

DTYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}
# What is multiplied and summed in, and the C type of alpha and beta. TF32 keeps 10 bits of a factor's fraction.
COMPUTE = {68: (np.float32, ctypes.c_float), 77: (np.float32, ctypes.c_float), 70: (np.float64, ctypes.c_double)}
TF32 = 77


class CublasError(RuntimeError):
    """What cuBLAS refuses, or must not be given."""


class FakeCublas:
    """The functions of the module that are used. `calls`: their names, in order."""

    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy
        self._handles = itertools.count(4096)
        self._streams: dict[int, int] = {}
        self._workspaces: dict[int, tuple[int, int]] = {}
        self.calls: list[str] = []

    def _call(self, name: str, handle: int) -> None:
        self.calls.append(name)
        if handle not in self._streams:
            raise CublasError(f"{name}: no such handle")

    def create(self) -> int:
        self._cupy.device.uncapturable("allocations", "synchronisations")
        handle = next(self._handles)
        self._streams[handle] = 0
        return handle

    def destroy(self, handle: int) -> None:
        self._call("destroy", handle)
        del self._streams[handle]

    def set_pointer_mode(self, handle: int, mode: int) -> None:
        self._call("set_pointer_mode", handle)
        assert mode == 0  # alpha and beta on the host

    def set_math_mode(self, handle: int, mode: int) -> None:
        self._call("set_math_mode", handle)
        assert mode & ~16 == 0  # float32 is float32

    def set_stream(self, handle: int, stream_id: int) -> None:
        self._call("set_stream", handle)
        self._streams[handle] = stream_id
        self._workspaces.pop(handle, None)  # as in cuBLAS

    def set_workspace(self, handle: int, workspace: int, workspace_size_in_bytes: int) -> None:
        self._call("set_workspace", handle)
        memory(self._cupy, workspace, workspace_size_in_bytes)
        self._workspaces[handle] = workspace, workspace_size_in_bytes

    def gemm_ex(
        self,
        handle: int,
        transa: int,
        transb: int,
        m: int,
        n: int,
        k: int,
        alpha: int,
        a: int,
        atype: int,
        lda: int,
        b: int,
        btype: int,
        ldb: int,
        beta: int,
        c: int,
        ctype: int,
        ldc: int,
        compute_type: int,
        algo: int,
    ) -> None:
        """C = alpha op(A) op(B) + beta C, of (m, k), (k, n) and (m, n), by columns."""
        self._call("gemm_ex", handle)
        assert algo == -1
        if self._streams[handle] != self._cupy.cuda.get_current_stream().ptr:
            raise CublasError("a product on another stream than what it must come after")
        if handle not in self._workspaces:
            self._cupy.device.uncapturable("allocations")
        arithmetic, scalar = COMPUTE[compute_type]
        factor, rest = scalar.from_address(alpha).value, scalar.from_address(beta).value
        left = matrix(self._cupy, a, atype, (k, m) if transa else (m, k), lda)
        right = matrix(self._cupy, b, btype, (n, k) if transb else (k, n), ldb)
        out = matrix(self._cupy, c, ctype, (m, n), ldc)
        if np.may_share_memory(out, left) or np.may_share_memory(out, right):
            raise CublasError("cuBLAS reads its factors while it writes the product")

        def run() -> None:
            with np.errstate(all="ignore"):  # as on a device
                product = multiplied(left.T if transa else left, right.T if transb else right, compute_type)
                out[...] = factor * product + rest * out.astype(arithmetic) if rest else factor * product

        self._cupy.device.launch(run)


def matrix(cupy: FakeCupy, address: int, number: int, shape: tuple[int, int], leading: int) -> np.ndarray:
    """A matrix in device memory whose columns begin `leading` elements after each other."""
    rows, columns = shape
    dtype = np.dtype(DTYPES[number])
    if leading < max(1, rows):
        raise CublasError(f"a leading dimension of {leading} for {rows} rows")
    found = memory(cupy, address, dtype.itemsize * (leading * (columns - 1) + rows))
    strides = (dtype.itemsize, dtype.itemsize * leading)
    return np.lib.stride_tricks.as_strided(found.view(dtype), shape, strides)


def memory(cupy: FakeCupy, address: int, nbytes: int) -> np.ndarray:
    """So many bytes of the device from an address on."""
    found = cupy.device.memory_at(address, nbytes)
    if found is None:
        raise CublasError(f"{nbytes} bytes that are no array's")
    return found


def multiplied(left: np.ndarray, right: np.ndarray, compute_type: int) -> np.ndarray:
    """Their product, in an arithmetic's type."""
    arithmetic, _ = COMPUTE[compute_type]
    cast = _tf32 if compute_type == TF32 else lambda x: x.astype(arithmetic)
    product: np.ndarray = cast(left) @ cast(right)
    return product


def _tf32(x: np.ndarray) -> Any:
    """Rounded to 10 bits of fraction: to the nearest, halves to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)
